"""Adapters of another dtype than x's: products that do not lose their precision."""

import torch
from torch import Tensor

_TERMS = 3
"""bf16 numbers that hold fp32's 24 bits, as csrc/cuda/arithmetic.h splits them."""


def adapters(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as the kernels take them: both in x's dtype, or both in fp32."""
    return (A, B) if A.dtype == B.dtype == dtype else (A.float(), B.float())


def terms_of(matrix: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Matrices of x's dtype whose sum is `matrix`, the largest first. Not for fp16: its numbers end at 2**-24."""
    if matrix.dtype == dtype or dtype == torch.float32:
        return [matrix.to(dtype)]
    assert dtype == torch.bfloat16, dtype
    rest, terms = matrix.float(), []
    for _ in range(_TERMS):
        terms.append(rest.to(dtype))
        rest = torch.where(terms[-1].isfinite(), rest - terms[-1].float(), 0)
    return terms


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, both of one dtype: rounded once where that is `dtype`, else the fp32 sums."""
    return left @ right if dtype == left.dtype else torch.mm(left, right, out_dtype=torch.float32)
