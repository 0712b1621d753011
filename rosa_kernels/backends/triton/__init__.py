"""The Triton kernels, for CUDA and ROCm GPUs; under TRITON_INTERPRET=1, asked for by name, CPU tensors too."""

import os
import sys

import torch

from rosa_kernels.backends.gpu import hardware

try:
    import triton
except ModuleNotFoundError:
    triton = None
else:
    from rosa_kernels.backends.triton import compiled_call
    from rosa_kernels.backends.triton.ops import (
        KEEPS_H,
        LORA_OPS,
        csr_add,
        lora_step_by_library,
        rosa_linear,
        rosa_linear_backward,
        rosa_linear_with_H,
        sddmm,
        spmm,
    )

__all__ = [
    "KEEPS_H",
    "LORA_OPS",
    "csr_add",
    "lora_step_by_library",
    "missing_names",
    "refusal",
    "rosa_linear",
    "rosa_linear_backward",
    "rosa_linear_with_H",
    "sddmm",
    "spmm",
    "unavailable_reason",
]


def unavailable_reason() -> str | None:
    if triton is None:
        return f"Triton is not installed; {sys.executable} -m pip install triton"
    if not torch.cuda.is_available() and not _emulated():
        return "no CUDA or ROCm device; TRITON_INTERPRET=1 lets it run on CPU tensors, slowly, when asked for by name"
    return None


def missing_names() -> tuple[str, ...]:
    """What this Triton lacks of the names by which the package launches its kernels at once."""
    return () if triton is None else compiled_call.missing_names


def _emulated() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _emulated()):
        return f"its tensors are on a CUDA or ROCm device, not on {device.type}"
    return hardware.refusal(device, dtype)
