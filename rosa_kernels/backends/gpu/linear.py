"""y and dx: library GEMMs for what an algorithm leaves to the library, then the backend's kernels for the rest."""

import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.backend import GpuBackend
from rosa_kernels.backends.gpu.densify import dense_delta, merged_weight
from rosa_kernels.backends.gpu.operands import LinearProblem
from rosa_kernels.backends.gpu.split_bf16_gemm import add_few_columns_product, plus_product


def linear(backend: GpuBackend, problem: LinearProblem) -> Tensor:
    """(T, out_features) in x's dtype, contiguous."""
    x, S, y = problem.x, problem.S, None
    rates = device_rates.rates(x.device, hardware.architecture(x.device))
    algorithm = backend.heuristics.choose_linear(problem.call(), rates)
    if algorithm.base == "merged":
        return F.linear(x, merged_weight(backend.densify, problem), problem.bias).contiguous()
    if algorithm.base == "library":
        y = F.linear(x, problem.weight, problem.bias).contiguous()
    if algorithm.sparse == "delta":
        y = plus_product(y, x, dense_delta(backend.densify, problem).T)
    if algorithm.sparse == "columns":
        columns = problem.library_operand(S.whole_columns())
        y = add_few_columns_product(y, backend.gather_columns(x, S.col[: columns.shape[1]]), columns)
    if algorithm.low_rank == "library":
        H = x @ problem.A.T if problem.H is None else backend.matrix_of_H(problem.H, problem.B.shape[1])
        y = plus_product(y, H, problem.B.T, problem.scaling)
    return backend.finish_linear(y, problem, algorithm)
