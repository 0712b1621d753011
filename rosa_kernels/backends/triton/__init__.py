"""The Triton kernels, for CUDA and ROCm GPUs; under TRITON_INTERPRET=1, asked for by name, CPU tensors too."""

import os
import sys

import torch

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.backend import GpuBackend
from rosa_kernels.backends.gpu.ops import Ops
from rosa_kernels.backends.triton import heuristics

try:
    import triton
except ModuleNotFoundError:
    triton = None
else:
    from rosa_kernels.backends.triton import lora
    from rosa_kernels.backends.triton import sddmm as _sddmm
    from rosa_kernels.backends.triton.densify import densify
    from rosa_kernels.backends.triton.linear import finish_linear
    from rosa_kernels.backends.triton.transpose import gather_columns, gather_whole_rows

    _ops = Ops(GpuBackend(
        heuristics=heuristics, finish_linear=finish_linear, gradients_by_kernels=lora.gradients_by_kernels,
        H_of_matrix=lora.H_of_matrix, matrix_of_H=lora.matrix_of_H, sddmm_kernels=_sddmm.KERNELS,
        gather_columns=gather_columns, gather_whole_rows=gather_whole_rows, gather_entries=_sddmm.gather_entries,
        densify=densify,
    ))  # fmt: skip
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
