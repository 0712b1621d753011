"""The ops of a GPU backend, composed of its kernels: what Triton and CUDA have in common."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.backends.gpu.operands import Dropout, Linear, Sparse, sparse_of
from rosa_kernels.backends.shapes import as_matrix
from rosa_kernels.pattern import ROW


class Kernels(NamedTuple):
    """What a backend brings."""

    linear: Callable[[Linear], Tensor]
    low_rank_gradients: Callable
    """(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB) -> (dA, dB, dH as a Linear's H), None each
    where not needed; dH where it was made on the way."""
    sddmm: Callable
    """(dy, x, crow, col, structure, dtype, rows or None) -> dS (nnz,); rows: those that are not empty, if at hand."""
    sum_with: Callable[[Tensor, Sparse], Tensor]
    """weight + S, a new tensor."""
    add_in_place: Callable[[Tensor, Sparse], Tensor]
    """out += S; returns out, which is contiguous."""
    dense: Callable[[Sparse, torch.dtype], Tensor]
    """S, in row order, as a matrix."""


class Ops:
    """Each method is an op of rosa_kernels/ops.py."""

    def __init__(self, kernels: Kernels):
        self._kernels = kernels

    def rosa_linear(self, x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
        x2 = as_matrix(x)
        S = sparse_of(values, crow, col, structure, x2.shape[1])
        problem = Linear(
            x2,
            lora_B.shape[0] if lora_B is not None else crow.shape[0] - 1,
            weight,
            bias,
            lora_A,
            lora_B,
            scaling,
            S,
            dropout=Dropout.of(dropout_p, seed),
            drop_at="" if seed is None else "x",
            merged=lambda: self._merged(weight, lora_A, lora_B, scaling, S),
            delta=lambda: self._delta(x2.dtype, lora_A, lora_B, scaling, S),
        )
        return self._kernels.linear(problem).view(*x.shape[:-1], problem.N)

    def rosa_linear_backward(
        self, dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p,
        seed, needs,
    ):  # fmt: skip
        need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
        dy2, x2 = as_matrix(dy), as_matrix(x)
        dropout = Dropout.of(dropout_p, seed)
        S = sparse_of(values, crow, col, structure, x2.shape[1])
        dA = dB = dH = dx = dvalues = None
        if need_dA or need_dB:
            dA, dB, dH = self._kernels.low_rank_gradients(
                dy2, x2, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB
            )
        if need_dx:
            dx = self._kernels.linear(
                Linear(
                    dy2,
                    x2.shape[1],
                    None if weight is None else weight.T,
                    None,
                    None if lora_B is None else lora_B.T,
                    None if lora_A is None else lora_A.T,
                    scaling,
                    None if S is None else S.transposed(ccol, row, permutation),
                    dH,
                    dropout,
                    "" if seed is None else "out",
                    lambda: self._merged(weight, lora_A, lora_B, scaling, S).T,
                    lambda: self._delta(x2.dtype, lora_A, lora_B, scaling, S).T,
                )
            ).view(x.shape)
        if need_dvalues:
            rows = row[: S.nnz // x2.shape[1]] if S is not None and structure == ROW else None  # of the first column
            dvalues = self._kernels.sddmm(dy2, x2, crow, col, structure, values.dtype, rows)
        return [dx, dy2.T @ x2 if need_dweight else None, dy2.sum(0) if need_dbias else None, dA, dB, dvalues]

    def spmm(self, x, values, crow, col, structure):
        x2 = as_matrix(x)
        N = crow.shape[0] - 1
        S = sparse_of(values, crow, col, structure, x2.shape[1])
        problem = Linear(x2, N, S=S, delta=lambda: self._kernels.dense(S, x2.dtype))
        return self._kernels.linear(problem).view(*x.shape[:-1], N)

    def sddmm(self, dy, x, crow, col, structure):
        return self._kernels.sddmm(as_matrix(dy), as_matrix(x), crow, col, structure, x.dtype, None)

    def csr_add(self, weight, values, crow, col):
        S = sparse_of(values, crow, col, 0, weight.shape[1])
        if S is None:
            return weight.clone(memory_format=torch.contiguous_format)
        return self._kernels.sum_with(weight, S)

    def _merged(self, weight: Tensor, lora_A, lora_B, scaling: float, S) -> Tensor:
        """weight + scaling · B A + S in fp32, for one call."""
        if lora_A is None:
            return self._kernels.sum_with(weight, S)
        total = torch.addmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling).contiguous()
        return total if S is None else self._kernels.add_in_place(total, S)

    def _delta(self, dtype: torch.dtype, lora_A, lora_B, scaling: float, S) -> Tensor:
        """scaling · B A + S in this dtype, for one call; rounded once, by the GEMM that adds to S where all are of it."""
        if lora_A is None:
            return self._kernels.dense(S, dtype)
        if lora_A.dtype == lora_B.dtype == S.values.dtype == dtype:
            return self._kernels.dense(S, dtype).addmm_(lora_B, lora_A, alpha=scaling)
        product = torch.addmm(lora_A[:1].float(), lora_B.float(), lora_A.float(), beta=0, alpha=scaling).contiguous()
        return self._kernels.add_in_place(product, S).to(dtype)
