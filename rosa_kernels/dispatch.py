"""Which backend serves a call, and why the others do not."""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from rosa_kernels.backends import cpu, cuda, reference, triton

BACKENDS = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}
"""Their order is the one in which "auto" asks them; reference, the last, serves everything."""

_ENVIRONMENT = "ROSA_KERNELS_BACKEND"


def _checked_name(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    return name


_chosen = _checked_name(os.environ.get(_ENVIRONMENT, "auto"), _ENVIRONMENT)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` on a backend: "reference", "cpu", "triton", "cuda" or "auto".

    "auto", the default, takes the first of cpu, triton, cuda and reference that serves x's device and dtype. A backend
    asked for by name never hands a call on: where it cannot serve one, that call raises RuntimeError with the reason.
    The choice holds for the whole process, other threads and the backward included. Outside any ``with`` it is that of
    the environment variable ROSA_KERNELS_BACKEND.

    Raises:
        ValueError: the name is unknown.
    """
    global _chosen
    before, _chosen = _chosen, _checked_name(name, "use_backend")
    try:
        yield
    finally:
        _chosen = before


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can run on this machine, else with the reason why not."""
    return {name: module.unavailable_reason() for name, module in BACKENDS.items()}


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the backend serves tensors of this device and dtype, else the reason why not."""
    module = BACKENDS[name]
    return module.unavailable_reason() or module.refusal(device, dtype)


def automatic_choice(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that "auto" gives tensors of this device and dtype: the first that serves them natively."""
    for name in BACKENDS:
        interpreted = name == "triton" and device.type == "cpu"
        if refusal(name, device, dtype) is None and not interpreted:
            return name
    raise AssertionError("reference serves everything")


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The backend module that serves ops on this tensor (x, dy or weight: they share device and dtype)."""
    key = _chosen, tensor.device, tensor.dtype
    module = _served.get(key)
    if module is None:
        module = _served[key] = _find_backend(tensor.device, tensor.dtype)
    return module


_served: dict[tuple[str, torch.device, torch.dtype], ModuleType] = {}


def _find_backend(device: torch.device, dtype: torch.dtype) -> ModuleType:
    if _chosen == "auto":
        return BACKENDS[automatic_choice(device, dtype)]
    reason = refusal(_chosen, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {_chosen!r} was asked for and cannot serve {dtype} on {device}: {reason}")
    return BACKENDS[_chosen]
