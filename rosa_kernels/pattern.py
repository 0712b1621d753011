"""CSRPattern: where a sparse matrix S (out_features, in_features) may be non-zero."""

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor

from rosa_kernels import transforms

UNSTRUCTURED, ROW, COLUMN, BLOCK, BLOCK16 = range(5)
"""What S consists of. BLOCK16 has blocks whose size is a multiple of 16, the smallest side of a tensor core's tile."""
STRUCTURE_NUMBERS = range(BLOCK16 + 1)
STRUCTURES = ("unstructured", "row", "column", "block")
_TRANSPOSED = {ROW: COLUMN, COLUMN: ROW}

MOST_ENTRIES = 2**31 - 2**20
"""Kernels count entries in int32, and a last step past the end must not wrap."""


CSC = tuple[Tensor, Tensor, Tensor]
"""A pattern by columns: ccol_indices, row_indices and permutation, int32."""


class CSRPattern:
    """Where a sparse matrix S has entries, in compressed sparse row (CSR) form; their values are a tensor of their own.

    Entry e of the values (nnz,) sits at row i and column ``col_indices[e]`` where
    ``crow_indices[i] <= e < crow_indices[i + 1]``. A value that is zero keeps its place.

    Attributes: ``shape``, (out_features, in_features) of S; ``crow_indices`` and ``col_indices``, int32 copies of the
    arguments; ``nnz``, the number of entries; ``density``, their share of S; ``device``.

    Args:
        crow_indices: (out_features + 1,) integers, the first 0, the last nnz, never falling.
        col_indices: (nnz,) integers in [0, in_features), rising within each row without repeats.
        shape: (out_features, in_features) of S.

    Raises:
        ValueError: an argument is not as above; the message names it, what was expected and what came.
        TypeError: an argument has the wrong Python type.
    """

    def __init__(self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]):
        self.shape = _checked_shape(shape)
        _check_indices(crow_indices, col_indices, self.shape)
        # Copies: what was checked must not change behind a kernel's back.
        self.crow_indices = crow_indices.to(torch.int32, copy=True)
        self.col_indices = col_indices.to(torch.int32, copy=True)
        self.structure = _detect_structure(self.crow_indices, self.col_indices, self.shape)
        self._transposed: CSC | None = None

    @classmethod
    def _trusted(
        cls, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], structure: int, transposed: CSC | None
    ) -> "CSRPattern":
        """A pattern from tensors that an earlier pattern checked: no validation, no synchronisation."""
        pattern = cls.__new__(cls)
        pattern.shape = shape
        pattern.crow_indices = crow_indices
        pattern.col_indices = col_indices
        pattern.structure = structure
        pattern._transposed = transposed
        return pattern

    @classmethod
    def from_mask(cls, mask: Tensor) -> "CSRPattern":
        """The pattern whose entries are the true ones of a bool mask (out_features, in_features)."""
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a Tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask: expected a 2-D bool tensor, got {_describe(mask)}")
        crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(1), 0, out=crow[1:])
        return cls(crow, mask.nonzero()[:, 1], (mask.shape[0], mask.shape[1]))

    @classmethod
    def from_rows(cls, rows: Tensor, shape: tuple[int, int]) -> "CSRPattern":
        """The pattern of whole rows of S. rows: (n,) distinct integers in [0, out_features), in any order."""
        shape = _checked_shape(shape)
        chosen = _chosen(rows, "rows", shape[0])
        crow = torch.zeros(shape[0] + 1, dtype=torch.int64, device=chosen.device)
        torch.cumsum(chosen * shape[1], 0, out=crow[1:])
        count = int(chosen.sum())
        return cls(crow, torch.arange(shape[1], device=chosen.device).repeat(count), shape)

    @classmethod
    def from_columns(cls, cols: Tensor, shape: tuple[int, int]) -> "CSRPattern":
        """The pattern of whole columns of S. cols: (n,) distinct integers in [0, in_features), in any order."""
        shape = _checked_shape(shape)
        sorted_cols = _chosen(cols, "cols", shape[1]).nonzero()[:, 0]
        crow = torch.arange(shape[0] + 1, device=sorted_cols.device) * sorted_cols.numel()
        return cls(crow, sorted_cols.repeat(shape[0]), shape)

    @classmethod
    def from_blocks(cls, block_mask: Tensor, block_size: int, shape: tuple[int, int]) -> "CSRPattern":
        """The pattern of square blocks of S; those on the lower and right edges are cut to fit.

        Args:
            block_mask: (ceil(out_features / block_size), ceil(in_features / block_size)) bools, true for each block.
            block_size: the side of a block.
            shape: (out_features, in_features) of S.
        """
        out_features, in_features = shape = _checked_shape(shape)
        block_size = operator.index(block_size)
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        grid = (-(-out_features // block_size), -(-in_features // block_size))
        if block_mask.dtype != torch.bool or tuple(block_mask.shape) != grid:
            raise ValueError(f"block_mask: expected a bool tensor of shape {grid}, got {_describe(block_mask)}")
        mask = block_mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        pattern = cls.from_mask(mask[:out_features, :in_features])
        if pattern.structure == UNSTRUCTURED:
            pattern.structure = block_structure(block_size)
        return pattern

    @classmethod
    def random(cls, shape: tuple[int, int], density: float, seed: int) -> "CSRPattern":
        """A pattern of round(density * out_features * in_features) entries, drawn uniformly: the same for one seed."""
        shape = _checked_shape(shape)
        if not 0 <= density <= 1:
            raise ValueError(f"density: expected a number in [0, 1], got {density}")
        size = shape[0] * shape[1]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(size, generator=generator)[: round(density * size)].sort().values
        return cls(*_csr_from_flat(chosen, shape), shape)

    @property
    def nnz(self) -> int:
        return self.col_indices.shape[0]

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def structure_name(self) -> str:
        """What S consists of: "unstructured", "row", "column" or "block"."""
        return STRUCTURES[min(self.structure, BLOCK)]

    @property
    def device(self) -> torch.device:
        return self.col_indices.device

    def row_of_entry(self) -> Tensor:
        """(nnz,) int64: the row of each entry."""
        rows = torch.arange(self.shape[0], device=self.device)
        return rows.repeat_interleave(self.crow_indices.diff(), output_size=self.nnz)

    def transpose(self) -> CSC:
        """The pattern by columns: (ccol_indices, row_indices, permutation), int32.

        Sizes are (in_features + 1,), (nnz,) and (nnz,). Entry k by columns is entry ``permutation[k]`` by rows, so that
        ``values[permutation]`` are the values of Sᵀ in CSR form.
        """
        if self._transposed is not None:
            return self._transposed
        by_columns = self._csc()
        if torch.compiler.is_dynamo_compiling() or all(map(self._may_keep, by_columns)):
            self._transposed = by_columns
        return by_columns

    def _may_keep(self, tensor: Tensor) -> bool:
        """Not what belongs to a trace or a transform, nor to inference mode, where the pattern itself does not."""
        return transforms.holds_numbers(tensor) and (self.col_indices.is_inference() or not tensor.is_inference())

    def _csc(self) -> CSC:
        bounds = torch.arange(self.shape[1] + 1, device=self.device)
        if self.nnz == 0:  # torch.compile of a sort of nothing fails on GPUs (torch 2.11)
            return torch.zeros_like(bounds, dtype=torch.int32), self.col_indices, self.col_indices
        columns = self.col_indices.long()
        permutation = torch.argsort(columns, stable=True)
        return (
            torch.searchsorted(columns[permutation], bounds, out_int32=True),
            self.row_of_entry()[permutation].to(torch.int32),
            permutation.to(torch.int32),
        )

    def to_mask(self) -> Tensor:
        """(out_features, in_features) bools, true where S has an entry."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask[self.row_of_entry(), self.col_indices.long()] = True
        return mask

    def to(self, device: torch.device | str) -> "CSRPattern":
        """The pattern on another device; the same object where it already is there."""
        if torch.device(device) == self.device:
            return self
        csc = self._transposed
        moved = csc and (csc[0].to(device), csc[1].to(device), csc[2].to(device))
        return CSRPattern._trusted(
            self.crow_indices.to(device), self.col_indices.to(device), self.shape, self.structure, moved
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CSRPattern)
            and self.shape == other.shape
            and torch.equal(self.crow_indices, other.crow_indices)
            and torch.equal(self.col_indices, other.col_indices)
        )

    __hash__ = object.__hash__  # by identity: the indices may lie on a GPU

    def __repr__(self) -> str:
        return (
            f"CSRPattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g}, "
            f"structure={self.structure_name!r}, device={str(self.device)!r})"
        )


def transposed_structure(structure: int) -> int:
    """The structure of Sᵀ, from that of S."""
    return _TRANSPOSED.get(structure, structure)


def consists_of_blocks(pattern: CSRPattern, size: int) -> bool:
    """Whether a pattern consists of whole squares of this size, those on the lower and right edges cut to fit."""
    out_features, in_features = pattern.shape
    across = -(-in_features // size)
    squares = torch.unique(pattern.row_of_entry() // size * across + pattern.col_indices.long() // size)
    heights = (out_features - squares // max(1, across) * size).clamp(max=size)
    widths = (in_features - squares % max(1, across) * size).clamp(max=size)
    return int((heights * widths).sum()) == pattern.nnz


def has_structure(pattern: CSRPattern, structure: int) -> bool:
    """Whether a kernel may rely on a structure. From BLOCK none expects anything: the kernels look for blocks."""
    if structure == ROW:
        return _consists_of_rows(pattern.crow_indices, pattern.shape[1])
    if structure == COLUMN:
        return _consists_of_columns(pattern.crow_indices, pattern.col_indices)
    return structure != BLOCK16 or consists_of_blocks(pattern, 16)


def block_structure(block_size: int) -> int:
    """The structure of a pattern that consists of blocks of this size."""
    return BLOCK16 if block_size % 16 == 0 else BLOCK


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _checked_shape(shape: Iterable[SupportsIndex]) -> tuple[int, int]:
    sizes = tuple(map(operator.index, shape))
    if len(sizes) != 2 or not all(0 <= size < 2**31 for size in sizes):
        raise ValueError(f"shape: expected (out_features, in_features), each below 2**31, got {sizes}")
    return sizes[0], sizes[1]


def _chosen(indices: Tensor, name: str, size: int) -> Tensor:
    """(size,) bools, true at the given distinct indices."""
    indices = torch.as_tensor(indices)
    if indices.numel() == 0:
        indices = indices.long()
    if indices.dim() != 1 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name}: expected a 1-D integer tensor, got {_describe(indices)}")
    if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < size):
        raise ValueError(f"{name}: expected indices in [0, {size}), got {int(indices.min())} to {int(indices.max())}")
    counts = torch.bincount(indices.long(), minlength=size)
    if indices.numel() and int(counts.max()) > 1:
        raise ValueError(f"{name}: expected distinct indices, got {int(counts.argmax())} more than once")
    return counts.bool()


def _csr_from_flat(flat: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sorted flat positions row * in_features + column -> (crow_indices, col_indices), int64."""
    in_features = max(1, shape[1])
    crow = torch.zeros(shape[0] + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(torch.bincount(flat // in_features, minlength=shape[0]), 0, out=crow[1:])
    return crow, flat % in_features


def _check_indices(crow: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
    for name, indices in (("crow_indices", crow), ("col_indices", col)):
        if not isinstance(indices, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(indices).__name__}")
        if indices.dim() != 1 or indices.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            raise ValueError(f"{name}: expected a 1-D integer tensor, got {_describe(indices)}")
    if crow.device != col.device:
        raise ValueError(f"col_indices: expected on {crow.device} as crow_indices, got {col.device}")
    if crow.numel() != shape[0] + 1:
        raise ValueError(f"crow_indices: expected out_features + 1 = {shape[0] + 1} entries, got {crow.numel()}")
    if col.numel() > MOST_ENTRIES:
        raise ValueError(f"col_indices: expected at most {MOST_ENTRIES} entries, got {col.numel()}")
    crow, col = crow.long(), col.long()
    first, last, nnz = int(crow[0]), int(crow[-1]), col.numel()
    if first != 0 or last != nnz:
        raise ValueError(f"crow_indices: expected to start at 0 and end at nnz = {nnz}, got {first} and {last}")
    counts = crow.diff()
    if bool((counts < 0).any()):
        raise ValueError(f"crow_indices: expected never to fall, got a fall at row {int((counts < 0).nonzero()[0])}")
    if nnz == 0:
        return
    if not (0 <= int(col.min()) and int(col.max()) < shape[1]):
        raise ValueError(
            f"col_indices: expected values in [0, in_features = {shape[1]}), got {int(col.min())} to {int(col.max())}"
        )
    rows = torch.arange(shape[0], device=crow.device).repeat_interleave(counts, output_size=nnz)
    steps = (rows * shape[1] + col).diff()
    if bool((steps <= 0).any()):
        entry = int((steps <= 0).nonzero()[0]) + 1
        fault = "a duplicate" if int(steps[entry - 1]) == 0 else "an unsorted index"
        raise ValueError(
            f"col_indices: expected to rise within each row, got {fault} at entry {entry} "
            f"(row {int(rows[entry])}, column {int(col[entry])})"
        )


def _detect_structure(crow: Tensor, col: Tensor, shape: tuple[int, int]) -> int:
    """ROW where each row is full or empty, COLUMN where all rows have the same columns, else UNSTRUCTURED."""
    if col.numel() == 0:
        return UNSTRUCTURED
    if _consists_of_rows(crow, shape[1]):
        return ROW
    return COLUMN if _consists_of_columns(crow, col) else UNSTRUCTURED


def _consists_of_rows(crow: Tensor, in_features: int) -> bool:
    counts = crow.diff()
    return bool(((counts == 0) | (counts == in_features)).all())


def _consists_of_columns(crow: Tensor, col: Tensor) -> bool:
    counts = crow.diff()
    out_features = counts.numel()
    width = col.numel() // max(1, out_features)
    return bool((counts == width).all()) and bool((col.view(out_features, width) == col[:width]).all())
