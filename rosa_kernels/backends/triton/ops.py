"""The ops of the Triton backend."""

import torch

from rosa_kernels.backends.gpu import library_ops
from rosa_kernels.backends.gpu.linear_ops import linear_ops
from rosa_kernels.backends.gpu.sizes import check_sizes
from rosa_kernels.backends.shapes import as_matrix
from rosa_kernels.backends.triton import heuristics
from rosa_kernels.backends.triton.densify import weight_plus
from rosa_kernels.backends.triton.lora import low_rank_gradients
from rosa_kernels.backends.triton.operands import Dropout, LinearProblem, sparse_of
from rosa_kernels.backends.triton.products import linear
from rosa_kernels.backends.triton.sddmm import sddmm as _sddmm
from rosa_kernels.pattern import ROW

KEEPS_H = True
LORA_OPS = library_ops.LORA_OPS


def _linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, keeps_H):
    lora = values is seed is None and weight is not None
    if lora and library_ops.forward_by_library(heuristics.choose_linear, x, lora_A, lora_B, keeps_H):
        return LORA_OPS[0](x, weight, bias, lora_A, lora_B, scaling, keeps_H)
    x2 = as_matrix(x)
    out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
    check_sizes(*x2.shape, out_features, 0 if lora_A is None else lora_A.shape[0])
    problem = LinearProblem(  # by position: this runs in every call
        x2, out_features, weight, bias, lora_A, lora_B, scaling, sparse_of(values, crow, col, structure, x2.shape[1]),
        None, keeps_H, Dropout.of(dropout_p, seed), "" if seed is None else "x",
    )  # fmt: skip
    y, H = linear(problem)
    return y if x is x2 else y.view(*x.shape[:-1], out_features), H


rosa_linear, rosa_linear_with_H, spmm, lora_step_by_library = linear_ops(_linear, heuristics)


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    dy2, x2 = as_matrix(dy), as_matrix(x)
    check_sizes(*x2.shape, dy2.shape[1], 0 if lora_A is None else lora_A.shape[0])
    dropout = Dropout.of(dropout_p, seed)
    dA = dB = dH = dx = dvalues = None
    if need_dA or need_dB:
        dA, dB, dH = low_rank_gradients(
            dy2, x2, lora_A, lora_B, scaling, dropout, H, need_dH=need_dx or need_dA, need_dA=need_dA, need_dB=need_dB
        )
    S = sparse_of(values, crow, col, structure, x2.shape[1])
    if need_dx:
        problem = LinearProblem(
            dy2, x2.shape[1], None if weight is None else weight.T, None, None if lora_B is None else lora_B.T,
            None if lora_A is None else lora_A.T, scaling,
            None if S is None else S.transposed(ccol, row, permutation), dH, False, dropout,
            "" if seed is None else "out", (weight, lora_A, lora_B, S),
        )  # fmt: skip
        dx = linear(problem)[0].view(x.shape)
    if need_dvalues:
        rows = row[: S.nnz // x2.shape[1]] if S is not None and structure == ROW else None  # of the first column
        dvalues = _sddmm(dy2, x2, crow, col, structure, values.dtype, rows)
    return [dx, dy2.T @ x2 if need_dweight else None, dy2.sum(0) if need_dbias else None, dA, dB, dvalues]


def sddmm(dy, x, crow, col, structure):
    dy2, x2 = as_matrix(dy), as_matrix(x)
    check_sizes(*x2.shape, dy2.shape[1])
    return _sddmm(dy2, x2, crow, col, structure, x.dtype)


def csr_add(weight, values, crow, col):
    check_sizes(0, weight.shape[1], weight.shape[0])
    S = sparse_of(values, crow, col, 0, weight.shape[1])
    if S is None:
        return weight.clone(memory_format=torch.contiguous_format)
    return weight_plus(weight, S)
