"""The CUDA kernels for the CPU: built by the host's C++ compiler with cuda_emulation.h in the CUDA toolkit's place.

Builds lie in the temporary directory under a hash of their sources and flags.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from paths import CSRC, TESTS

KERNELS = (*sorted((CSRC / "cuda").glob("*.c*")), CSRC / "gpu" / "library_gemm.cpp")
FAULTS = (TESTS / "cuda" / "cuda_faults.cu",)
TORCH = Path(torch.__file__).parent
FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DROSA_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f"-I{TESTS / 'cuda'}", f"-I{CSRC}", f"-I{TORCH / 'include'}", "-Wno-unknown-pragmas",
)  # fmt: skip
VARIANTS = {
    "plain": ("-O2",),
    "address": ("-O1", "-g1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}
SANITIZER_LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
RUNTIME_OPTIONS = {
    "address": {"ASAN_OPTIONS": "detect_leaks=0"},  # Python keeps what it has until it ends
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:exitcode=66"},
}


@functools.cache
def compiler() -> str | None:
    names = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


@functools.cache
def library_of(name: str) -> Path | None:
    """A run-time library of gcc."""
    named = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    library = Path(named.stdout.strip())
    return library if library.is_absolute() else None  # the bare name is repeated where there is no such file


def unavailable_reason(variant: str = "plain") -> str | None:
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the emulation is written for Linux on x86-64 and aarch64, not {platform.system()} {platform.machine()}"
    if compiler() is None:
        return "no C++ compiler is found (CXX, c++, g++, clang++)"
    if variant != "plain" and library_of(SANITIZER_LIBRARIES[variant]) is None:
        return f"{compiler()} has no {SANITIZER_LIBRARIES[variant]}, as gcc does"
    return None


def build(variant: str, sources: tuple[Path, ...] = KERNELS, options: tuple[str, ...] = ()) -> Path:
    """The shared library of the sources, compiled side by side where it is not there yet."""
    flags = (*FLAGS, *VARIANTS[variant], *options)
    library = _directory() / f"{sources[-1].stem}_{variant}_{_hash(sources, flags)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
            commands = [
                (compiler(), *flags, "-c", "-x", "c++", str(source), "-o", str(made))
                for source, made in zip(sources, objects)
            ]
            with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
                list(pool.map(_run, commands))
            linked = Path(scratch) / library.name
            torch_library = (f"-L{TORCH / 'lib'}", "-ltorch_cpu") if sources != FAULTS else ()
            _run((compiler(), *VARIANTS[variant], "-shared", *map(str, objects), *torch_library, "-o", str(linked)))
            linked.rename(library)
    return library


def _directory() -> Path:
    directory = Path(tempfile.gettempdir()) / f"rosa_kernels_emulated_{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(f"{directory} belongs to another user")
    return directory


def _hash(sources: tuple[Path, ...], flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    content = hashlib.sha256(repr((version, flags, torch.__version__)).encode())
    for path in (*sources, *sorted(TESTS.rglob("*.h")), *sorted(CSRC.rglob("*.h"))):
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _run(command: tuple[str, ...]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")


def environment(variant: str) -> dict[str, str]:
    """What a Python process needs to load a build."""
    if variant == "plain":
        return {}
    # The sanitizers look for what they intercept, __cxa_throw of libstdc++ too, when they start.
    libraries = library_of(SANITIZER_LIBRARIES[variant]), library_of("libstdc++.so.6")
    return {"LD_PRELOAD": " ".join(map(str, filter(None, libraries))), **RUNTIME_OPTIONS[variant]}


def install(library: str) -> None:
    """Makes backend "cuda", asked for by name, take CPU tensors in this process: a build's kernels serve them."""
    from rosa_kernels.backends import cuda
    from rosa_kernels.backends.gpu import hardware

    torch.ops.load_library(library)

    def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"emulated, its tensors are on the CPU, not on {device.type}"
        return hardware.refusal(device, dtype)

    cuda.unavailable_reason = lambda: None
    cuda.refusal = refusal


def takes(item) -> bool:
    """Whether an emulated run takes a test: it takes those of a backend, and those of this backend's algorithms."""
    return "backend" in item.fixturenames or item.path.parent.name == "cuda"
