"""Two timers for races on a GPU. Both read CUDA events, whose names serve ROCm as well.

eager     Several calls run in a row between two events. The figure is the larger of the GPU's time and of what Python
          and the launches take, as a user meets it. L2 stays as the calls leave it: a flush before each call would give
          the CPU time to run ahead, and would hide the overhead that this mode is there to show.
graphed   Each call replays a CUDA graph of the whole step between its own two events, which gives the GPU's time alone.
          L2 is flushed before each replay, outside of its events: in a model other layers run in between, and the
          weights come from memory.
"""

from collections.abc import Callable

import torch

from interleaved import WallClock

_FLUSHED_BYTES = 512 * 2**20
"""Twice the largest last-level cache of a GPU today (the 256 MiB of an MI300X; an H100 has 50 MiB)."""
_WARM_UP_CALLS = 3
_RACE_SECONDS = 0.25
"""One race times calls for so long. With all shapes there are some 270 races."""


class Eager:
    race_seconds = _RACE_SECONDS
    min_sample_seconds = 2e-3
    l2 = "as the calls leave it"

    def prepare(self, function: Callable) -> Callable:
        """Returns what the race calls in place of the function."""
        return function

    def __call__(self, function: Callable, calls: int) -> float:
        start, end = _event(), _event()
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


class Graphed:
    race_seconds = _RACE_SECONDS
    min_sample_seconds = 2e-4  # each call has its own events
    l2 = "flushed before each call"

    def __init__(self, device: str = "cuda"):
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def prepare(self, function: Callable) -> Callable:
        return captured(function)

    def __call__(self, function: Callable, calls: int) -> float:
        events = [(_event(), _event()) for _ in range(calls)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) * 1e-3


class DryRun(WallClock):
    """Stands in for either timer on a CPU, with few rounds of one call. Its figures mean nothing."""

    race_seconds = 0.0
    min_sample_seconds = 0.0
    l2 = "dry run"

    def prepare(self, function: Callable) -> Callable:
        return function


def captured(function: Callable) -> Callable:
    """Captures function() as one CUDA graph, and returns a function that replays it.

    Each replay writes and returns the same tensors. The function's inputs must stay where they are. It is called before
    the capture, on a stream of its own as PyTorch asks, because a capture may neither compile kernels nor choose
    workspaces.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()

    def replay(inputs=function):  # the graph does not keep the tensors alive that it reads
        graph.replay()
        return results

    return replay


MODES = {"eager": Eager, "graphed": Graphed}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
