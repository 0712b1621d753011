"""S made dense for one call: beside a weight, merged into it, or as the delta scaling · B A + S.

Each function takes the backend's densify. Kernels write S by its rows, so the matrices of a backward are made as the
layer has them, and returned as transposed views.
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
    weight, A, B, S = problem.layer or (problem.weight, problem.A, problem.B, problem.S)
    if A is None:
        merged = weight_plus(densify, weight, S)
    else:
        merged = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=problem.scaling).contiguous()
        if S is not None:
            densify(merged, merged, S)
    return merged if problem.layer is None else merged.T


def dense_delta(densify: Callable, problem: LinearProblem) -> Tensor:
    """scaling · B A + S in x's dtype. It is rounded once: by the GEMM that adds to S, where all are of that dtype."""
    _, A, B, S = problem.layer or (problem.weight, problem.A, problem.B, problem.S)
    dtype = problem.x.dtype
    if A is None:
        delta = dense(densify, S, dtype)
    elif A.dtype == B.dtype == S.values.dtype == dtype:
        delta = dense(densify, S, dtype).addmm_(B, A, alpha=problem.scaling)
    else:
        delta = torch.addmm(A[:1].float(), B.float(), A.float(), beta=0, alpha=problem.scaling).contiguous()
        delta = densify(delta, delta, S).to(dtype)
    return delta if problem.layer is None else delta.T
