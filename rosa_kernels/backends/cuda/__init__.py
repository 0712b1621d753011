"""The CUDA C++ kernels of csrc/cuda/, around library GEMMs for the base layer: for CUDA GPUs without Triton."""

import functools
import warnings

import torch

from rosa_kernels.backends import native_binary
from rosa_kernels.backends.cuda.ops import (
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
from rosa_kernels.backends.gpu import hardware

__all__ = [
    "KEEPS_H",
    "LORA_OPS",
    "build_info",
    "csr_add",
    "lora_step_by_library",
    "refusal",
    "rosa_linear",
    "rosa_linear_backward",
    "rosa_linear_with_H",
    "sddmm",
    "spmm",
    "unavailable_reason",
]

_BINARY = native_binary.PACKAGE / native_binary.file_name("_cuda")
_OPS = "build_info", "csr_add", "linear", "linear_backward", "whole_sddmm"


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the binary where there is a GPU for it.

    A binary that is installed and does not serve is a fault of the installation. A warning says so, because "auto"
    goes on with another backend.
    """
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    binary = _BINARY
    if not binary.exists():
        error = native_binary.build_error("_cuda")
        if error is not None:
            return f"the CUDA kernels did not build ({error}); fix that and run pip install -e . again"
        return (
            f"the CUDA kernels were not built; install the CUDA {torch.version.cuda} toolkit (nvcc) and run "
            "ROSA_KERNELS_BUILD=cuda pip install -e . again"
        )
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(binary)
    except OSError as error:
        return _fault(f"{binary} does not load ({error})")
    if missing := native_binary.missing_ops(torch.ops.rosa_kernels_cuda, _OPS):
        return _fault(f"{binary} was built from other sources than this package's: it lacks {missing}")
    return None


def _fault(what: str) -> str:
    reason = f"{what}; run ROSA_KERNELS_BUILD=cuda pip install -e . again"
    warnings.warn(f"rosa_kernels: {reason}", stacklevel=3)
    return reason


def build_info() -> str:
    """Compiler and GPUs of the kernels."""
    return torch.ops.rosa_kernels_cuda.build_info()


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"its tensors are on a CUDA device, not on {device.type}"
    return hardware.refusal(device, dtype)
