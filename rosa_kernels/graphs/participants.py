"""The modules and optimizers that take part in a step, and the places where they keep what its kernels read."""

import contextlib
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from rosa_kernels.nn.layer import loaded_types
from rosa_kernels.pattern import CSRPattern

SETTINGS = frozenset((bool, int, float, str))
_WATCHED = SETTINGS | {CSRPattern}


class Place(NamedTuple):
    """``container[key]`` holds something that decides what a step computes."""

    owner: str
    name: str
    container: Any  # a dict or a list
    key: Any


class Participants:
    """The modules whose forward a step calls, with all that they contain, and the optimizers that it steps."""

    def __init__(self, device: torch.device):
        self._device = device
        self._modules: dict[int, tuple[str, nn.Module]] = {}
        self._optimizers: dict[int, Optimizer] = {}

    @contextlib.contextmanager
    def noticing(self) -> Iterator[None]:
        """Notice who takes part in what this thread runs inside the ``with``."""
        thread = threading.get_ident()

        def notice_module(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling():  # the compiled module has been noticed, with all that it contains
                return
            if threading.get_ident() == thread and id(module) not in self._modules:
                root = type(module).__name__
                for name, part in module.named_modules():  # an outer module comes first and names its parts
                    self._modules.setdefault(id(part), (f"{root}.{name}" if name else root, part))

        def notice_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == thread:
                self._optimizers[id(optimizer)] = optimizer

        hooks = register_module_forward_pre_hook(notice_module), register_optimizer_step_pre_hook(notice_optimizer)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def trainable_parameters(self) -> list[nn.Parameter]:
        of_modules = (p for _, module in self._modules.values() for p in module._parameters.values() if p is not None)
        of_optimizers = (p for o in self._optimizers.values() for group in o.param_groups for p in group["params"])
        return list({id(p): p for p in chain(of_modules, of_optimizers) if p.requires_grad}.values())

    def check_recordable(self) -> None:
        """Raises ValueError where a replay would compute something else than the step does."""
        if torch.is_autocast_enabled(self._device.type) and torch.is_autocast_cache_enabled():
            raise ValueError("graphed: autocast around a graph keeps old copies of the weights; put it inside step")
        kinds = loaded_types("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel")
        kinds += (nn.parallel.DistributedDataParallel,)
        for name, module in self._modules.values():
            if isinstance(module, kinds):
                raise ValueError(f"step: {name} is wrapped in DDP or FSDP, whose communication graphed does not record")
        for optimizer in self._optimizers.values():
            if any(group.get("capturable") is False for group in optimizer.param_groups):
                raise ValueError(
                    f"step: {type(optimizer).__name__} counts its steps where a graph does not see it; give it "
                    "capturable=True"
                )
        for place in self.places():
            value = place.container[place.key]
            if isinstance(value, Tensor) and value.device != self._device:
                raise ValueError(
                    f"step: {place.owner}.{place.name} lies on {value.device}, where a graph of {self._device} "
                    f"would read it once; move it to {self._device}"
                )

    def places(self) -> list[Place]:
        """Every parameter, buffer, submodule, pattern and setting of the modules, and all that the optimizers hold."""
        found = []
        for owner, module in self._modules.values():
            for container in (module._parameters, module._buffers, module._modules):
                found += [Place(owner, name, container, name) for name in container]
            attributes = module.__dict__
            watched = [name for name, value in attributes.items() if type(value) in _WATCHED]
            found += [Place(owner, name, attributes, name) for name in watched]
        found += self.optimizer_settings()
        for optimizer in self._optimizers.values():
            owner = type(optimizer).__name__
            found += [Place(owner, name, vars(optimizer), name) for name in ("state", "param_groups")]
            found += [Place(owner, f"state[{n}]", optimizer.state, p) for n, p in enumerate(optimizer.state)]
            for number, group in enumerate(optimizer.param_groups):
                found.append(Place(owner, f"param_groups[{number}]", optimizer.param_groups, number))
                found += [Place(owner, f"params[{n}]", group["params"], n) for n in range(len(group["params"]))]
            for state in optimizer.state.values():
                found += [Place(owner, f"state[...][{name!r}]", state, name) for name in state]
        return found

    def containers(self) -> list[tuple[str, Any]]:
        """(owner, dict or list) of all that hold such places, empty ones too, and must not get new ones.

        A module's attributes are not among them: what was not there has decided nothing.
        """
        found: list[tuple[str, Any]] = []
        for owner, module in self._modules.values():
            found += [(owner, module._parameters), (owner, module._buffers), (owner, module._modules)]
        for optimizer in self._optimizers.values():
            owner = type(optimizer).__name__
            found += [(f"{owner}.state", optimizer.state), (f"{owner}.param_groups", optimizer.param_groups)]
            found += [(f"{owner}.param_groups", group["params"]) for group in optimizer.param_groups]
            found += [(f"{owner}.state[...]", state) for state in optimizer.state.values()]
        return found

    def optimizer_settings(self) -> list[Place]:
        return [
            Place(f"{type(optimizer).__name__}.param_groups[{number}]", name, group, name)
            for optimizer in self._optimizers.values()
            for number, group in enumerate(optimizer.param_groups)
            for name in group
        ]
