"""Ragged batches: nested tensors of layout torch.jagged, which hold their tokens one after the other in one tensor."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rosa_kernels import transforms


def on_values(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """function(x) of a jagged tensor x, for a function that treats each token of (tokens, ...) by itself.

    Raises:
        ValueError: x has layout torch.strided, or its last size is the ragged one.
    """
    if x.layout is not torch.jagged:
        raise ValueError(f"x: expected a nested tensor of layout torch.jagged, got one of {x.layout}")
    ragged_dim = x._ragged_idx
    if ragged_dim == x.dim() - 1 and x.is_floating_point():
        raise ValueError(f"x: expected shape (..., in_features), got {tuple(x.shape)}, ragged in its features")
    parts = _Parts(x.offsets(), x.lengths(), ragged_dim, x._maybe_min_seqlen, x._maybe_max_seqlen)
    # PyTorch's own views can be traced and transformed, but not differentiated twice.
    if torch.compiler.is_compiling() or transforms.active() or transforms.in_forward_mode():
        return _jagged(function(x.values()), parts)
    return _ToJagged.apply(function(_ToValues.apply(x, parts)), parts)


class _Parts(NamedTuple):
    """How a jagged tensor is cut into its parts, by the names of torch.nested.nested_tensor_from_jagged."""

    offsets: Tensor
    lengths: Tensor | None
    jagged_dim: int
    min_seqlen: int | None
    max_seqlen: int | None


def _jagged(values: Tensor, parts: _Parts) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, **parts._asdict())


class _ToValues(Function):
    """The tokens of a jagged tensor. Each of these two functions has the other one as its derivative."""

    @staticmethod
    def forward(ctx, x, parts):
        ctx.parts = parts
        return x.detach().values()

    @staticmethod
    def backward(ctx, dvalues):
        return _ToJagged.apply(dvalues, ctx.parts), None


class _ToJagged(Function):
    """The jagged tensor of these tokens."""

    @staticmethod
    def forward(ctx, values, parts):
        ctx.parts = parts
        return _jagged(values.detach(), parts)

    @staticmethod
    def backward(ctx, dx):
        return _ToValues.apply(dx, ctx.parts), None
