"""S into a dense matrix: weight + S for csr_add and merged weights, S alone for library GEMMs."""

import torch
from torch import Tensor

from rosa_kernels.backends.cuda import bindings
from rosa_kernels.backends.gpu.operands import Sparse


def add_in_place(out: Tensor, S: Sparse) -> Tensor:
    """out (N, K), contiguous, plus S; returns out."""
    return bindings.densify(out, out, S)


def sum_with(weight: Tensor, S: Sparse) -> Tensor:
    """weight (N, K) of any strides plus S, a new tensor."""
    return bindings.densify(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), weight, S)


def dense(S: Sparse, dtype: torch.dtype) -> Tensor:
    """S, in row order, as a matrix (N, K)."""
    return bindings.densify(torch.empty(S.shape, dtype=dtype, device=S.values.device), None, S)
