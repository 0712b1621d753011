"""CPU tensors in the place of CUDA tensors, for the GPU backends of this process.

What a backend asks of the device is answered as an H100 would, at about the cost of the answer on a GPU. Left out, for
every candidate alike: the driver's own launch, PyTorch's look-up of the stream inside of ops, and its GPU allocator.
"""

import ctypes
import functools
import operator
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

import hand_written
from rosa_kernels.backends import cuda, triton
from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.triton import split_bf16_gemm

ARCHITECTURE, MULTIPROCESSORS = "sm_90", 132
_initialised = threading.local()


def _initialise() -> None:
    """As torch.cuda asks before each answer whether CUDA is there."""
    if not hasattr(_initialised, "done"):
        _initialised.done = True


def current_device() -> int:
    """As torch.cuda.current_device."""
    _initialise()
    return operator.index(0)


def install(cuda_library: Path | None) -> None:
    """Both backends take CPU tensors from now on. cuda_library is builds.build_cuda_backend's."""
    hardware.architecture = functools.cache(lambda device: ARCHITECTURE)
    hardware.multiprocessors = functools.cache(lambda device: MULTIPROCESSORS)
    for backend in (triton, cuda):
        backend.unavailable_reason = lambda: None
        backend.refusal = lambda device, dtype: None
    _replace_everywhere(split_bf16_gemm.matmul, matmul)
    hand_written.bf16_is_slow = lambda *_: False
    if cuda_library is not None:
        torch.ops.load_library(str(cuda_library))
    if triton.triton is not None:
        _install_triton_driver()


def _replace_everywhere(function, stand_in) -> None:
    """In every module of the package that has imported the function by its name."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("rosa_kernels") and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, stand_in)


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """As split_bf16_gemm.matmul on a GPU: one library call. Fp32 sums of 16-bit matrices come from fp32 stand-ins,
    because on a CPU mm has no out_dtype."""
    if left.dtype in (dtype, torch.float32):
        return left @ right
    return torch.mm(*_fp32_matrices(*left.shape, right.shape[1]))


@functools.lru_cache
def _fp32_matrices(rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, inner), torch.ones(inner, columns)


def _install_triton_driver() -> None:
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from rosa_kernels.backends.triton import launcher

    active = CudaDriver()
    active.get_device_capability = lambda device=None: (9, 0)
    active.get_current_device = current_device
    active.get_current_stream = operator.index  # a C function of the device that returns a number
    driver.set_active(active)
    launcher._current_device = lambda: -1  # as a CPU tensor's get_device() says


class Counter:
    """The sum of a counter in several libraries."""

    def __init__(self, name: str, *libraries: Path | None):
        self._counts = [ctypes.c_long.in_dll(ctypes.CDLL(str(library)), name) for library in libraries if library]

    def __call__(self) -> int:
        return sum(count.value for count in self._counts)
