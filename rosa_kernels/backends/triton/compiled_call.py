"""A launch of a kernel that Triton has compiled, past Triton's own Python, which takes 10 us of it.

This needs names that Triton does not promise to keep. Where one is gone, launches go by Triton's public way: the
results are the same, only later, and ``python -m rosa_kernels`` says which name is missing.
"""

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton.compiler import make_backend
from triton.runtime import driver

PRIVATE_NAMES = (
    "_C.libtriton.native_specialize_impl",
    "compiler.CompiledKernel.run",
    "compiler.CompiledKernel._init_handles",
    "knobs.runtime.launch_enter_hook",
    "knobs.runtime.launch_exit_hook",
)
"""What this file takes from triton."""


def _exists(name: str) -> bool:
    try:
        operator.attrgetter(name)(triton)
    except AttributeError:
        return False
    return True


missing_names = tuple(name for name in PRIVATE_NAMES if not _exists(name))

if not missing_names:
    from triton import knobs
    from triton._C.libtriton import native_specialize_impl


class CompiledCall(NamedTuple):
    """launch(x, y, z, stream_of(device), *middle, arguments) launches the kernel on a grid of x * y * z programs.

    arguments are those of the kernel in order, its compile-time arguments too; an address stands for a tensor.
    """

    launch: Callable
    stream_of: Callable[[int], int]
    middle: tuple
    compile_time: tuple
    compiled: Any
    """compiled[x, y, z](*arguments) is the public way."""


def hooks_are_installed() -> bool:
    """Whether somebody, a profiler for example, wants to be called before or after each launch."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def specialised(number: int | float) -> tuple:
    """What of a number Triton compiles into a kernel: its type, that it is 1, or that 16 divides it."""
    return native_specialize_impl(_backend(), number, False, True, True)


@functools.cache
def _backend():
    return make_backend(driver.active.get_current_target())


def prepare(compiled: Any, arguments: tuple, compile_time: tuple) -> CompiledCall:
    """arguments: some that the compiled kernel takes, its compile-time arguments included."""
    launch, middle = _what_launches(compiled, arguments)
    return CompiledCall(launch, driver.active.get_current_stream, middle, compile_time, compiled)


def _what_launches(compiled: Any, arguments: tuple) -> tuple[Callable, tuple]:
    """(launch, middle) of a CompiledCall: the C function that Triton's launcher object calls, with what it passes on.

    A copy of the object is asked, by a call with a function in that place which writes down what comes. Where it passes
    on something else than expected, and where a kernel wants scratch memory anew for each launch, the object itself is
    called.
    """
    run = compiled.run
    metadata = compiled.function, compiled.packed_metadata, None, None, None

    def by_the_object(x, y, z, stream, arguments):
        run(x, y, z, stream, *metadata, *arguments)

    wants_scratch = any(getattr(run, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if wants_scratch or not hasattr(run, "launch"):
        return by_the_object, ()
    written_down: list[tuple] = []
    asked = copy.copy(run)
    asked.launch = lambda *passed_on: written_down.append(passed_on)
    grid_and_stream = 2, 3, 5, 7
    asked(*grid_and_stream, *metadata, *arguments)
    if len(written_down) == 1:
        *before, last = written_down[0]
        same = type(last) is tuple and len(last) == len(arguments) and all(map(operator.is_, last, arguments))
        if same and tuple(before[:4]) == grid_and_stream:
            return run.launch, tuple(before[4:])
    return by_the_object, ()
