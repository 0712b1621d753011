"""The one place that launches Triton kernels.

Triton's own launch binds and specialises every argument in Python, some 35 us of a slow host for the linear kernel. So
only the first launch of a kind is Triton's; the next ones call the compiled kernel (compiled_call.py), 4 us there.
"""

import os
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.backends.triton import compiled_call
from rosa_kernels.backends.triton.compiled_call import CompiledCall

EMULATED = os.environ.get("TRITON_INTERPRET") == "1"
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""Along each axis of a grid, on a CUDA GPU."""
_ALIGNMENT = 16
"""Bytes: whether a tensor begins at a multiple of it is compiled into a kernel."""
_LARGEST_INT32 = 2**31 - 1
_MOST_KINDS = 4096
_calls: dict[tuple, CompiledCall] = {}
"""Kind of a launch -> how to repeat it. Kinds that differ in numbers alone may share a kernel."""
_layouts: dict[int, "_Layout"] = {}
"""id of a kernel -> its layout. Kernels live as long as their modules."""
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Layout(NamedTuple):
    """Which of a kernel's numbers are compiled in, each as a function of all numbers that returns a tuple."""

    specialised: Callable[[tuple], tuple]
    """Something of them is compiled in (compiled_call.specialised)."""
    unspecialised: Callable[[tuple], tuple]
    """Nothing of them but their width is. They are counts, so none is negative."""


def launch(
    kernel, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...],
    constants: tuple, config,
) -> None:  # fmt: skip
    """Launches the kernel on the current stream of the tensors' device; an empty grid does nothing.

    The kernel's arguments are tensors, of which the first is not None, then numbers, then compile-time arguments:
    constants in their order, and those that the config has.
    """
    if 0 in grid:
        return
    x, y, z = (*grid, 1, 1)[:3]
    if x > MOST_PROGRAMS[0] or y > MOST_PROGRAMS[1] or z > MOST_PROGRAMS[2]:
        raise ValueError(f"{kernel.__name__}: expected a grid of at most {MOST_PROGRAMS} programs, got {grid}")
    if EMULATED:
        kernel[grid](*tensors, *numbers, **_compile_time(kernel, len(tensors) + len(numbers), constants, config))
        return
    device = tensors[0].get_device()
    if device != _current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, config)
        return

    layout = _layouts.get(id(kernel)) or _layout(kernel, tensors, numbers)
    addresses, dtypes, together = [], [], 0
    for tensor in tensors:
        if tensor is None:
            addresses.append(0)
            dtypes.append(None)
        else:
            address = tensor.data_ptr()
            together |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
    misaligned = tuple(address % _ALIGNMENT for address in addresses) if together % _ALIGNMENT else ()
    counts = layout.unspecialised(numbers)
    wide = tuple(count > _LARGEST_INT32 for count in counts) if counts and max(counts) > _LARGEST_INT32 else ()
    kind = (id(kernel), device, config.label, constants, misaligned, wide, layout.specialised(numbers), *dtypes)
    call = _calls.get(kind) or _call_alike(kind)
    if call is None:
        _first_launch(kernel, grid, tensors, numbers, constants, config, kind)
    elif compiled_call.hooks_are_installed():
        call.compiled[x, y, z](*tensors, *numbers, *call.compile_time)
    else:
        arguments = (*addresses, *numbers, *call.compile_time)
        call.launch(x, y, z, call.stream_of(device), *call.middle, arguments)


def _compile_time(kernel, before: int, constants: tuple, config) -> dict[str, object]:
    """The kernel's compile-time arguments by name. `before` counts the others, which come first."""
    rest = (name for name in kernel.arg_names[before:] if name not in config.blocks)
    return dict(zip(rest, constants, strict=True)) | config.blocks


def _layout(kernel, tensors: tuple, numbers: tuple) -> _Layout:
    parameters = kernel.params[len(tensors) : len(tensors) + len(numbers)]
    for parameter, number in zip(parameters, numbers, strict=True):
        if type(number) not in ((int,) if parameter.do_not_specialize else (int, float)):
            raise TypeError(f"{kernel.__name__}: {parameter.name}: expected a number, got {number!r}")
    unspecialised = [place for place, parameter in enumerate(parameters) if parameter.do_not_specialize]
    specialised = [place for place in range(len(numbers)) if place not in unspecialised]
    layout = _layouts[id(kernel)] = _Layout(_getter(specialised), _getter(unspecialised))
    return layout


def _getter(places: list[int]) -> Callable[[tuple], tuple]:
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))  # a slice of a tuple is a tuple


def _alike(kind: tuple) -> tuple:
    """The kind with what is compiled in of its numbers in their place: the same for all kinds of one kernel."""
    *before, numbers = kind[:7]
    return *before, tuple(map(compiled_call.specialised, numbers)), *kind[7:]


def _call_alike(kind: tuple) -> CompiledCall | None:
    """That of a kind whose numbers are others but need no other kernel."""
    if not _calls:
        return None
    call = _calls.get(_alike(kind))
    if call is not None:
        _remember(kind, call)
    return call


def _first_launch(kernel, grid, tensors, numbers, constants, config, kind) -> None:
    """Triton's own, which compiles the kernel where it has not yet."""
    compile_time = _compile_time(kernel, len(tensors) + len(numbers), constants, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compiled = kernel[grid](*tensors, *numbers, **compile_time, **options)
    if compiled_call.missing_names or torch.version.hip or compiled is None:  # on AMD's a tensor's size is compiled in
        return
    in_order = tuple(compile_time[name] for name in kernel.arg_names[len(tensors) + len(numbers) :])
    call = compiled_call.prepare(compiled, (*tensors, *numbers, *in_order), in_order)
    _remember(kind, call)
    _remember(_alike(kind), call)


def _remember(kind: tuple, call: CompiledCall) -> None:
    if len(_calls) >= _MOST_KINDS:
        _calls.clear()
    _calls[kind] = call
