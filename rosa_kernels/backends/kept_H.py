"""The H = x̂ Aᵀ that a forward on a GPU keeps for its backward: one form, whichever backend made it."""

import torch
from torch import Tensor

from rosa_kernels.backends.shapes import cdiv, tokens_of

RANK_STEP = 16
"""H has a multiple of so many columns, as the tensor cores take them. Those beyond r are zeros."""


def padded_rank(r: int) -> int:
    """The columns of an H of rank r."""
    return cdiv(r, RANK_STEP) * RANK_STEP


def H_dtype(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> torch.dtype:
    """x's dtype, in which a library GEMM makes H, or float32 where an adapter has another one."""
    return x.dtype if lora_A.dtype == lora_B.dtype == x.dtype else torch.float32


def empty_H(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Room for H (T, padded rank)."""
    shape = tokens_of(x), padded_rank(lora_A.shape[0])
    return torch.empty(shape, dtype=H_dtype(x, lora_A, lora_B), device=x.device)
