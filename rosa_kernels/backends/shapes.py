"""Sizes, as all backends count them."""

import math

from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """(..., features) -> (T, features), a view where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def cdiv(length: int, block: int) -> int:
    """How many blocks cover the length."""
    return -(-length // block)
