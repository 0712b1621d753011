"""Sums over a split dimension: each split's program writes an fp32 part, and these are added in order, rounded once."""

import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.triton import runtime
from rosa_kernels.backends.triton.arithmetic import narrow, sum_of_parts
from rosa_kernels.backends.triton.configs import Config

_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["size", "PARTS"])
def sum_kernel(out, parts, size, PARTS, BLOCK: tl.constexpr):
    """out (size,) = Σ_p parts[p] (PARTS, size)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_parts(parts, at, at < size, tl.cast(size, tl.int64), PARTS)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=at < size)


def add_parts(out: Tensor, parts: Tensor) -> None:
    """out = Σ_p parts[p]; parts (parts, *out.shape) fp32, both contiguous."""
    grid = (runtime.cdiv(out.numel(), _CONFIG["BLOCK"]),)
    runtime.launch(sum_kernel, grid, out, parts, out.numel(), parts.shape[0], config=_CONFIG)
