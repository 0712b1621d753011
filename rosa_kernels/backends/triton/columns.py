"""A copy of x by columns, for kernels that gather single features."""

import torch
from torch import Tensor

TOKEN_PADDING = 128
"""A multiple of every BLOCK_M and BLOCK_T of the kernels that read by_columns."""


def by_columns(x: Tensor) -> Tensor:
    """x (T, features) with tokens next to each other in memory, then zeros up to a multiple of TOKEN_PADDING."""
    T, features = x.shape
    columns = torch.empty(features, -(-T // TOKEN_PADDING) * TOKEN_PADDING, dtype=x.dtype, device=x.device)
    columns[:, :T] = x.T
    columns[:, T:].zero_()
    return columns.T[:T]
