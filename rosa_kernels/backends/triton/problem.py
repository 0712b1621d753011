"""The operands that kernels share: dropout's numbers and the sparse delta, in either orientation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.autograd import transposed_structure
from rosa_kernels.dropout import drop_threshold, keep_scale


class Dropout(NamedTuple):
    """seed: a tensor that kernels read, None for none. threshold: drop_threshold less 2**31, as an int32 holds it."""

    seed: Tensor | None
    keep_scale: float
    threshold: int

    @classmethod
    def of(cls, dropout_p: float, seed: Tensor | None) -> Dropout:
        if seed is None:
            return NO_DROPOUT
        # p = 1 keeps one word in 2**32, times 0.
        threshold = min(drop_threshold(dropout_p), 2**32 - 1) - 2**31
        return cls(seed, keep_scale(dropout_p), threshold)


NO_DROPOUT = Dropout(None, 1.0, 0)


@dataclass(frozen=True)
class Sparse:
    """S (N, K): values (nnz,) at crow (N + 1,), col (nnz,); entry e's is values[permutation[e]] if there is one.

    transpose_of: the S of row order that this one is the transpose of.
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    structure: int
    shape: tuple[int, int]
    permutation: Tensor | None = None
    transpose_of: Sparse | None = None

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    def transposed(self, ccol: Tensor, row: Tensor, permutation: Tensor) -> Sparse:
        structure = transposed_structure(self.structure)
        return Sparse(self.values, ccol, row, structure, self.shape[::-1], permutation, self)

    def whole_rows(self) -> Tensor:
        """(rows that are not empty, K): their values, for structure ROW."""
        K = self.shape[1]
        count = self.nnz // K
        return self.values.view(count, K) if self.permutation is None else self.values.view(K, count).T


def sparse_of(values: Tensor | None, crow: Tensor, col: Tensor, structure: int, in_features: int) -> Sparse | None:
    """None where there is nothing to add."""
    if values is None or values.shape[0] == 0:
        return None
    return Sparse(values.contiguous(), crow, col, structure, (crow.shape[0] - 1, in_features))


TOKEN_PADDING = 128
"""A multiple of every BLOCK_M and BLOCK_T of the kernels that read by_columns."""


def by_columns(x: Tensor) -> Tensor:
    """x (T, features) with tokens next to each other in memory, then zeros up to a multiple of TOKEN_PADDING."""
    T, features = x.shape
    columns = torch.empty(features, -(-T // TOKEN_PADDING) * TOKEN_PADDING, dtype=x.dtype, device=x.device)
    columns[:, :T] = x.T
    columns[:, T:].zero_()
    return columns.T[:T]
