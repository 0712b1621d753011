"""Tensors of more than 2**31 elements on a machine without the memory for them, and grids that run their last program
alone.

A system gives memory to the pages that are touched, and the tests touch those at the end.
"""

import contextlib
import math
import mmap
import sys

import torch
from torch import Tensor

ROOM_BELOW = 2**31
"""Elements before each tensor: an offset that wraps points there, at zeros or at what a test has put there."""
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which Python has from 3.13 on
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
allocate = torch.empty  # as it is where a test does not replace it


def zeros(*shape: int, dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """Zeros of any strides, contiguous by default, whose memory begins with ROOM_BELOW elements more."""
    tensor = allocate(shape, dtype=dtype, device="meta")
    strides = tensor.stride() if strides is None else strides
    elements = ROOM_BELOW + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    memory = mmap.mmap(-1, max(elements, 1) * dtype.itemsize, flags=_FLAGS)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides, ROOM_BELOW)


def below(tensor: Tensor, elements: int) -> Tensor:
    """The first elements of its room: where an offset of 2**31 wraps to."""
    return tensor.as_strided((elements,), (1,), tensor.storage_offset() - ROOM_BELOW)


def copy_at_stride(tensor: Tensor, *strides: int) -> Tensor:
    """The same numbers far apart."""
    far = zeros(*tensor.shape, dtype=tensor.dtype, strides=strides)
    return far.copy_(tensor)


def empty(*shape, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """What stands for torch.empty: a large tensor takes no memory before it is touched."""
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if math.prod(sizes) < 2**24 or device is not None and device.type != "cpu":
        return allocate(sizes, dtype=dtype, device=device)
    return zeros(*sizes, dtype=dtype)


@contextlib.contextmanager
def the_last_program_alone(monkeypatch):
    """Interpreted Triton kernels run the program that is the last along each axis of their grid."""
    from triton.runtime.interpreter import interpreter_builder

    from rosa_kernels.backends.triton import launcher

    launch, set_dim, set_index = launcher.launch, interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def launch_last(kernel, grid, *args, **keywords):
        whole = (*grid, 1, 1)[:3]
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *one: set_dim(*whole))
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *zeros: set_index(*(n - 1 for n in whole)))
        launch(kernel, (1,) * len(grid), *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "launch", launch_last)
        yield
