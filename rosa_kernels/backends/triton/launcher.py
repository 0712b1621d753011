"""The one place that launches Triton kernels.

Triton's own launch binds and specialises every argument in Python, some 35 us of a slow host for the linear kernel; so
the second launch of a kind calls the compiled kernel itself, 11 us there.
"""

import os

import torch
from torch import Tensor

EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""Along each axis of a grid, on a CUDA GPU."""
_MOST_KINDS = 4096
_compiled: dict[tuple, tuple] = {}
"""Kind of a launch -> (compiled kernel, its compile-time arguments in order)."""


def launch(kernel, grid: tuple[int, ...], *args, config, **constants) -> None:
    """kernel[grid](*args, **constants) on the current stream of the tensors' device; an empty grid does nothing.

    args: all but the compile-time arguments, in order; the first is a tensor.
    """
    if 0 in grid:
        return
    index = args[0].device.index
    if index is None or index == torch.cuda.current_device():
        _launch(kernel, grid, args, config, constants, index)
    else:
        with torch.cuda.device(index):
            _launch(kernel, grid, args, config, constants, index)


def _launch(kernel, grid, args, config, constants, index) -> None:
    kind = (id(kernel), index, config, *constants.values(), *[_kind(argument) for argument in args])
    known = _compiled.get(kind)
    if known is not None:
        compiled, compile_time = known
        compiled[(*grid, 1, 1)[:3]](*args, *compile_time)
        return
    if any(size > most for size, most in zip(grid, MOST_PROGRAMS)):
        raise ValueError(f"{kernel.__name__}: expected a grid of at most {MOST_PROGRAMS} programs, got {grid}")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compile_time = constants | config.blocks
    compiled = kernel[grid](*args, **compile_time, **({} if EMULATED else options))
    if EMULATED or torch.version.hip or compiled is None:  # on AMD's a tensor's size is part of its kind
        return
    if len(_compiled) >= _MOST_KINDS:
        _compiled.clear()
    _compiled[kind] = compiled, tuple(compile_time[name] for name in kernel.arg_names[len(args) :])


def _kind(argument):
    """What Triton may compile an argument into: a tensor's dtype and whether it begins at a multiple of 16 bytes, or
    the value of a number that is no float."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return float if type(argument) is float else argument
