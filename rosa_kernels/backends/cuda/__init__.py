"""The CUDA C++ kernels of csrc/cuda/, around library GEMMs for the base layer: for CUDA GPUs without Triton."""

import functools
from pathlib import Path

import torch

from rosa_kernels.backends import native_library
from rosa_kernels.backends.cuda.densify import add_in_place, dense, sum_with
from rosa_kernels.backends.cuda.gradients import low_rank_gradients
from rosa_kernels.backends.cuda.gradients import sddmm as _sddmm
from rosa_kernels.backends.cuda.linear import linear
from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.ops import Kernels, Ops

_ops = Ops(Kernels(linear, low_rank_gradients, _sddmm, sum_with, add_in_place, dense))
rosa_linear, rosa_linear_backward = _ops.rosa_linear, _ops.rosa_linear_backward
spmm, sddmm, csr_add = _ops.spmm, _ops.sddmm, _ops.csr_add


def _library() -> Path | None:
    return native_library.find("_cuda")


@functools.cache
def unavailable_reason() -> str | None:
    """Loads the library where there is a GPU for it."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    library = _library()
    if library is None:
        error = native_library.build_error("_cuda")
        if error is not None:
            return f"the CUDA kernels did not build ({error}); fix that and run pip install -e . again"
        return (
            f"the CUDA kernels were not built; install the CUDA {torch.version.cuda} toolkit (nvcc) and run "
            "ROSA_KERNELS_BUILD=cuda pip install -e . again"
        )
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library} does not load ({error}); run ROSA_KERNELS_BUILD=cuda pip install -e . again"
    return None


def build_info() -> str:
    """Compiler and GPUs of the kernels."""
    return torch.ops.rosa_kernels_cuda.build_info()


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"its tensors are on a CUDA device, not on {device.type}"
    return hardware.refusal(device, dtype)
