"""LoRA by library GEMMs alone, without dropout and in one dtype: one call of csrc/gpu/library_ops.cpp a pass.

A call from Python takes the host longer than a launch, and the host is what limits a small step. The ops lie in the
binary of the C++ kernels, which takes no CUDA compiler. Where it was not built, a backend makes the same GEMMs itself.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rosa_kernels.backends.cpu import binary
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.cost_model import LinearCall
from rosa_kernels.backends.gpu.sizes import check_sizes

_ops = torch.ops.rosa_kernels_gpu


@functools.cache
def serves(device_type: str) -> bool:
    """Whether the ops are built, and PyTorch has the functions that they call for this device."""
    return binary.has_library_ops() and (device_type == "cpu" or _ops.serves_cuda())


def lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, keep_H: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, H, or None where it is not kept)."""
    try:
        return _lora(x, weight, bias, lora_A, lora_B, scaling, keep_H)
    except RuntimeError as error:
        raise as_pytorch_raises(error) from None


def lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, lora_A: Tensor, lora_B: Tensor, H: Tensor | None, scaling: float,
    needs: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dA, dB); bits 0, 1 and 2 of needs say which."""
    try:
        return _lora_backward(dy, x, weight, lora_A, lora_B, H, scaling, needs)
    except RuntimeError as error:
        raise as_pytorch_raises(error) from None


LORA_OPS = None
"""lora and lora_backward, where they are built."""
if binary.has_library_ops():
    _lora, _lora_backward = _ops.lora.default, _ops.lora_backward.default
    LORA_OPS = lora, lora_backward


def as_pytorch_raises(error: RuntimeError) -> RuntimeError:
    """An error of the C shim, which knows one type alone, in the type that programs look for."""
    if "out of memory" in str(error) and not isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(str(error))
    return error


def forward_by_library(choose: Callable, x: Tensor, lora_A: Tensor, lora_B: Tensor, keeps_H: bool) -> bool:
    """Whether `choose`, a heuristics' choose_linear, names library GEMMs for y, and they are at hand."""
    return _is_cheapest(
        choose, x.dtype, lora_A.dtype, lora_B.dtype, x.shape, lora_B.shape[0], lora_A.shape[0], _tf32(x), False,
        keeps_H, x.device,
    )  # fmt: skip


def step_by_library(choose: Callable, by_library: Callable, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """The same for y, dx, dA and dB at once. by_library is a heuristics' low_rank_gradients_by_library."""
    return _step_is_cheapest(
        choose, by_library, x.dtype, lora_A.dtype, lora_B.dtype, x.shape, lora_B.shape[0], lora_A.shape[0], _tf32(x),
        x.device,
    )  # fmt: skip


@device_rates.forgotten_with_tables
@functools.lru_cache(maxsize=4096)
def _step_is_cheapest(
    choose, by_library, dtype, A_dtype, B_dtype, x_shape, out_features, r, tf32, device
) -> bool:  # fmt: skip
    *leading, in_features = x_shape
    dtypes = dtype, A_dtype, B_dtype
    rates = device_rates.rates(device, hardware.architecture(device))
    return (
        _is_cheapest(choose, *dtypes, x_shape, out_features, r, tf32, False, True, device)
        and _is_cheapest(choose, *dtypes, (*leading, out_features), in_features, r, tf32, True, False, device)
        and by_library(math.prod(leading), out_features, dtype.itemsize, rates)
    )


@device_rates.forgotten_with_tables
@functools.lru_cache(maxsize=4096)
def _is_cheapest(
    choose, dtype, A_dtype, B_dtype, x_shape, out_features, r, tf32, H_known, keeps_H, device
) -> bool:  # fmt: skip
    """By a count that many calls of one kind make once. `choose` is part of the kind."""
    if not (dtype == A_dtype == B_dtype and serves(device.type)):
        return False
    *leading, in_features = x_shape
    call = LinearCall(
        math.prod(leading), out_features, in_features, r, element_size=dtype.itemsize, tf32=tf32, H_known=H_known,
        fp16=dtype == torch.float16, keeps_H=keeps_H,
    )  # fmt: skip
    check_sizes(call.T, in_features, out_features, r)
    algorithm = choose(call, device_rates.rates(device, hardware.architecture(device)))
    return (algorithm.base, algorithm.low_rank) == ("library", "library")


def _tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and hardware.precision(x) == "tf32"
