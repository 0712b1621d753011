"""The C++ kernels' binary: whether it is there and loads, what built it, and what this processor runs of it."""

import functools
import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rosa_kernels.backends import native_binary

_DTYPES = (torch.float32, torch.bfloat16)
_BINARY = native_binary.file_name("_C")
_OPS = (
    "backward",
    "build_info",
    "constants",
    "decode",
    "forward",
    "gemm",
    "instruction_set",
    "instruction_sets",
    "intel_processor",
    "merge",
    "x86_bfloat16",
)
_LIBRARY_OPS = "lora", "lora_backward", "serves_cuda"
"""Of torch.ops.rosa_kernels_gpu: they need no CUDA compiler, so that they lie in this binary."""
kernels: Any = torch.ops.rosa_kernels_cpu

INDICES_CHECKED = True
"""The last argument of the kernels' operators. Whoever else calls them leaves it out, and they read all indices first.
The package's are right: CSRPattern or checks of the call have read them, and reading them again takes as long as S."""


def _load(package: Path, search_path: list[str]) -> str | None:
    """Loads the package's binary; None where it serves, else the reason why not.

    Raises:
        ImportError: a binary is installed and does not serve. Backend "auto" would go on without it, many times slower.
            Whoever asks for another backend by ROSA_KERNELS_BACKEND gets the reason alone.
    """
    binary = package / _BINARY
    if not binary.exists():
        fault = _misplaced(package, search_path)
        if fault is None:
            return _not_built()
    else:
        fault = _load_fault(binary)
    if fault is not None and os.environ.get("ROSA_KERNELS_BACKEND", "auto") in ("auto", "cpu"):
        raise ImportError(f"{fault}. ROSA_KERNELS_BACKEND=reference runs without them, slowly.")
    return fault


def _not_built() -> str:
    error = native_binary.build_error("_C")
    if error is not None:
        return f"the C++ kernels did not build ({error}); fix that and run pip install -e . again"
    return (
        "the C++ kernels were not built; install a C++17 compiler (apt install g++, dnf install gcc-c++, "
        "xcode-select --install) and run pip install -e . again"
    )


def _load_fault(binary: Path) -> str | None:
    """Why the binary does not serve: the loader's own words, or the operators that another version of it lacks."""
    try:
        torch.ops.load_library(binary)
    except OSError as error:
        return (
            f"the C++ kernels are installed and do not load: {error}; they were built for another torch or "
            "processor, or are damaged; run pip install again"
        )
    missing = native_binary.missing_ops(kernels, _OPS)
    missing = missing or native_binary.missing_ops(torch.ops.rosa_kernels_gpu, _LIBRARY_OPS)
    if missing:
        return (
            f"the C++ kernels of {binary} were built from other sources than this package's: they lack {missing}; "
            "run pip install again"
        )
    return _unknown_instruction_set()


def _unknown_instruction_set() -> str | None:
    """ROSA_KERNELS_CPU where this processor has no such set. The kernels choose theirs now and take the best then."""
    wish = os.environ.get("ROSA_KERNELS_CPU")
    if not wish or kernels.instruction_set() == wish:
        return None
    names = ", ".join(kernels.instruction_sets().split())
    return f"ROSA_KERNELS_CPU={wish}: expected one of the instruction sets that this processor has: {names}"


def _misplaced(package: Path, search_path: list[str]) -> str | None:
    """Where a binary lies that this package does not load, or None where there is none."""
    others = sorted(path for path in package.glob("_C.*") if path.suffix in (".so", ".dylib", ".pyd"))
    if others:
        return f"the C++ kernels are looked for as {_BINARY}, and {others[0]} has another name; run pip install again"
    for place in map(Path, search_path):
        other = place / package.name / _BINARY
        if os.path.exists(other):  # Path.exists raises where a directory may not be read
            return (
                f"the C++ kernels are installed in {other.parent}, and the package was imported from {package}, which "
                "has none; leave that directory, or run pip install -e . in it"
            )
    return None


_reason = _load(native_binary.PACKAGE, sys.path)
if _reason is None:  # an operator called by its overload saves PyTorch from looking for one: 80 ns
    kernels = SimpleNamespace(**{name: getattr(kernels, name).default for name in _OPS})


def has_library_ops() -> bool:
    """Whether torch.ops.rosa_kernels_gpu is there."""
    return native_binary.missing_ops(torch.ops.rosa_kernels_gpu, _LIBRARY_OPS) == ""


def unavailable_reason() -> str | None:
    return _reason


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its tensors are on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def instruction_set() -> str:
    return kernels.instruction_set()


def build_info() -> str:
    """The compiler of the kernels and the instruction sets that they were compiled for."""
    return kernels.build_info()


def constants() -> dict[str, int]:
    """The numbers that the kernels and this package must agree on, as the kernels have them."""
    return {name: int(value) for name, value in (pair.split("=") for pair in kernels.constants().split())}


@functools.cache
def fast_bfloat16() -> bool:
    """Whether PyTorch's bf16 GEMMs use instructions for bf16; without them they run far below fp32's rate.

    PyTorch's own probe asks the right question on ARM alone: whether the processor has BF16 instructions. It is false
    on every other processor but x86, where any AVX-512 makes it true.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        return kernels.x86_bfloat16()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def uses_our_gemm(dtype: torch.dtype) -> bool:
    """Whether the kernels' own dense products are faster than the library's.

    In bf16 those by vectors are; those by AMX have not been measured. In fp32 they are where MKL runs on another
    processor than Intel's: there it reaches 41 % of the peak with AVX-512, and 80 % with AVX2.
    """
    if dtype == torch.bfloat16:
        return instruction_set() == "avx512bf16"
    foreign_mkl = torch.backends.mkl.is_available() and not kernels.intel_processor()
    return foreign_mkl and instruction_set() != "portable"
