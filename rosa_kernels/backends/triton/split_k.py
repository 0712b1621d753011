"""Sums over a split dimension. Each split's program writes an fp32 part; the parts are added in order and rounded
once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import narrow, sum_of_parts

_CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["PARTS"])
def sum_kernel(out, parts, size, PARTS, BLOCK: tl.constexpr):
    """out (size,) = Σ_p parts[p] (PARTS, size)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_parts(parts, at, at < size, tl.cast(size, tl.int64), PARTS)
    tl.store(out + at, narrow(total, out.dtype.element_ty), mask=at < size)


def parts_for(out: Tensor, splits: int) -> Tensor:
    """What the programs of so many splits write: parts (splits, *out.shape) in fp32, or out itself for one."""
    return out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


def add_parts(out: Tensor, parts: Tensor) -> None:
    """out = Σ_p parts[p], unless parts_for gave out itself; both are contiguous."""
    if parts is out:
        return
    grid = (cdiv(out.numel(), _CONFIG["BLOCK"]),)
    launcher.launch(sum_kernel, grid, (out, parts), (out.numel(), parts.shape[0]), (), _CONFIG)
