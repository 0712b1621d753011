"""Adapters of another dtype than x's: what the library can multiply x by without losing their precision."""

import torch
from torch import Tensor

_TERMS = {torch.bfloat16: 3, torch.float16: 2}
"""Numbers of the dtype that hold fp32's 24 bits, as csrc/cuda/arithmetic.h splits them."""


def adapters(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as the kernels take them: both in x's dtype, or both in fp32."""
    return (A, B) if A.dtype == B.dtype == dtype else (A.float(), B.float())


def terms_of(matrix: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Matrices of the dtype whose sum is `matrix`, the largest first."""
    if matrix.dtype == dtype or dtype == torch.float32:
        return [matrix.to(dtype)]
    rest, terms = matrix.float(), []
    for _ in range(_TERMS[dtype]):
        terms.append(rest.to(dtype))
        rest = rest - terms[-1].float()
    return terms


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with the fp32 sums as they are; both of one dtype."""
    return left @ right if left.dtype == torch.float32 else torch.mm(left, right, out_dtype=torch.float32)
