"""Builds the native kernels where their compilers are; everything else about the package is in pyproject.toml.

ROSA_KERNELS_BUILD=auto (default): build what can be built, install without the rest and say so.
ROSA_KERNELS_BUILD=cpu: build the C++ kernels or fail.   ROSA_KERNELS_BUILD=cuda: build them and the CUDA kernels or fail.
ROSA_KERNELS_BUILD=none: do not build.
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX": compile the CUDA kernels for these, not for the GPUs that are here.
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = "torch>=2.10"
SOURCES = ["csrc/cpu/bindings.cpp", "csrc/cpu/cpu_features.cpp"]
KERNELS = "csrc/cpu/kernels.cpp"
COMMON_FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS = [*COMMON_FLAGS, "-g0", "-fvisibility=hidden"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {  # KERNELS is compiled once for each
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
CUDA_SOURCES = ["csrc/cuda/bindings.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))]
CUDA_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
# The static runtime needs no libcudart of one version, so that the binary outlives torch's change of CUDA as it outlives
# torch's own; both runtimes work in the driver's primary context, so torch's current device is the kernels' too.
CUDA_LINK_FLAGS = ["-shared", "--cudart=static"]
OLDEST_CUDA, OLDEST_ARCHITECTURE = (11, 8), (8, 0)
ARCHITECTURES = ["8.0", "9.0", "10.0"]  # where no GPU is here to ask


class Unavailable(Exception):
    """Why kernels cannot be built here."""


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


def cuda_of(torch: Path) -> str | None:
    """The version of CUDA that torch is built for, if any."""
    version = re.search(r"^cuda\b.*'([\d.]+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return version[1] if version else None


def wish() -> str:
    value = os.environ.get("ROSA_KERNELS_BUILD", "auto")
    if value not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"ROSA_KERNELS_BUILD: expected auto, cpu, cuda or none, got {value!r}")
    return value


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_compiler() -> None:
    if platform.system() not in ("Linux", "Darwin"):
        raise Unavailable(f"the kernels build on Linux and macOS, not on {platform.system()}")
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        raise Unavailable(f"no C++ compiler is found ({', '.join(compiler)}); install g++ or clang++ and install again")


def cuda_compiler(cuda: str | None) -> list[str]:
    """An nvcc for a torch of that CUDA, with the options for the architectures; seen to compile and to link."""
    if cuda is None:
        raise Unavailable("torch is built without CUDA; install a CUDA build of torch")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None:
        raise Unavailable(f"no nvcc is found ({', '.join(places)}); install the CUDA {cuda} toolkit and install again")
    major, minor = map(int, re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version")).groups())
    if (major, minor) < OLDEST_CUDA:
        raise Unavailable(
            f"{nvcc} is of CUDA {major}.{minor}, the kernels need {'.'.join(map(str, OLDEST_CUDA))} or newer"
        )
    if major != int(cuda.split(".")[0]):
        raise Unavailable(f"{nvcc} is of CUDA {major}.{minor}, torch of CUDA {cuda}: their major versions must match")
    host = shutil.which(os.environ.get("CXX", ""))
    command = [nvcc, *architectures(nvcc), *(["-ccbin", host] if host else [])]
    with tempfile.TemporaryDirectory() as directory:
        probe = [*command, *CUDA_LINK_FLAGS, "-x", "cu", os.devnull, "-o", f"{directory}/probe.so"]
        seen = subprocess.run(probe, check=False, capture_output=True, text=True)
    if seen.returncode != 0:
        raise Unavailable(f"{nvcc} does not compile: {' '.join((seen.stdout + seen.stderr).split())}")
    return command


def architectures(nvcc: str) -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, else for the GPUs here, else for ARCHITECTURES, as far as nvcc knows them."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = {f"{n[:-1]}.{n[-1]}" for n in re.findall(r"\bsm_(\d+)", output_of(nvcc, "--list-gpu-code"))}
        wanted = [name for name in gpus_here() if name in known] or [name for name in ARCHITECTURES if name in known]
        wanted[-1] += "+PTX"  # which later GPUs compile
    options = []
    for name in wanted:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not parts:
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected numbers as in 8.0;9.0+PTX, got {name}")
        major, minor, features, ptx = parts.groups()
        if (int(major), int(minor)) >= OLDEST_ARCHITECTURE:
            number = major + minor + features
            codes = [f"sm_{number}", f"compute_{number}"] if ptx else [f"sm_{number}"]
            options += [f"-gencode=arch=compute_{number},code=[{','.join(codes)}]"]
    if not options:
        raise Unavailable(f"the kernels need GPUs of compute capability 8.0 or newer, not {' '.join(wanted)}")
    return options


def gpus_here() -> list[str]:
    """Their compute capabilities of 8.0 and more, ascending. By nvidia-smi: pip's build environment may have no torch."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return []
    answer = subprocess.run(query, check=False, capture_output=True, text=True).stdout
    seen = {tuple(map(int, numbers)) for numbers in re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)}
    return [f"{major}.{minor}" for major, minor in sorted(seen) if (major, minor) >= OLDEST_ARCHITECTURE]


class CudaExtension(Extension):
    def __init__(self, torch: Path):
        self.torch_cuda = cuda_of(torch)
        super().__init__("rosa_kernels._cuda", CUDA_SOURCES, **torch_options(torch, "torch_cpu", "torch_cuda"))


def torch_options(torch: Path, *libraries: str) -> dict:
    return {
        "include_dirs": [str(torch / "include"), "csrc"],
        "library_dirs": [str(torch / "lib")],
        "libraries": list(libraries),
        "depends": [str(path) for path in Path("csrc").rglob("*.h")],
        "py_limited_api": True,
    }


class BuildKernels(build_ext):
    """Compiles each file with its own flags, all files side by side."""

    def run(self):
        for extension in list(self.extensions):
            is_cuda = isinstance(extension, CudaExtension)
            try:
                check_compiler()
                if is_cuda:
                    self.nvcc = cuda_compiler(extension.torch_cuda)
            except Unavailable as reason:
                if wish() != "auto":
                    sys.exit(f"ROSA_KERNELS_BUILD={wish()}: {reason}")
                print(f"rosa_kernels: no {'CUDA' if is_cuda else 'C++'} kernels are built: {reason}", file=sys.stderr)
                self.extensions.remove(extension)
        super().run()

    def build_extensions(self):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [(extension, self.start(extension, pool)) for extension in self.extensions]
            for extension, running in jobs:
                self.link(extension, [path for job in running for path in job.result()])

    def start(self, extension: Extension, pool: ThreadPoolExecutor) -> list[Future]:
        """Starts the compiler on each file; every job gives its object files."""
        if isinstance(extension, CudaExtension):
            return [pool.submit(self.compile_cuda, extension, source) for source in extension.sources]
        files = [(source, self.build_temp, [], []) for source in extension.sources]
        for name, flags in INSTRUCTION_SETS.items():
            macros = [("ROSA_ISA", name)]
            if not self.knows(flags):
                print(
                    f"rosa_kernels: the compiler does not know {' '.join(flags)}: no kernels for {name}",
                    file=sys.stderr,
                )
                macros, flags = [*macros, ("ROSA_ISA_UNKNOWN", "1")], []
            files.append((KERNELS, f"{self.build_temp}/{name}", macros, flags))
        return [pool.submit(self.compile_cpp, extension, *file) for file in files]

    def knows(self, flags: list[str]) -> bool:
        """Whether the compiler compiles for this machine with the flags of an instruction set."""
        if flags and platform.machine() not in ("x86_64", "AMD64"):
            return False
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)  # older: one for all
        probe = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(probe, check=False, capture_output=True).returncode == 0

    def compile_cpp(self, extension: Extension, source: str, directory: str, macros: list, flags: list) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=directory,
            macros=[*extension.define_macros, *macros],
            include_dirs=extension.include_dirs,
            extra_postargs=[*extension.extra_compile_args, *flags],
            depends=extension.depends,
        )

    def link(self, extension: Extension, objects: list[str]) -> None:
        if not isinstance(extension, CudaExtension):
            extension.sources, extension.extra_objects = [], objects
            super().build_extension(extension)
            return
        library = Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        directories = [f"-L{directory}" for directory in extension.library_dirs]
        libraries = [f"-l{name}" for name in extension.libraries]
        self.spawn([*self.nvcc, *CUDA_LINK_FLAGS, *objects, *directories, *libraries, "-o", str(library)])

    def compile_cuda(self, extension: CudaExtension, source: str) -> list[str]:
        """nvcc passes C++ sources on to the host's compiler, with CUDA's headers."""
        target = Path(self.build_temp, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        directories = [f"-I{directory}" for directory in extension.include_dirs]
        self.spawn([*self.nvcc, *CUDA_FLAGS, *directories, "-c", source, "-o", str(target)])
        return [str(target)]


def extensions(torch: Path) -> list[Extension]:
    cpp = Extension(
        "rosa_kernels._C", SOURCES, extra_compile_args=FLAGS, language="c++", **torch_options(torch, "torch_cpu")
    )
    wants_cuda = wish() == "cuda" or wish() == "auto" and cuda_of(torch) is not None
    return [cpp, CudaExtension(torch)] if wants_cuda else [cpp]


options = {"install_requires": [TORCH, "numpy", "safetensors", "tokenizers", "tqdm"]}
if wish() != "none":
    torch = torch_directory()
    if torch is None:
        options["setup_requires"] = [TORCH]  # setuptools.build_meta hands it to pip, and setup.py runs again with it
    else:
        options.update(ext_modules=extensions(torch), cmdclass={"build_ext": BuildKernels})
setup(**options)
