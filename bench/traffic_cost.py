"""What calls would cost on an H100, by counting: the Triton backend's launches and library calls, on meta tensors."""

from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, prod
from unittest import mock

import torch
from kernel_traffic import SECTOR, Launch
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_kernels.backends import hardware
from rosa_kernels.backends.triton import runtime
from rosa_kernels.plan import gpu_table

TARGET, MULTIPROCESSORS = "sm_90", 132
RATES = gpu_table.RATES[TARGET]


@dataclass(frozen=True)
class Cost:
    """Of one launch or library call."""

    flops: float
    memory_bytes: float
    l2_bytes: float = 0
    gathered_l2_bytes: float = 0
    """The part of l2_bytes that gathers and scatters ask for."""
    efficiency: float = 1.0
    """Of its FLOP/s, against the library's."""
    busy: float = 1.0
    """Share of the multiprocessors that its programs keep at work, a program on each at a time."""
    launch_seconds: float = RATES.launch_seconds

    def limits(self, l2_of_tiles: bool = True) -> dict[str, float]:
        """Seconds by what may bound it, beside the constant of a launch."""
        l2_bytes = self.l2_bytes if l2_of_tiles else self.gathered_l2_bytes
        return {
            "FLOPs": self.flops / (RATES.flops_16_bit * self.efficiency * self.busy),
            "memory": self.memory_bytes / RATES.bandwidth,
            "L2": l2_bytes / (RATES.l2_bandwidth * self.busy),
        }

    @property
    def bound(self) -> str:
        limits = self.limits() | {"launch": self.launch_seconds}
        return max(limits, key=limits.get)

    def seconds(self, l2_of_tiles: bool = True) -> float:
        return self.launch_seconds + max(self.limits(l2_of_tiles).values())


class CostCounter(TorchDispatchMode):
    """While active, costs of the backend's launches and of the library calls on meta tensors, in order."""

    def __init__(self):
        super().__init__()
        self.costs: list[Cost] = []

    def __enter__(self):
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(runtime, "launch", self._launch))
            patches.enter_context(mock.patch.object(hardware, "target", lambda device: TARGET))
            patches.enter_context(mock.patch.object(hardware, "multiprocessors", lambda device: MULTIPROCESSORS))
            self._patches = patches.pop_all()
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def _launch(self, kernel, grid, *args, config, **constants):
        if 0 not in grid:
            launch, programs = Launch.of(kernel, grid, args, config, constants), prod(grid)
            busy = programs / (ceil(programs / MULTIPROCESSORS) * MULTIPROCESSORS)
            work = launch.work().flops, launch.memory_bytes(), launch.l2_bytes(), launch.l2_bytes(gathered_only=True)
            self.costs.append(Cost(*work, RATES.kernel_efficiency, busy, RATES.kernel_launch_seconds))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in _FREE and result.numel() > 0:
            self.costs.append(_library_cost(function.overloadpacket, args, result))
        return result


_aten = torch.ops.aten
_FREE = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten._unsafe_view, _aten.detach, _aten.scalar_tensor}
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1}
"""Matrix products, by the position of their first factor."""
_WRITES_ALONE = {_aten.zeros, _aten.zero_, _aten.fill_}
_READS_AND_WRITES = {_aten.clone, _aten._to_copy, _aten.mul_, _aten.sum, _aten.cat, _aten.constant_pad_nd}
_AT_PLACES = {_aten.index, _aten.index_select, _aten.index_put_, _aten.index_add_}
"""Elements at places here and there: a sector of memory each."""


def _library_cost(function, args, result) -> Cost:
    """L2 is left out: the rates are those that library calls reach."""
    tensors = args[0] if function == _aten.cat else args
    read = sum(_bytes(arg) for arg in tensors if isinstance(arg, torch.Tensor))
    if function in _PRODUCTS:
        first = args[_PRODUCTS[function]]
        return Cost(2 * first.numel() * result.shape[1], read + _bytes(result))
    if function in _READS_AND_WRITES:
        return Cost(0, read + _bytes(result))
    if function in _WRITES_ALONE:
        return Cost(0, _bytes(result))
    if function == _aten.copy_:  # (to, from)
        return Cost(0, read)
    if function in _AT_PLACES:
        return Cost(0, _bytes_at_places(function, args, result))
    raise NotImplementedError(f"{function}: say what it moves")


def _bytes_at_places(function, args, result) -> float:
    if function in (_aten.index, _aten.index_select):
        return _scattered(result, args[0]) + _bytes(result)
    source = args[2] if function == _aten.index_put_ else args[3]
    moves = 1 if function == _aten.index_put_ else 2
    return moves * _scattered(source, args[0]) + _bytes(source)


def _scattered(elements: torch.Tensor, matrix: torch.Tensor) -> float:
    """Bytes of the sectors of a matrix that hold these elements, if no two share one."""
    return min(elements.numel() * SECTOR, _bytes(matrix))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
