"""S written into a dense matrix: beside a weight, merged into it, or as the delta scaling · B A + S.

The kernel writes S by its rows, so the matrices of a backward are made as the layer has them, and returned as
transposed views.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.triton import launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import narrow
from rosa_kernels.backends.triton.operands import LinearProblem, Sparse

_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit
def densify_kernel(
    out, weight, values, crow, col, K, stride_wn, stride_wk, stride_on, ZERO: tl.constexpr, BLOCK: tl.constexpr
):
    """A row of out (N, K) = weight + S. weight None: zeros + S for ZERO, else out + S.

    A program writes a whole row, so that nothing races. N is out_features, K in_features.
    """
    row = tl.program_id(0)
    out_row = out + row.to(tl.int64) * stride_on
    offset = tl.arange(0, BLOCK)
    if (weight is not None) or ZERO:
        for first in range(0, K, BLOCK):
            inside = first + offset < K
            if weight is not None:
                columns = (first + offset).to(tl.int64)
                tile = tl.load(weight + row.to(tl.int64) * stride_wn + columns * stride_wk, mask=inside, other=0.0)
            else:
                tile = tl.zeros((BLOCK,), out.dtype.element_ty)
            tl.store(out_row + first + offset, tile, mask=inside)
        tl.debug_barrier()  # the row is whole before other threads of the program add to it
    start = tl.load(crow + row)
    end = tl.load(crow + row + 1)
    for first in range(start, end, BLOCK):
        inside = first + offset < end
        column = tl.load(col + first + offset, mask=inside, other=0)
        total = tl.load(values + first + offset, mask=inside, other=0.0).to(tl.float32)
        if not ZERO:
            total += tl.load(out_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_row + column, narrow(total, out.dtype.element_ty), mask=inside)


def densify(out: Tensor, weight: Tensor | None, S: Sparse) -> Tensor:
    """out = weight + S. weight None: S alone; weight is out: S is added in place. Returns out, which is contiguous."""
    out_features, in_features = S.shape
    zero = weight is None
    if weight is out:
        weight = None
    strides = (0, 0) if weight is None else weight.stride()
    launcher.launch(
        densify_kernel, (out_features,), (out, weight, S.values, S.crow, S.col), (in_features, *strides, in_features),
        (zero,), _CONFIG,
    )  # fmt: skip
    return out


def weight_plus(weight: Tensor, S: Sparse) -> Tensor:
    """weight of any strides + S, a new tensor."""
    return densify(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), weight, S)


def dense(S: Sparse, dtype: torch.dtype) -> Tensor:
    """S as a matrix."""
    if S.transpose_of is not None:
        return dense(S.transpose_of, dtype).T
    return densify(torch.empty(S.shape, dtype=dtype, device=S.values.device), None, S)


def merged_weight(problem: LinearProblem) -> Tensor:
    """weight + scaling · B A + S in fp32."""
    weight, A, B, S = problem.layer or (problem.weight, problem.A, problem.B, problem.S)
    if A is None:
        merged = weight_plus(weight, S)
    else:
        merged = torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=problem.scaling).contiguous()
        if S is not None:
            densify(merged, merged, S)
    return merged if problem.layer is None else merged.T


def dense_delta(problem: LinearProblem) -> Tensor:
    """scaling · B A + S in x's dtype. It is rounded once: by the GEMM that adds to S, where all are of that dtype."""
    _, A, B, S = problem.layer or (problem.weight, problem.A, problem.B, problem.S)
    dtype = problem.x.dtype
    if A is None:
        delta = dense(S, dtype)
    elif A.dtype == B.dtype == S.values.dtype == dtype:
        delta = dense(S, dtype).addmm_(B, A, alpha=problem.scaling)
    else:
        delta = torch.addmm(A[:1].float(), B.float(), A.float(), beta=0, alpha=problem.scaling).contiguous()
        delta = densify(delta, delta, S).to(dtype)
    return delta if problem.layer is None else delta.T
