"""CUDA's part in a graph: a stream for the warm-up, the capture, the replay. ROCm has the same names.

A test on a CPU puts a stand-in with the same methods in this class's place.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Recorder:
    """One CUDA graph on one device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        """None where calls on this device can be recorded, else the reason why not."""
        if device.type != "cuda":
            return f"a CUDA graph records the work of a CUDA or ROCm GPU, and {device} is none"
        if not torch.cuda.is_available():
            return "a CUDA graph needs a CUDA or ROCm GPU, and PyTorch finds none here"
        return None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run on the stream of the capture: after what the current stream has got, and before what it gets next.

        PyTorch asks for it, as autograd and cuBLAS keep what belongs to the stream of their first call.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextlib.contextmanager
    def refusing_to_wait(self) -> Iterator[None]:
        """Turn every call that waits for the GPU into a RuntimeError, before a capture fails on it.

        A failed capture spoils the process and says little, while this names the line.
        """
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def record(self, call: Callable[[], object]) -> None:
        """Record what the call does on the GPU, without doing it."""
        # The threads of a DataLoader or of NCCL may go on allocating and polling meanwhile.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            call()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()

    def generator_state(self) -> Tensor:
        """Where PyTorch's random generator of the device is in its sequence; nothing waits for the GPU."""
        return torch.cuda.get_rng_state(self._device)
