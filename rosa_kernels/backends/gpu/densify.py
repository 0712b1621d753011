"""S made dense for one call: beside a weight, merged into it, or as the delta scaling · B A + S.

Each function takes the backend's densify. Kernels write S by its rows, so a transposed problem's matrices are made in
the order of the layer and returned as views.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rosa_kernels.backends.gpu.operands import LinearProblem, Sparse


def weight_plus(densify: Callable, weight: Tensor, S: Sparse) -> Tensor:
    """weight of any strides + S, a new tensor."""
    return densify(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), weight, S)


def dense(densify: Callable, S: Sparse, dtype: torch.dtype) -> Tensor:
    """S as a matrix."""
    if S.transpose_of is not None:
        return dense(densify, S.transpose_of, dtype).T
    return densify(torch.empty(S.shape, dtype=dtype, device=S.values.device), None, S)


def merged_weight(densify: Callable, problem: LinearProblem) -> Tensor:
    """weight + scaling · B A + S in fp32."""
    if problem.transposed:
        return merged_weight(densify, _layer_of(problem)).T
    weight, A, B, S = problem.weight, problem.A, problem.B, problem.S
    if A is None:
        return weight_plus(densify, weight, S)
    merged = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=problem.scaling).contiguous()
    return merged if S is None else densify(merged, merged, S)


def dense_delta(densify: Callable, problem: LinearProblem) -> Tensor:
    """scaling · B A + S in x's dtype. It is rounded once: by the GEMM that adds to S, where all are of that dtype."""
    if problem.transposed:
        return dense_delta(densify, _layer_of(problem)).T
    A, B, S, dtype = problem.A, problem.B, problem.S, problem.x.dtype
    if A is None:
        return dense(densify, S, dtype)
    if A.dtype == B.dtype == S.values.dtype == dtype:
        return dense(densify, S, dtype).addmm_(B, A, alpha=problem.scaling)
    delta = torch.addmm(A[:1].float(), B.float(), A.float(), beta=0, alpha=problem.scaling).contiguous()
    return densify(delta, delta, S).to(dtype)


def _layer_of(problem: LinearProblem) -> LinearProblem:
    """The matrices as the layer has them, of a problem that has them transposed."""
    weight, A, B, S = problem.weight, problem.A, problem.B, problem.S
    return problem._replace(
        weight=None if weight is None else weight.T,
        A=None if B is None else B.T,
        B=None if A is None else A.T,
        S=None if S is None else S.transpose_of,
        transposed=False,
    )
