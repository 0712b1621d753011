"""S into a dense matrix: weight + S for csr_add and merged weights, S alone for tensor cores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu.operands import Sparse
from rosa_kernels.backends.triton import launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import narrow

_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit
def scatter_kernel(
    out, base, values, crow, col, N, stride_bm, stride_bn, stride_om, ZERO: tl.constexpr, BLOCK: tl.constexpr
):
    """Row m of out = base's (zeros for ZERO, out's own where base is None) + S's. A program a row: nothing races."""
    row = tl.program_id(0)
    out_row = out + row.to(tl.int64) * stride_om
    n = tl.arange(0, BLOCK)
    if (base is not None) or ZERO:
        for first in range(0, N, BLOCK):
            inside = first + n < N
            if base is not None:
                columns = (first + n).to(tl.int64)
                tile = tl.load(base + row.to(tl.int64) * stride_bm + columns * stride_bn, mask=inside, other=0.0)
            else:
                tile = tl.zeros((BLOCK,), out.dtype.element_ty)
            tl.store(out_row + first + n, tile, mask=inside)
        tl.debug_barrier()  # the row is whole before other threads of the program add to it
    start = tl.load(crow + row)
    end = tl.load(crow + row + 1)
    for first in range(start, end, BLOCK):
        inside = first + n < end
        column = tl.load(col + first + n, mask=inside, other=0)
        total = tl.load(values + first + n, mask=inside, other=0.0).to(tl.float32)
        if not ZERO:
            total += tl.load(out_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_row + column, narrow(total, out.dtype.element_ty), mask=inside)


def add_in_place(out: Tensor, S: Sparse) -> Tensor:
    """out (N, K), contiguous, plus S; returns out."""
    return _scatter(out, None, S, zero=False)


def sum_with(weight: Tensor, S: Sparse) -> Tensor:
    """weight (N, K) of any strides plus S, a new tensor."""
    return _scatter(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device), weight, S, zero=False)


def dense(S: Sparse, dtype: torch.dtype) -> Tensor:
    """S as a matrix (N, K)."""
    if S.transpose_of is not None:
        return dense(S.transpose_of, dtype).T
    return _scatter(torch.empty(S.shape, dtype=dtype, device=S.values.device), None, S, zero=True)


def _scatter(out: Tensor, base: Tensor | None, S: Sparse, zero: bool) -> Tensor:
    N, K = S.shape
    base_strides = (0, 0) if base is None else base.stride()
    launcher.launch(
        scatter_kernel, (N,), out, base, S.values, S.crow, S.col, K, *base_strides, K, ZERO=zero, config=_CONFIG
    )
    return out
