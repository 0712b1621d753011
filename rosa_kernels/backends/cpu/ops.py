"""The ops by the C++ kernels of csrc/cpu, in fp32 and bf16, accumulated in fp32.

PyTorch's GEMMs compute the base layer's part where the kernels do not multiply by its weight too.
"""

import functools

import torch
import torch.nn.functional as F

from rosa_kernels.backends.cpu import base_gemm, heuristics
from rosa_kernels.backends.cpu.base_gemm import Delta
from rosa_kernels.backends.cpu.binary import INDICES_CHECKED, fast_bfloat16, instruction_set, uses_our_gemm
from rosa_kernels.backends.cpu.binary import kernels as _kernels
from rosa_kernels.backends.cpu.heuristics import Algorithm
from rosa_kernels.backends.lora_gemm import gradients_by_library
from rosa_kernels.backends.reference import H_of
from rosa_kernels.backends.shapes import as_matrix
from rosa_kernels.dropout import drop_threshold, keep_scale

LORA_OPS = None
KEEPS_H = False
"""One sweep over x and dy makes all gradients, H on the way. It reads x in any case."""


@functools.cache
def _decode_tokens(dtype: torch.dtype, with_weight: bool) -> int:
    return heuristics.decode_tokens(dtype, with_weight, instruction_set(), fast_bfloat16(), uses_our_gemm(dtype))


def _decodes(x, weight) -> bool:
    """Whether the tokens are so few that the decode kernel takes them."""
    in_features = x.shape[-1]
    most = _decode_tokens(x.dtype, weight is not None) * in_features
    return in_features > 0 and x.numel() <= most and _by_rows(weight)


def _by_rows(weight) -> bool:
    """Whether the kernels read the weight as it lies; by columns they would copy it, which the library does not."""
    return weight is None or weight.stride(1) == 1


def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    if _decodes(x, weight):
        out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
        return _kernels.decode(
            x, weight, bias, lora_A, lora_B, scaling, values, crow, col, out_features, *_dropout(dropout_p, seed),
            INDICES_CHECKED,
        )  # fmt: skip
    widened = heuristics.widens(x, fast_bfloat16())
    our_gemm = uses_our_gemm(x.dtype) and _by_rows(weight)
    our_fp32_gemm = our_gemm and x.dtype == torch.float32
    algorithm = heuristics.forward_algorithm(x, weight, lora_A, lora_B, values, structure, seed, widened, our_gemm)
    if weight is None:
        out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
        y = x.new_zeros(*x.shape[:-1], out_features)
    elif algorithm is Algorithm.FUSED:
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
    elif algorithm is Algorithm.MERGED or widened or our_fp32_gemm:
        delta = _delta(lora_A, lora_B, scaling, values, crow, col) if algorithm is Algorithm.MERGED else None
        y = base_gemm.linear(_matrix(x), _matrix(weight), _contiguous(bias), delta, our_fp32_gemm)
        y = y.view(*x.shape[:-1], weight.shape[0])
    else:
        y = F.linear(x, weight, bias).contiguous()
    if algorithm is Algorithm.GEMMS:
        as_matrix(y).addmm_(F.linear(as_matrix(x), lora_A), lora_B.T, alpha=scaling)
    elif algorithm is not Algorithm.MERGED:
        fused = (_matrix(weight), _contiguous(bias)) if algorithm is Algorithm.FUSED else (None, None)
        _forward(y, x, *fused, lora_A, lora_B, scaling, _floats(values), crow, col, structure, dropout_p, seed)
    return y


def rosa_linear_with_H(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    y = rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed)
    return y, H_of(x, lora_A, lora_B, dropout_p, seed)


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    dy2, x2 = _matrix(dy), _matrix(x)
    widened = dy.dtype == torch.bfloat16 and not fast_bfloat16()
    delta = _delta(lora_A, lora_B, scaling, values, crow, col)
    our_gemm = uses_our_gemm(dy.dtype) and _by_rows(weight)
    our_fp32_gemm = our_gemm and dy.dtype == torch.float32
    algorithm = heuristics.dx_algorithm(dy2, weight, lora_A, lora_B, values, structure, seed, widened, our_gemm)
    dx2 = None
    if need_dx and weight is None:
        dx2 = torch.zeros_like(x2)
    elif need_dx and algorithm is Algorithm.FUSED:
        dx2 = torch.empty_like(x2)
    elif need_dx and (algorithm is Algorithm.MERGED or widened or our_fp32_gemm):
        dx2 = base_gemm.linear_dx(dy2, _matrix(weight), delta if algorithm is Algorithm.MERGED else None, our_fp32_gemm)
    elif need_dx:
        dx2 = dy2 @ weight
    # The kernels write dx where they multiply by the weight, and add to it elsewhere.
    dx_to_add = None if algorithm is Algorithm.MERGED else dx2
    if algorithm is Algorithm.GEMMS:
        dA, dB, dH = gradients_by_library(dy2, x2, lora_A, lora_B, scaling, dx_to_add is not None, need_dA, need_dB)
        if dx_to_add is not None:
            dx_to_add.addmm_(dH, lora_A, alpha=scaling)
        dvalues = None
    else:
        dA, dB, dvalues = (
            torch.zeros(source.shape, dtype=torch.float32) if need else None
            for need, source in ((need_dA, lora_A), (need_dB, lora_B), (need_dvalues, values))
        )
        if any(gradient is not None for gradient in (dx_to_add, dA, dB, dvalues)):
            fused = _matrix(weight) if need_dx and algorithm is Algorithm.FUSED else None
            _kernels.backward(
                dx_to_add, dA, dB, dvalues, dy2, x2, fused, *delta, ccol, row, permutation, structure,
                *_dropout(dropout_p, seed), _are_bfloat16(lora_A, lora_B), INDICES_CHECKED,
            )  # fmt: skip
    return [
        dx2.view(x.shape) if need_dx else None,
        base_gemm.linear_dweight(dy2, x2, widened) if need_dweight else None,
        dy2.sum(0) if need_dbias else None,
        dA.to(lora_A.dtype) if need_dA else None,
        dB.to(lora_B.dtype) if need_dB else None,
        dvalues.to(values.dtype) if need_dvalues else None,
    ]


def spmm(x, values, crow, col, structure):
    if _decodes(x, None):
        return _kernels.decode(
            x, None, None, None, None, 0.0, values, crow, col, crow.shape[0] - 1, None, 0, 1.0, INDICES_CHECKED
        )
    y = x.new_empty(*x.shape[:-1], crow.shape[0] - 1)
    _forward(y, x, None, None, None, None, 0.0, _floats(values), crow, col, structure, 0.0, None, fresh_y=True)
    return y


def sddmm(dy, x, crow, col, structure):
    dvalues = torch.zeros(col.shape, dtype=torch.float32)
    # The kernel takes S whole, and dvalues stands for its values, which dS does not read.
    _kernels.backward(
        None, None, None, dvalues, _matrix(dy), _matrix(x), None, None, None, 0.0, dvalues, crow, col, None, None, None,
        structure, None, 0, 0.0, False, INDICES_CHECKED,
    )  # fmt: skip
    return dvalues.to(x.dtype)


def csr_add(weight, values, crow, col):
    return base_gemm.merged(_matrix(weight), Delta(values=_floats(values), crow=crow, col=col), weight.dtype)


def _forward(
    y, x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, fresh_y=False
) -> None:
    _kernels.forward(
        as_matrix(y), _matrix(x), weight, bias, _floats(lora_A), _floats(lora_B), scaling, values, crow, col, structure,
        *_dropout(dropout_p, seed), _are_bfloat16(lora_A, lora_B), fresh_y, INDICES_CHECKED,
    )  # fmt: skip


def _matrix(tensor):
    """as_matrix with unit column stride and rows that do not overlap, as the kernels read it."""
    matrix = as_matrix(tensor)
    row_stride, column_stride = matrix.stride()
    return matrix if column_stride == 1 and row_stride >= matrix.shape[1] else matrix.contiguous()


def _contiguous(tensor):
    return None if tensor is None else tensor.contiguous()


def _floats(tensor):
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _are_bfloat16(lora_A, lora_B) -> bool:
    """Whether kernels for bf16 take both as they are and may round what they multiply with them."""
    return lora_A is not None and lora_A.dtype == lora_B.dtype == torch.bfloat16


def _delta(lora_A, lora_B, scaling, values, crow, col):
    return Delta(_floats(lora_A), _floats(lora_B), scaling, _floats(values), crow, col)


def _dropout(dropout_p, seed):
    """(seed, threshold, scale) as the kernels take them."""
    if seed is None:
        return None, 0, 1.0
    return seed, drop_threshold(dropout_p), keep_scale(dropout_p)
