"""S written into a dense matrix, beside a weight or alone."""

import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu.operands import Sparse
from rosa_kernels.backends.triton import launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import narrow

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
        densify_kernel, (out_features,), out, weight, S.values, S.crow, S.col, in_features, *strides, in_features,
        ZERO=zero, config=_CONFIG,
    )  # fmt: skip
    return out
