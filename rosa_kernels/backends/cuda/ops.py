"""The ops of the CUDA backend. Each chooses its algorithms here, and runs in one call of csrc/cuda/composed_ops.cpp."""

import functools
import math

import torch

from rosa_kernels.backends.cuda import heuristics
from rosa_kernels.backends.gpu import device_rates, hardware, library_ops
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall
from rosa_kernels.backends.gpu.linear_ops import linear_ops
from rosa_kernels.backends.gpu.sizes import check_sizes
from rosa_kernels.dropout import drop_threshold, keep_scale
from rosa_kernels.pattern import transposed_structure

KEEPS_H = True
LORA_OPS = library_ops.LORA_OPS
_CHECKED = True
"""indices_checked of the ops that go by a pattern's indices: they were checked when the pattern was made."""
_kernels = torch.ops.rosa_kernels_cuda


def _linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, keep_H):
    lora = values is seed is None and weight is not None
    if lora and library_ops.forward_by_library(heuristics.choose_linear, x, lora_A, lora_B, keep_H):
        return LORA_OPS[0](x, weight, bias, lora_A, lora_B, scaling, keep_H)
    out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
    algorithm = _linear_algorithm(
        heuristics.choose_linear, x.dtype, x.shape, out_features, weight is not None,
        *_adapters(lora_A, lora_B, values), structure, "" if seed is None else "x", False, keep_H, _tf32(x), x.device,
    )  # fmt: skip
    return _run(
        _kernels.linear, x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, seed,
        *_dropout(dropout_p, seed), *algorithm, keep_H, hardware.multiprocessors(x.device), _CHECKED,
    )  # fmt: skip


rosa_linear, rosa_linear_with_H, spmm, lora_step_by_library = linear_ops(_linear, heuristics)


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    algorithm, sddmm_algorithm = (0, 0, 0), 0
    if need_dx:
        algorithm = _linear_algorithm(
            heuristics.choose_linear, x.dtype, dy.shape, x.shape[-1], weight is not None,
            *_adapters(lora_A, lora_B, values), transposed_structure(structure), "" if seed is None else "out", need_dA,
            False, _tf32(x), x.device,
        )  # fmt: skip
    if need_dvalues:
        sddmm_algorithm = _sddmm_algorithm(
            heuristics.choose_sddmm, x.dtype, x.shape, dy.shape[-1], values.shape[0], structure, values.dtype, _tf32(x),
            x.device,
        )  # fmt: skip
    wanted = need_dx + 2 * need_dweight + 4 * need_dbias + 8 * need_dA + 16 * need_dB + 32 * need_dvalues
    gradients = _run(
        _kernels.linear_backward, dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation,
        structure, seed, *_dropout(dropout_p, seed), H, wanted, *algorithm, sddmm_algorithm,
        hardware.multiprocessors(x.device), _CHECKED,
    )  # fmt: skip
    return list(gradients)


def sddmm(dy, x, crow, col, structure):
    algorithm = _sddmm_algorithm(
        heuristics.choose_sddmm, x.dtype, x.shape, dy.shape[-1], col.shape[0], structure, x.dtype, _tf32(x), x.device
    )
    return _run(
        _kernels.whole_sddmm, dy, x, crow, col, structure, algorithm, hardware.multiprocessors(x.device), _CHECKED
    )


def csr_add(weight, values, crow, col):
    check_sizes(0, weight.shape[1], weight.shape[0])
    return _run(_kernels.csr_add, weight, values, crow, col, _CHECKED)


def _run(op, *args):
    try:
        return op.default(*args)
    except RuntimeError as error:
        raise library_ops.as_pytorch_raises(error) from None


def _adapters(lora_A, lora_B, values) -> tuple:
    """What an algorithm depends on of these: A's shape, and dtypes; S's number of entries."""
    of_A, dtype_of_B = (None, None), None
    if lora_A is not None:
        of_A, dtype_of_B = (lora_A.shape[0], lora_A.dtype), lora_B.dtype
    of_S = (0, None) if values is None else (values.shape[0], values.dtype)
    return *of_A, dtype_of_B, *of_S


def _tf32(x) -> bool:
    return x.dtype == torch.float32 and hardware.precision(x) == "tf32"


@device_rates.forgotten_with_tables
@functools.lru_cache(maxsize=4096)
def _linear_algorithm(
    choose, dtype, x_shape, out_features, has_weight, r, A_dtype, B_dtype, nnz, values_dtype, structure, dropout,
    H_known, keeps_H, tf32, device,
) -> tuple[int, int, int]:  # fmt: skip
    """The numbers of csrc/cuda/linear.h for the cheapest algorithm, counted once for many calls of a kind.

    `choose` is heuristics.choose_linear, as a part of the kind.
    """
    *leading, in_features = x_shape
    check_sizes(math.prod(leading), in_features, out_features, r or 0)
    call = LinearCall(
        math.prod(leading), out_features, in_features, r or 0, nnz, structure if nnz else 0, dtype.itemsize, tf32,
        has_weight, dropout if r else "", r is not None and not A_dtype == B_dtype == dtype,
        nnz > 0 and values_dtype != dtype, H_known and r is not None, dtype == torch.float16, keeps_H,
    )  # fmt: skip
    algorithm = choose(call, device_rates.rates(device, hardware.architecture(device)))
    return _BASES[algorithm.base], _LOW_RANKS[algorithm.low_rank], _SPARSES[algorithm.sparse]


@device_rates.forgotten_with_tables
@functools.lru_cache(maxsize=4096)
def _sddmm_algorithm(
    choose, dtype, x_shape, out_features, nnz, structure, values_dtype, tf32, device
) -> int:  # fmt: skip
    """The number of csrc/cuda/gradients.h for the cheapest algorithm. `choose` is heuristics.choose_sddmm."""
    *leading, in_features = x_shape
    check_sizes(math.prod(leading), in_features, out_features)
    call = SDDMMCall(
        math.prod(leading), out_features, in_features, nnz, structure, dtype.itemsize, tf32, values_dtype != dtype
    )
    return _SDDMMS[choose(call, device_rates.rates(device, hardware.architecture(device)))]


_BASES = {"": 0, "library": 1, "merged": 2}
_LOW_RANKS = {"": 0, "kernel": 1, "library": 2, "delta": 3}
_SPARSES = {"": 0, "shared": 1, "global": 2, "delta": 3, "rows": 4, "columns": 5}
_SDDMMS = {"packed": 0, "library": 1, "entries_transposed": 2}
"""As the enums of csrc/cuda/linear.h and csrc/cuda/gradients.h count."""


def _dropout(dropout_p, seed) -> tuple[int, float]:
    """(threshold, scale) as the kernels take them."""
    return (0, 1.0) if seed is None else (drop_threshold(dropout_p), keep_scale(dropout_p))
