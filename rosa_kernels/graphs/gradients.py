"""What happens to .grad in a recorded step: a replay writes the tensors that it was recorded with, and no others."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Gradients:
    """The .grad of each parameter before and after the latest observed call of a step.

    Where the step itself replaces a gradient, as zero_grad() does, what was there before a call does not matter. Else
    the step adds to it, and each replay needs what the recording had: the same tensor, or none.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters
        self._before: list[Tensor | None] = []
        self._after: list[Tensor | None] = []
        self._replaced: set[int] = set()
        self._used_before: set[int] = set()

    def _now(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters]

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """Around one call of the step, run or recorded.

        Raises:
            ValueError: the optimizer uses a gradient of the call before, and the step then replaces that.
        """
        self._before = self._now()
        before = {id(p): gradient for p, gradient in zip(self._parameters, self._before) if gradient is not None}

        def notice_use(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            parameters = (p for group in optimizer.param_groups for p in group["params"] if id(p) in before)
            self._used_before.update(id(p) for p in parameters if p.grad is before[id(p)])

        hook = register_optimizer_step_pre_hook(notice_use)
        try:
            yield
        finally:
            hook.remove()
        self._after = self._now()
        for parameter, old, new in zip(self._parameters, self._before, self._after):
            if old is not None and new is not None and new is not old:
                self._replaced.add(id(parameter))
        for parameter in self._parameters:
            if id(parameter) in self._used_before & self._replaced:
                raise ValueError(
                    f"step: the optimizer uses the gradient of the call before, of shape {tuple(parameter.shape)}, and "
                    "a new one then takes its place, which no replay would use; call zero_grad() before the backward"
                )

    def restore(self) -> None:
        """Put back what was there before the latest observed call."""
        for parameter, gradient in zip(self._parameters, self._before):
            parameter.grad = gradient

    def check(self) -> None:
        """Raises RuntimeError where a replay would add to another gradient than the one that is there."""
        for parameter, before in zip(self._parameters, self._before):
            if parameter.grad is not before and id(parameter) not in self._replaced:
                was = "was None" if before is None else "was another tensor"
                raise RuntimeError(
                    f"graphed: .grad of a parameter of shape {tuple(parameter.shape)} {was} when step was recorded, "
                    "and step adds to what is there; a replay cannot add to anything else. Call zero_grad() inside "
                    "step, or outside it always in the same way"
                )

    def publish(self) -> None:
        """Make what a replay has written the parameters' .grad, as the step itself does."""
        for parameter, gradient in zip(self._parameters, self._after):
            if parameter.grad is not gradient:
                parameter.grad = gradient
