"""The epilogue: one pass over y for the parts that no library call has served."""

import torch
from torch import Tensor

from rosa_kernels.backends.cuda import bindings
from rosa_kernels.backends.cuda.heuristics import LinearAlgorithm
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, LinearProblem
from rosa_kernels.backends.gpu.split_bf16_gemm import adapters, few_rows_product


def finish_linear(y: Tensor | None, problem: LinearProblem, algorithm: LinearAlgorithm) -> Tensor:
    """y + scaling · H Bᵀ + x Sᵀ for an H and an S that the algorithm gives to the epilogue; y None counts as zeros."""
    x, S, accumulate = problem.x, problem.S, y is not None
    if not algorithm.runs_the_epilogue:
        return y if accumulate else torch.zeros(x.shape[0], problem.out_features, dtype=x.dtype, device=x.device)
    if not accumulate:
        y = torch.empty(x.shape[0], problem.out_features, dtype=x.dtype, device=x.device)
    H = B = crow = entries = shared_x = x_transposed = row_products = None
    if algorithm.low_rank == "kernel":
        A, B = adapters(problem.A, problem.B, x.dtype)
        H = problem.H
        if H is None:
            H = bindings.shrink(x, A, problem.dropout if problem.drop_at == "x" else NO_DROPOUT)
    if algorithm.sparse in ("shared", "global"):
        crow, entries = S.crow, bindings.pack_entries(S)
        shared_x = bindings.unit_stride(x) if algorithm.sparse == "shared" else None
        x_transposed = bindings.transpose(x) if algorithm.sparse == "global" else None
    elif algorithm.sparse == "rows":
        crow, row_products = S.crow, few_rows_product(x, problem.library_operand(S.whole_rows())).contiguous()
    bindings.epilogue(
        y, accumulate, H, B, problem.scaling, problem.dropout if problem.drop_at == "out" else NO_DROPOUT,
        crow, entries, shared_x, x_transposed, row_products, x.shape[1],
    )  # fmt: skip
    return y
