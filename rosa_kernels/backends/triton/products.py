"""y and dx, by library GEMMs and by kernels, as an algorithm says.

The adapter comes first and the base last: y starts as the bias and what the adapter adds, and the GEMM of the weight
adds to it. So y is rounded once in the size of the adapter and once in its own, and no pass over y is needed that
reads it, adds and writes it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.triton import heuristics
from rosa_kernels.backends.triton.densify import dense_delta, merged_weight
from rosa_kernels.backends.triton.linear import add_blocks_of_S, run_kernel
from rosa_kernels.backends.triton.lora import make_H
from rosa_kernels.backends.triton.operands import LinearProblem
from rosa_kernels.backends.triton.split_bf16_gemm import add_few_columns_product, few_rows_product, plus_product
from rosa_kernels.backends.triton.transpose import add_at_rows, gather_columns


def linear(problem: LinearProblem) -> tuple[Tensor, Tensor | None]:
    """(y, H): y (T, out_features) in x's dtype, contiguous. H where the problem has it, or where it was made."""
    rates = device_rates.rates(problem.x.device, hardware.architecture(problem.x.device))
    algorithm = heuristics.choose_linear(problem.call(), rates)
    x, S, bias, H = problem.x, problem.S, problem.bias, problem.H
    if H is None and (problem.keeps_H or algorithm.low_rank in ("before", "library")):
        H = make_H(problem, by_library=algorithm.low_rank != "before")
    if algorithm.base == "merged":
        return F.linear(x, merged_weight(problem), bias).contiguous(), H
    y = run_kernel(problem, algorithm, H) if algorithm.runs_the_kernel else None
    if algorithm.sparse == "delta":
        y = plus_product(y, x, dense_delta(problem).T, bias)
    if algorithm.sparse == "columns":
        columns = problem.library_operand(S.whole_columns())
        y = add_few_columns_product(y, gather_columns(x, S.col[: columns.shape[1]]), columns, bias)
    if algorithm.low_rank == "library":
        y = plus_product(y, H[:, : problem.B.shape[1]], problem.B.T, bias, problem.scaling)
    if algorithm.base == "library":
        y = plus_product(y, x, problem.weight.T, bias)
    if y is None:
        y = torch.zeros(x.shape[0], problem.out_features, dtype=x.dtype, device=x.device)
    if algorithm.sparse == "rows":
        add_at_rows(y, few_rows_product(x, problem.library_operand(S.whole_rows())), S.crow, S.shape[1])
    if algorithm.sparse == "blocks":
        add_blocks_of_S(y, x, S)
    return y, H
