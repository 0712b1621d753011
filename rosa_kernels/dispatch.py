"""Which backend serves a call, and why the others do not."""

import contextlib
import contextvars
import os
import threading
from collections.abc import Iterator
from types import ModuleType

import torch

from rosa_kernels.backends import cpu, cuda, reference, triton

BACKENDS = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}
"""Their order is the one in which "auto" asks them, but for small calls; reference, the last, serves everything."""

_ENVIRONMENT = "ROSA_KERNELS_BACKEND"


def _checked_name(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(('auto', *BACKENDS))}, got {name!r}")
    return name


_default = _checked_name(os.environ.get(_ENVIRONMENT, "auto"), _ENVIRONMENT)
choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("rosa_kernels_backend", default=None)
"""The name that the innermost use_backend of this thread or task gave, None outside any."""
_open_blocks: list[tuple[object, str]] = []
"""All use_backend blocks that are open in this process, the latest last: each with the name that it gave."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` on a backend: "reference", "cpu", "triton", "cuda" or "auto".

    "auto", the default, takes the first of cpu, triton, cuda and reference that serves x's device and dtype. It takes
    cuda before triton where a call is so small that the host limits it: by x's size, never by timing. A backend
    asked for by name never hands a call on: where it cannot serve one, that call raises RuntimeError with the reason.
    The choice holds for this thread, or this asyncio task, and for the backward of what runs here. Outside any ``with``
    it is that of the environment variable ROSA_KERNELS_BACKEND. torch.compile ends its graph at a ``with`` that is
    inside the function; around the function it ends nothing. A ``with`` around the ``yield`` of a generator holds for
    whoever runs the generator, as every context variable.

    Raises:
        ValueError: the name is unknown.
    """
    token = choice.set(_checked_name(name, "use_backend"))
    block = object(), name
    _open_blocks.append(block)
    try:
        yield
    finally:
        _open_blocks.remove(block)
        choice.reset(token)


def chosen() -> str:
    """The name of the backend that use_backend or the environment variable asks for, or "auto"."""
    return choice.get() or (_default if not _open_blocks else _chosen_in_this_thread())


def _chosen_in_this_thread() -> str:
    """What holds in a thread without a choice of its own, while some thread has one.

    PyTorch's own threads, which run the backward of GPU tensors, have no context. A compiled backward and
    a checkpointed forward that run there take the block that was opened last.
    """
    latest = _open_blocks[-1:]
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return latest[0][1] if latest and foreign else _default


def available_backends() -> dict[str, str | None]:
    """Each backend's name with None where it can run on this machine, else with the reason why not."""
    return {name: module.unavailable_reason() for name, module in BACKENDS.items()}


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the backend serves tensors of this device and dtype, else the reason why not."""
    module = BACKENDS[name]
    return module.unavailable_reason() or module.refusal(device, dtype)


def automatic_choice(device: torch.device, dtype: torch.dtype, host_bound: bool = False) -> str:
    """The backend that "auto" gives tensors of this device and dtype: the first that serves them natively.

    host_bound: cuda is asked before triton, as a call is so small that the host limits it.
    """
    for name in ("cuda", *BACKENDS) if host_bound else BACKENDS:
        interpreted = name == "triton" and device.type == "cpu"
        if refusal(name, device, dtype) is None and not interpreted:
            return name
    raise AssertionError("reference serves everything")


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The backend module that serves ops on this tensor (x, dy or weight: they share device and dtype)."""
    # This is chosen(), written out, because every eager call comes here.
    name = choice.get() or (_default if not _open_blocks else _chosen_in_this_thread())
    key = name, tensor.device, tensor.dtype, tensor.is_cuda and is_host_bound(tensor)
    module = _served.get(key)
    if module is None:
        module = _served[key] = _find_backend(*key)
    return module


HOST_BOUND_PRODUCTS = 2**32
"""Multiply-adds of x by a square weight, below which the host takes longer to launch a step of Triton's kernels than a
GPU to compute it: 12 us of a GEMM on an H100 against 80 us and more of its host (bench/tools/gpu_host_time.py)."""


def is_host_bound(tensor: torch.Tensor) -> bool:
    """Whether a call with this x (..., features) is limited by the host. csrc/cuda takes fewer calls from Python."""
    features = tensor.shape[-1] if tensor.dim() else 1
    return tensor.numel() * features < HOST_BOUND_PRODUCTS


_served: dict[tuple[str, torch.device, torch.dtype, bool], ModuleType] = {}


def _find_backend(name: str, device: torch.device, dtype: torch.dtype, host_bound: bool) -> ModuleType:
    if name == "auto":
        return BACKENDS[automatic_choice(device, dtype, host_bound)]
    reason = refusal(name, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot serve {dtype} on {device}: {reason}")
    return BACKENDS[name]
