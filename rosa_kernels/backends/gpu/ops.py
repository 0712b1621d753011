"""The ops of a GPU backend: what Triton and CUDA have in common."""

import torch

from rosa_kernels.backends.gpu.backend import GpuBackend
from rosa_kernels.backends.gpu.densify import weight_plus
from rosa_kernels.backends.gpu.linear import linear
from rosa_kernels.backends.gpu.lora import low_rank_gradients
from rosa_kernels.backends.gpu.operands import Dropout, LinearProblem, sparse_of
from rosa_kernels.backends.gpu.sddmm import sddmm
from rosa_kernels.backends.gpu.sizes import check_sizes
from rosa_kernels.backends.shapes import as_matrix
from rosa_kernels.pattern import ROW


class Ops:
    """Each method is an op of rosa_kernels/ops.py."""

    def __init__(self, backend: GpuBackend):
        self._backend = backend

    def rosa_linear(self, x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
        x2 = as_matrix(x)
        out_features = lora_B.shape[0] if lora_B is not None else crow.shape[0] - 1
        check_sizes(*x2.shape, out_features, 0 if lora_A is None else lora_A.shape[0])
        S = sparse_of(values, crow, col, structure, x2.shape[1])
        problem = LinearProblem(  # by position: this runs in every call
            x2, out_features, weight, bias, lora_A, lora_B, scaling, S, None, Dropout.of(dropout_p, seed),
            "" if seed is None else "x",
        )  # fmt: skip
        return linear(self._backend, problem).view(*x.shape[:-1], out_features)

    def rosa_linear_backward(
        self, dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p,
        seed, needs,
    ):  # fmt: skip
        need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
        dy2, x2 = as_matrix(dy), as_matrix(x)
        check_sizes(*x2.shape, dy2.shape[1], 0 if lora_A is None else lora_A.shape[0])
        dropout = Dropout.of(dropout_p, seed)
        dA = dB = dH = dx = dvalues = None
        if need_dA or need_dB:
            dA, dB, dH = low_rank_gradients(
                self._backend, dy2, x2, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB
            )
        S = sparse_of(values, crow, col, structure, x2.shape[1])
        if need_dx:
            problem = LinearProblem(
                dy2, x2.shape[1], None if weight is None else weight.T, None, None if lora_B is None else lora_B.T,
                None if lora_A is None else lora_A.T, scaling,
                None if S is None else S.transposed(ccol, row, permutation), dH, dropout, "" if seed is None else "out",
                (weight, lora_A, lora_B, S),
            )  # fmt: skip
            dx = linear(self._backend, problem).view(x.shape)
        if need_dvalues:
            rows = row[: S.nnz // x2.shape[1]] if S is not None and structure == ROW else None  # of the first column
            dvalues = sddmm(self._backend, dy2, x2, crow, col, structure, values.dtype, rows)
        return [dx, dy2.T @ x2 if need_dweight else None, dy2.sum(0) if need_dbias else None, dA, dB, dvalues]

    def spmm(self, x, values, crow, col, structure):
        x2 = as_matrix(x)
        out_features = crow.shape[0] - 1
        check_sizes(*x2.shape, out_features)
        problem = LinearProblem(x2, out_features, S=sparse_of(values, crow, col, structure, x2.shape[1]))
        return linear(self._backend, problem).view(*x.shape[:-1], out_features)

    def sddmm(self, dy, x, crow, col, structure):
        dy2, x2 = as_matrix(dy), as_matrix(x)
        check_sizes(*x2.shape, dy2.shape[1])
        return sddmm(self._backend, dy2, x2, crow, col, structure, x.dtype)

    def csr_add(self, weight, values, crow, col):
        check_sizes(0, weight.shape[1], weight.shape[0])
        S = sparse_of(values, crow, col, 0, weight.shape[1])
        if S is None:
            return weight.clone(memory_format=torch.contiguous_format)
        return weight_plus(self._backend.densify, weight, S)
