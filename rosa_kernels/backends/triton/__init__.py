"""The Triton kernels, for CUDA and ROCm GPUs; under TRITON_INTERPRET=1, asked for by name, CPU tensors too."""

import os
import sys

import torch

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.ops import Kernels, Ops

try:
    import triton
except ModuleNotFoundError:
    triton = None
else:
    from rosa_kernels.backends.triton.densify import add_in_place, dense, sum_with
    from rosa_kernels.backends.triton.gradients import low_rank_gradients
    from rosa_kernels.backends.triton.linear import linear
    from rosa_kernels.backends.triton.sddmm import sddmm as _sddmm

    _ops = Ops(Kernels(linear, low_rank_gradients, _sddmm, sum_with, add_in_place, dense))
    rosa_linear, rosa_linear_backward = _ops.rosa_linear, _ops.rosa_linear_backward
    spmm, sddmm, csr_add = _ops.spmm, _ops.sddmm, _ops.csr_add


def unavailable_reason() -> str | None:
    if triton is None:
        return f"Triton is not installed; {sys.executable} -m pip install triton"
    if not torch.cuda.is_available() and not _emulated():
        return "no CUDA or ROCm device; TRITON_INTERPRET=1 lets it run on CPU tensors, slowly, when asked for by name"
    return None


def _emulated() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _emulated()):
        return f"its tensors are on a CUDA or ROCm device, not on {device.type}"
    return hardware.refusal(device, dtype)
