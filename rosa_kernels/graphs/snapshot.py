"""What a recording holds fast, and whether it is still so.

A CUDA graph repeats kernels with the addresses and numbers that they were launched with. So a replay reads the tensors
that were there when it was recorded, whatever Python has put in their place since.
"""

from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels import dispatch
from rosa_kernels.graphs.participants import SETTINGS, Place
from rosa_kernels.pattern import CSRPattern


class Snapshot:
    """What lies at these places now, and how many entries the containers have, which are (owner, dict or list).

    It keeps the tensors' memory, which a graph itself does not.
    """

    def __init__(self, places: list[Place], containers: list[tuple[str, Any]], device_type: str):
        self._places, self._device_type = places, device_type
        self._containers, self._keys = [place.container for place in places], [place.key for place in places]
        self._values: list[Any] = list(map(getitem, self._containers, self._keys))
        self._held = list(map(_held_fast, self._values))
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._addresses, self._require_grad = _addresses(self._tensors), _require_grad(self._tensors)
        self._growing = containers
        self._sizes = self._sizes_now()
        self._surroundings = _surroundings(device_type)

    def _sizes_now(self) -> list[int]:
        return [len(container) for _, container in self._growing]

    def difference(self) -> str | None:
        """The first thing that is no longer as it was, in words, or None. Every replay asks, so it takes few calls."""
        try:
            now = list(map(getitem, self._containers, self._keys))
        except (KeyError, IndexError):
            return self._missing()
        if (
            all(map(is_, now, self._values))
            and _addresses(self._tensors) == self._addresses
            and _require_grad(self._tensors) == self._require_grad
            and self._sizes_now() == self._sizes
            and _surroundings(self._device_type) == self._surroundings
        ):
            return None
        return self._first_difference(now)

    def _missing(self) -> str:
        for place in self._places:
            gone = place.key not in place.container if isinstance(place.container, dict) else None
            if gone or (gone is None and place.key >= len(place.container)):
                return f"{place.owner}.{place.name} is gone"
        raise AssertionError("every place is there")

    def _first_difference(self, values: list) -> str | None:
        for place, old, new, held in zip(self._places, self._values, values, self._held):
            if _held_fast(new) != held:
                plain = type(old) in SETTINGS and type(new) in SETTINGS
                how = f"was {old!r} and is {new!r}" if plain else "is another one or lies elsewhere"
                return f"{place.owner}.{place.name} {how}"
        for (owner, _), size, now in zip(self._growing, self._sizes, self._sizes_now()):
            if now != size:
                return f"{owner} has {now} entries and had {size}"
        surroundings = _surroundings(self._device_type)
        for name, before in self._surroundings.items():
            if surroundings[name] != before:
                return f"{name} was {before!r} and is {surroundings[name]!r}"
        return None  # equal numbers in other objects


def _held_fast(value: Any) -> object:
    """A tensor's address, which module or container it is, or the setting itself; None of what no kernel reads."""
    if type(value) in SETTINGS:
        return value
    if isinstance(value, Tensor):
        return _address(value), value.requires_grad
    if isinstance(value, tuple):
        return tuple(map(_held_fast, value))
    return id(value) if isinstance(value, (nn.Module, CSRPattern, dict, list)) else None


def _addresses(tensors: list[Tensor]) -> list:
    return [_address(tensor) if type(tensor) not in _PLAIN_TENSORS else tensor.data_ptr() for tensor in tensors]


def _require_grad(tensors: list[Tensor]) -> list[bool]:
    return [tensor.requires_grad for tensor in tensors]


_PLAIN_TENSORS = (Tensor, nn.Parameter)


def _address(tensor: Tensor) -> object:
    """Of a subclass that has no memory of its own, where the tensors inside it lie."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.data_ptr()
    inner, _ = tensor.__tensor_flatten__()
    return tuple(_address(getattr(tensor, name)) for name in inner)


def _surroundings(device_type: str) -> dict[str, object]:
    """The switches outside of modules and optimizers that a step obeys."""
    return {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.is_autocast_enabled()": torch.is_autocast_enabled(device_type),
        "torch.get_autocast_dtype()": torch.get_autocast_dtype(device_type),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.backends.cuda.matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "rk.use_backend": dispatch.chosen(),
    }
