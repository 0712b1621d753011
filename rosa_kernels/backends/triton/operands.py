"""What the Triton backend computes with: dropout's numbers, S, and the whole problem of y or of dx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.backends.gpu import cost_model
from rosa_kernels.backends.triton.calls import linear_call
from rosa_kernels.dropout import drop_threshold, keep_scale
from rosa_kernels.pattern import transposed_structure


class Dropout(NamedTuple):
    """Kernels read the seed from its tensor; None is no dropout. Random words below the threshold are dropped: all of
    them at 2**32."""

    seed: Tensor | None
    keep_scale: float
    threshold: int

    @classmethod
    def of(cls, dropout_p: float, seed: Tensor | None) -> Dropout:
        if seed is None:
            return NO_DROPOUT
        return cls(seed, keep_scale(dropout_p), drop_threshold(dropout_p))


NO_DROPOUT = Dropout(None, 1.0, 0)


@dataclass(frozen=True)
class Sparse:
    """S (N, K) by rows: values (nnz,) at crow (N + 1,) and col (nnz,).

    A transposed S shares the values of the layer's: entry e has values[permutation[e]].
    """

    values: Tensor
    crow: Tensor
    col: Tensor
    structure: int
    shape: tuple[int, int]
    permutation: Tensor | None = None
    transpose_of: Sparse | None = None
    """The layer's S, in row order, where this one is its transpose."""

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    def transposed(self, ccol: Tensor, row: Tensor, permutation: Tensor) -> Sparse:
        structure = transposed_structure(self.structure)
        return Sparse(self.values, ccol, row, structure, self.shape[::-1], permutation, self)

    def whole_rows(self) -> Tensor:
        """The values of the rows that are not empty, for structure ROW: (rows, K)."""
        K = self.shape[1]
        count = self.nnz // K
        return self.values.view(count, K) if self.permutation is None else self.values.view(K, count).T

    def whole_columns(self) -> Tensor:
        """The values of the columns that are not empty, for structure COLUMN: (N, columns)."""
        N = self.shape[0]
        count = self.nnz // N
        return self.values.view(N, count) if self.permutation is None else self.values.view(count, N).T


def sparse_of(values: Tensor | None, crow: Tensor, col: Tensor, structure: int, in_features: int) -> Sparse | None:
    """None where there is nothing to add."""
    if values is None or values.shape[0] == 0:
        return None
    return Sparse(values.contiguous(), crow, col, structure, (crow.shape[0] - 1, in_features))


class LinearProblem(NamedTuple):
    """y = x Wᵀ + b + scaling · H Bᵀ + x Sᵀ, where H = x Aᵀ.

    A backward's dx has the same form: x stands for dy, out_features for the layer's in_features, and every matrix is
    transposed. With N for out_features and K for x's features: x (T, K), weight (N, K), bias (N,), A (r, K), B (N, r),
    S (N, K), or None each.
    """

    x: Tensor
    out_features: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0
    S: Sparse | None = None
    H: Tensor | None = None
    """x Aᵀ where it is known already, in the form of backends/kept_H.py."""
    keeps_H: bool = False
    """H is made for the backward, whether or not y needs it."""
    dropout: Dropout = NO_DROPOUT
    drop_at: str = ""
    """Where dropout acts: on "x" before A, on the low-rank part of "out", or "" nowhere."""
    layer: tuple[Tensor | None, Tensor | None, Tensor | None, Sparse | None] | None = None
    """(weight, lora_A, lora_B, S) of the layer, where the matrices here are their transposes."""

    def library_operand(self, values: Tensor) -> Tensor:
        """Values of S for a library GEMM. In bf16 wider values are rounded where H beside them is rounded too."""
        return values.to(self.x.dtype) if self.B is not None and self.x.dtype == torch.bfloat16 else values

    def call(self) -> cost_model.LinearCall:
        """What the heuristics need to know."""
        (T, in_features), S = self.x.shape, self.S
        values, structure = (None, 0) if S is None else (S.values, S.structure)
        return linear_call(
            self.x, T, self.out_features, in_features, self.weight, self.A, self.B, values, structure, self.drop_at,
            self.H is not None, self.keeps_H,
        )  # fmt: skip
