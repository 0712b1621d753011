"""The C++ kernels' binary: whether it is there, what it was built from, and what this processor runs of it."""

import functools

import torch

from rosa_kernels.backends import native_library

_DTYPES = (torch.float32, torch.bfloat16)
_library = native_library.find("_C")
if _library is not None:
    torch.ops.load_library(_library)
kernels = torch.ops.rosa_kernels_cpu


def unavailable_reason() -> str | None:
    if _library is None:
        error = native_library.build_error("_C")
        if error is not None:
            return f"the C++ kernels did not build ({error}); fix that and run pip install -e . again"
        return (
            "the C++ kernels were not built; install a C++17 compiler (apt install g++, dnf install gcc-c++, "
            "xcode-select --install) and run pip install -e . again"
        )
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its tensors are on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def instruction_set() -> str:
    return kernels.instruction_set()


def build_info() -> str:
    """Compiler and flags of the kernels."""
    return kernels.build_info()


@functools.cache
def fast_bfloat16() -> bool:
    """Whether PyTorch's bf16 GEMMs use instructions for bf16; without them they run far below fp32's rate."""
    return torch.backends.mkldnn.is_available() and kernels.fast_bfloat16()


@functools.cache
def uses_our_gemm(dtype: torch.dtype) -> bool:
    """Whether the kernels' own dense products are faster than the library's: in bf16 those by vectors (those by AMX have not been
    measured), in fp32 where MKL, at 41 % of the peak with AVX-512 and 80 % with AVX2, is on another processor than Intel's."""
    if dtype == torch.bfloat16:
        return instruction_set() == "avx512bf16"
    foreign_mkl = torch.backends.mkl.is_available() and not kernels.intel_processor()
    return foreign_mkl and instruction_set() != "portable"
