"""Sizes, as all backends count them."""

import math

from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """(..., features) -> (T, features), a view where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(tokens_of(x), x.shape[-1])


def tokens_of(x: Tensor) -> int:
    """T of x (..., features)."""
    return math.prod(x.shape[:-1])


def cdiv(length: int, block: int) -> int:
    """How many blocks cover the length."""
    return -(-length // block)
