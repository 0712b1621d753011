"""How backends see x of any number of dimensions."""

import math

from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """(..., features) -> (tokens, features); a view where the strides allow it."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
