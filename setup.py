"""Builds the C++ kernels when a compiler is there; everything else about the package is in pyproject.toml.

ROSA_KERNELS_BUILD=auto (default): build them, or without a compiler install without them and say so.
ROSA_KERNELS_BUILD=cpu: build them or fail.   ROSA_KERNELS_BUILD=none: do not build.
"""

import os
import platform
import re
import shutil
import site
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = "torch>=2.10"
SOURCES = ["csrc/ops.cpp", *(f"csrc/cpu/kernels_{isa}.cpp" for isa in ("avx512", "avx2", "portable"))]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
INSTRUCTION_SETS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
}


def torch_directory() -> Path | None:
    """The torch to build against: the build environment's, else that of the environment pip installs into."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    places.append(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and re.search(r"system-site-packages\s*=\s*true", config.read_text()):
        places.append(sysconfig.get_path("purelib", vars={"base": sys.base_prefix}))
    for place in dict.fromkeys(places):
        version_file = Path(place) / "torch" / "version.py"
        if version_file.exists():
            version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text())
            if version and (int(version[1]), int(version[2])) >= (2, 10):
                return version_file.parent
    return None


def wish() -> str:
    value = os.environ.get("ROSA_KERNELS_BUILD", "auto")
    if value not in ("auto", "cpu", "none"):
        sys.exit(f"ROSA_KERNELS_BUILD: expected auto, cpu or none, got {value!r}")
    return value


class BuildKernels(build_ext):
    """Compiles each instruction set's file with its own flags, the files side by side."""

    def run(self):
        obstacle = self.obstacle()
        if obstacle and wish() == "cpu":
            sys.exit(f"ROSA_KERNELS_BUILD=cpu: {obstacle}")
        if obstacle:
            print(f"rosa_kernels: the C++ kernels are not built: {obstacle}", file=sys.stderr)
            self.extensions.clear()
        super().run()

    @staticmethod
    def obstacle() -> str | None:
        if platform.system() not in ("Linux", "Darwin"):
            return f"they build on Linux and macOS, not on {platform.system()}"
        compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compiler):
            return f"no C++ compiler is found ({', '.join(compiler)}); install g++ or clang++ and install again"
        return None

    def build_extensions(self):
        compile_one = self.compiler._compile
        pool = ThreadPoolExecutor(len(SOURCES))
        running = []

        def compile_soon(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = INSTRUCTION_SETS.get(Path(src).name, []) if platform.machine() in ("x86_64", "AMD64") else []
            running.append(pool.submit(compile_one, obj, src, ext, cc_args, extra_postargs + flags, pp_opts))

        link = self.compiler.link_shared_object

        def link_when_compiled(*args, **kwargs):
            for job in running:
                job.result()
            link(*args, **kwargs)

        self.compiler._compile = compile_soon
        self.compiler.link_shared_object = link_when_compiled
        with pool:
            super().build_extensions()


def extension(torch: Path) -> Extension:
    return Extension(
        "rosa_kernels._C",
        SOURCES,
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu"],
        extra_compile_args=FLAGS,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        language="c++",
        py_limited_api=True,
    )


options = {"install_requires": [TORCH, "numpy", "safetensors", "tokenizers", "tqdm"]}
if wish() != "none":
    torch = torch_directory()
    if torch is None:
        options["setup_requires"] = [TORCH]  # setuptools.build_meta hands it to pip, and setup.py runs again with it
    else:
        options.update(ext_modules=[extension(torch)], cmdclass={"build_ext": BuildKernels})
setup(**options)
