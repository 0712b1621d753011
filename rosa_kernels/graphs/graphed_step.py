"""rk.graphed: a training step that is recorded once and replayed from then on, without Python between its kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rosa_kernels.graphs.gradients import Gradients
from rosa_kernels.graphs.participants import Participants
from rosa_kernels.graphs.recorder import Recorder
from rosa_kernels.graphs.snapshot import Snapshot

WARM_UPS = 3
"""They compile kernels and make the optimizer's state, neither of which may happen while a graph is recorded."""


def graphed(step: Callable[..., Any], *example_inputs: Tensor) -> "GraphedStep":
    """A training step as one CUDA graph: forward, loss, backward and optimizer in one launch.

    The first three calls of the result run step as it is. The fourth records it, and that call and all later ones
    replay the recording: the same kernels on the same addresses, with the same Python numbers. So of step only the
    numbers in its tensors may change between calls. Inputs are copied into tensors of the graph's own. Parameters,
    gradients, optimizer state and PyTorch's random generator move on as in step itself: each replay draws its dropout
    masks anew, and with the same seed they are those of eager calls.

    What a replay would get wrong is refused in words, where it can be seen: an optimizer that is not capturable, a
    step that waits for the GPU (``loss.item()``), and after the recording another pattern (select_masks), learning
    rate, parameter, mode or gradient tensor. Make the learning rate a tensor on the GPU, and a scheduler outside
    step acts on replays. A tensor that step reads from elsewhere must stay where it is, and what Python decides in step
    (its own random numbers, counters, branches) stays as it was recorded.

    Args:
        step: step(*inputs) trains once and returns tensors, such as the loss: one, none, or a tuple, list or dict of
            them. torch.autocast and zero_grad() belong inside.
        example_inputs: tensors on one CUDA or ROCm device, with the shapes and dtypes of all later inputs. Their
            numbers are not used.

    Returns:
        A callable that takes inputs like the examples, on any device, and returns what step returns, in tensors of
        their own without gradients. Where one raises a RuntimeError because something has changed, call graphed again.

    Raises:
        TypeError: step is not callable, returns something else, or an input is no plain tensor.
        ValueError: an input does not fit, there is no such GPU, or step contains what cannot be recorded. The latter
            is known after its first call.
        RuntimeError: step waits for the GPU, or something has changed since it was recorded.
    """
    return GraphedStep(step, example_inputs)


class GraphedStep:
    """What graphed returns. Attribute ``replays``: how many of its calls were replays."""

    def __init__(self, step: Callable[..., Any], example_inputs: tuple[Tensor, ...]):
        if not callable(step):
            raise TypeError(f"step: expected a callable, got {type(step).__name__}")
        for number, example in enumerate(example_inputs):
            _check_plain_tensor(f"example_inputs[{number}]", example)
        self._step = step
        self._device = example_inputs[0].device if example_inputs else torch.device("cuda")
        reason = Recorder.refusal(self._device)
        if reason is not None:
            raise ValueError(f"example_inputs: {reason}; call step itself there")
        if self._device.index is None and self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        for number, example in enumerate(example_inputs):
            if example.device != self._device:
                raise ValueError(f"example_inputs[{number}]: expected on {self._device}, got {example.device}")
        self._inputs = [example.detach().clone() for example in example_inputs]
        self._recorder = Recorder(self._device)
        self._participants = Participants(self._device)
        self._warm_ups = 0
        self._recorded = False
        self.replays = 0

    def __call__(self, *inputs: Tensor) -> Any:
        self._check_inputs(inputs)
        if self._warm_ups:
            self._check_unchanged()
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs):
                own.copy_(given)
        if self._warm_ups < WARM_UPS:
            return self._warm_up()
        if not self._recorded:
            self._record()
        return self._replay()

    def _check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._inputs):
            raise ValueError(f"inputs: expected {len(self._inputs)} as the examples, got {len(inputs)}")
        for number, (own, given) in enumerate(zip(self._inputs, inputs)):
            _check_plain_tensor(f"inputs[{number}]", given)
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(
                    f"inputs[{number}]: expected {own.dtype} of shape {tuple(own.shape)} as the example, got "
                    f"{given.dtype} of shape {tuple(given.shape)}; pad it, call step itself, or make a graph for it"
                )

    def _warm_up(self) -> Any:
        """One of the first calls: step runs, and what cannot be recorded is found out before a capture fails on it."""
        first, last = self._warm_ups == 0, self._warm_ups == WARM_UPS - 1
        generator_before = self._recorder.generator_state()
        with self._recorder.aside():
            if first:
                with self._participants.noticing():
                    results = self._step(*self._inputs)
                self._participants.check_recordable()
                self._gradients = Gradients(self._participants.trainable_parameters())
            else:
                with self._gradients.observing():
                    results = self._run_without_waiting() if last else self._step(*self._inputs)
        self._draws = not torch.equal(generator_before, self._recorder.generator_state())
        self._warm_ups += 1
        self._snapshot = Snapshot(self._participants.places(), self._participants.containers(), self._device.type)
        return _each(_own, results)

    def _run_without_waiting(self) -> Any:
        with self._recorder.refusing_to_wait():
            try:
                return self._step(*self._inputs)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                raise RuntimeError(
                    f"step: it waits for the GPU, which a CUDA graph cannot record; return tensors and read them "
                    f"outside ({error})"
                ) from error

    def _record(self) -> None:
        self._participants.check_recordable()
        written = self._written_settings()

        def call() -> None:
            self._results = _each(Tensor.detach, self._step(*self._inputs))

        try:
            with self._gradients.observing():
                self._recorder.record(call)
            self._check_recorded(written)
        except BaseException:
            self._gradients.restore()
            raise
        self._recorded = True
        self._checked_draws = False

    def _written_settings(self) -> dict[str, int]:
        """How often each of the optimizers' settings that is a tensor, such as a learning rate, has been written to."""
        places = self._participants.optimizer_settings()
        tensors = {f"{place.owner}.{place.name}": place.container[place.key] for place in places}
        return {name: value._version for name, value in tensors.items() if isinstance(value, Tensor)}

    def _check_recorded(self, written: dict[str, int]) -> None:
        """Raises ValueError where step changes something that a replay, which runs no Python, would leave as it is."""
        changed = self._snapshot.difference()
        if changed is not None:
            raise ValueError(f"step: it changes what a replay would leave as it is: {changed}")
        for name, count in self._written_settings().items():
            if count != written[name]:
                raise ValueError(
                    f"step: it writes {name}, and each replay would write the same number; do so outside step"
                )

    def _check_unchanged(self) -> None:
        changed = self._snapshot.difference()
        if changed is not None:
            raise RuntimeError(
                f"graphed: since the call before, {changed}. A replay would go on with the old one. Call rk.graphed "
                "again after such a change; a learning rate may be a tensor on the GPU, which schedulers then fill"
            )
        if self._recorded:
            self._gradients.check()

    def _replay(self) -> Any:
        before = None if self._checked_draws else self._recorder.generator_state()
        self._recorder.replay()
        self.replays += 1
        self._gradients.publish()
        if before is not None:
            if self._draws and torch.equal(before, self._recorder.generator_state()):
                raise RuntimeError(
                    "graphed: each replay draws the same random numbers; this PyTorch cannot record them"
                )
            self._checked_draws = True
        return _each(_own, self._results)


def _check_plain_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}; step can hold other values itself")
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a plain dense tensor, got {type(value).__name__} of {value.layout}")
    if value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient; it would stay inside the graph")


def _own(result: Tensor) -> Tensor:
    """A copy, because the next replay writes its results to the same addresses."""
    return result.detach().clone()


def _each(function: Callable[[Tensor], Tensor], results: Any) -> Any:
    """function of every tensor in what a step returns, in the same tuples, lists and dicts."""
    if results is None:
        return None
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, dict):
        return {name: _each(function, result) for name, result in results.items()}
    if isinstance(results, (tuple, list)):
        parts = [_each(function, result) for result in results]
        return type(results)(*parts) if hasattr(results, "_fields") else type(results)(parts)
    raise TypeError(
        f"step: expected to return tensors, got {type(results).__name__}, which each replay would leave as it is"
    )
