"""Ragged batches: nested tensors of layout torch.jagged, which hold their tokens one after the other in one tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_values(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """function(x) of a jagged tensor x, for a function that treats each token of (tokens, ...) by itself.

    PyTorch has no second derivatives of the view that it returns, and raises NotImplementedError.

    Raises:
        ValueError: x has layout torch.strided, or its last size is the ragged one.
    """
    if x.layout is not torch.jagged:
        raise ValueError(f"x: expected a nested tensor of layout torch.jagged, got one of {x.layout}")
    ragged_dim = x._ragged_idx
    if ragged_dim == x.dim() - 1 and x.is_floating_point():
        raise ValueError(f"x: expected shape (..., in_features), got {tuple(x.shape)}, ragged in its features")
    return torch.nested.nested_tensor_from_jagged(
        function(x.values()),
        offsets=x.offsets(),
        lengths=x.lengths(),
        jagged_dim=ragged_dim,
        min_seqlen=x._maybe_min_seqlen,
        max_seqlen=x._maybe_max_seqlen,
    )
