"""What stands for a GPU's libraries: a libcuda without a GPU, and the CUDA backend's binary with empty kernels."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
CSRC, EMULATION = REPOSITORY / "csrc", REPOSITORY / "tests" / "cuda"
TORCH = Path(torch.__file__).parent
_GEMMS = "aoti_torch_cpu_mm_out", "aoti_torch_cpu_addmm_out"
"""What the sources take from the C shim. empty_launchers.h counts its calls."""
_LAUNCHER = re.compile(r"^cudaError_t (\w+)\(const (\w+)&, cudaStream_t\);", re.MULTILINE)


def compiler(variable: str, *names: str) -> str | None:
    """The compiler that an environment variable names, or the first of these that is installed."""
    named = os.environ.get(variable, "").split()[:1]
    return next(filter(None, map(shutil.which, named or names)), None)


def c_compiler() -> str | None:
    return compiler("CC", "cc", "gcc", "clang")


def cxx_compiler() -> str | None:
    return compiler("CXX", "c++", "g++", "clang++")


def build_libcuda(folder: Path) -> Path:
    """folder/libcuda.so.1"""
    library = folder / "libcuda.so.1"
    _run(c_compiler(), "-O2", "-shared", "-fPIC", str(HERE / "libcuda_stub.c"), "-o", str(library))
    return library


def build_cuda_backend(folder: Path) -> Path:
    """The CUDA backend's binary for CPU tensors: its C++ as it is, and each launcher of a kernel empty."""
    launchers = folder / "empty_launchers.cpp"
    headers = sorted((CSRC / "cuda").glob("*.h"))
    declared = [match for header in headers for match in _LAUNCHER.findall(header.read_text())]
    includes = [f'#include "cuda/{header.name}"' for header in headers if _LAUNCHER.search(header.read_text())]
    bodies = [
        f"cudaError_t {name}(const {operation}& o, cudaStream_t) {{ return count(o); }}" for name, operation in declared
    ]
    text = ['#include "empty_launchers.h"', *includes, "namespace rosa {", *bodies, "}"]
    launchers.write_text("\n".join(text) + "\n")
    flags = (
        "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DROSA_EMULATED",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-D{name}={name.replace('aoti_torch_cpu', 'counted')}" for name in _GEMMS),
        f"-I{HERE}", f"-I{EMULATION}", f"-I{CSRC}", f"-I{TORCH / 'include'}", "-Wno-unknown-pragmas",
    )  # fmt: skip
    sources = [*sorted((CSRC / "cuda").glob("*.cpp")), CSRC / "gpu" / "library_gemm.cpp", launchers]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, made: Path) -> None:
        _run(cxx_compiler(), *flags, "-c", str(source), "-o", str(made))

    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / "cuda_backend.so"
    torch_library = f"-L{TORCH / 'lib'}", "-ltorch_cpu"
    _run(cxx_compiler(), "-shared", *map(str, objects), *torch_library, "-o", str(library))
    return library


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-5000:]}")
