"""The ops of the CUDA backend. Each chooses its algorithms here, and runs in one call of csrc/cuda/composed_ops.cpp."""

import torch

from rosa_kernels.backends.cuda import heuristics
from rosa_kernels.backends.gpu import device_rates, hardware, library_ops
from rosa_kernels.backends.gpu.calls import linear_call, sddmm_call
from rosa_kernels.backends.gpu.cost_model import LinearCall
from rosa_kernels.backends.gpu.sizes import check_sizes
from rosa_kernels.backends.shapes import tokens_of
from rosa_kernels.dropout import drop_threshold, keep_scale
from rosa_kernels.pattern import transposed_structure

KEEPS_H = True
LORA_OPS = library_ops.lora_ops()
_CHECKED = True
"""indices_checked of the ops that go by a pattern's indices: they were checked when the pattern was made."""
_kernels = torch.ops.rosa_kernels_cuda


def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    y, _ = _linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, False)
    return y


def rosa_linear_with_H(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    return _linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, True)


def spmm(x, values, crow, col, structure):
    y, _ = _linear(x, None, None, None, None, 1.0, values, crow, col, structure, 0.0, None, False)
    return y


def _linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, keep_H):
    lora = values is seed is None and weight is not None
    if lora and library_ops.forward_by_library(heuristics.choose_linear, x, lora_A, lora_B, keep_H):
        return LORA_OPS[0](x, weight, bias, lora_A, lora_B, scaling, keep_H)
    out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
    drop_at = "" if seed is None else "x"
    call = linear_call(
        x, tokens_of(x), out_features, x.shape[-1], weight, lora_A, lora_B, values, structure, drop_at, False, keep_H
    )
    return _kernels.linear.default(
        x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, seed, *_dropout(dropout_p, seed),
        *_linear_algorithm(call, x), keep_H, hardware.multiprocessors(x.device), _CHECKED,
    )  # fmt: skip


def lora_step_by_library(x, lora_A, lora_B) -> bool:
    """Whether LORA_OPS serve y and all gradients of W and b frozen, as the cheapest way."""
    by_library = heuristics.low_rank_gradients_by_library
    return library_ops.step_by_library(heuristics.choose_linear, by_library, x, lora_A, lora_B)


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    need_dx, _, _, need_dA, _, need_dvalues = needs
    tokens, in_features, out_features = tokens_of(x), x.shape[-1], dy.shape[-1]
    algorithm, sddmm_algorithm = (0, 0, 0), 0
    if need_dx:
        drop_at = "" if seed is None else "out"
        call = linear_call(
            dy, tokens, in_features, out_features, weight, lora_A, lora_B, values, transposed_structure(structure),
            drop_at, need_dA,
        )  # fmt: skip
        algorithm = _linear_algorithm(call, x)
    if need_dvalues:
        sddmm_algorithm = _sddmm_algorithm(x, tokens, out_features, in_features, col, structure, values.dtype)
    gradients = _kernels.linear_backward.default(
        dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, seed,
        *_dropout(dropout_p, seed), H, sum(need << bit for bit, need in enumerate(needs)), *algorithm, sddmm_algorithm,
        hardware.multiprocessors(x.device), _CHECKED,
    )  # fmt: skip
    return list(gradients)


def sddmm(dy, x, crow, col, structure):
    algorithm = _sddmm_algorithm(x, tokens_of(x), dy.shape[-1], x.shape[-1], col, structure, x.dtype)
    return _kernels.whole_sddmm.default(
        dy, x, crow, col, structure, algorithm, hardware.multiprocessors(x.device), _CHECKED
    )


def csr_add(weight, values, crow, col):
    check_sizes(0, weight.shape[1], weight.shape[0])
    return _kernels.csr_add.default(weight, values, crow, col, _CHECKED)


def _linear_algorithm(call: LinearCall, x: torch.Tensor) -> tuple[int, int, int]:
    """The numbers of csrc/cuda/linear.h for the cheapest algorithm."""
    check_sizes(call.T, call.in_features, call.out_features, call.r)
    algorithm = heuristics.choose_linear(call, device_rates.rates(x.device, hardware.architecture(x.device)))
    return _BASES[algorithm.base], _LOW_RANKS[algorithm.low_rank], _SPARSES[algorithm.sparse]


def _sddmm_algorithm(x, tokens, out_features, in_features, col, structure, dtype) -> int:
    """The number of csrc/cuda/gradients.h for the cheapest algorithm."""
    check_sizes(tokens, in_features, out_features)
    call = sddmm_call(x, tokens, out_features, in_features, col.shape[0], structure, dtype)
    rates = device_rates.rates(x.device, hardware.architecture(x.device))
    return _SDDMMS[heuristics.choose_sddmm(call, rates)]


_BASES = {"": 0, "library": 1, "merged": 2}
_LOW_RANKS = {"": 0, "kernel": 1, "library": 2, "delta": 3}
_SPARSES = {"": 0, "shared": 1, "global": 2, "delta": 3, "rows": 4, "columns": 5}
_SDDMMS = {"packed": 0, "library": 1, "entries_transposed": 2}
"""As the enums of csrc/cuda/linear.h and csrc/cuda/gradients.h count."""


def _dropout(dropout_p, seed) -> tuple[int, float]:
    """(threshold, scale) as the kernels take them."""
    return (0, 1.0) if seed is None else (drop_threshold(dropout_p), keep_scale(dropout_p))
