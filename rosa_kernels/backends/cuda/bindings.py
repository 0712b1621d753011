"""torch.ops.rosa_kernels_cuda.* with their results allocated: a function a kernel of csrc/cuda/kernels.h."""

import torch
from torch import Tensor

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Dropout, Sparse
from rosa_kernels.backends.gpu.split_bf16_gemm import ALIGNMENT
from rosa_kernels.backends.shapes import cdiv

RANK_STEP = 16
"""H has a multiple of it as columns; those beyond r are zeros."""
_SHRINK_TOKENS, _SHRINK_BYTES = 16, 512
_OUTER_FEATURES, _OUTER_TOKENS = 64, 128
_SDDMM_ENTRIES, _SDDMM_TOKENS = 64, 512
_COLUMN_PADDING = 64
_MOST_SPLITS = 16
_ENTRY_PADDING = 32
_library = torch.ops.rosa_kernels_cuda


def by_columns(x: Tensor) -> Tensor:
    """x (T, features) -> (features, T rounded up to 64), zeros beyond T."""
    x = unit_stride(x)
    T, features = x.shape
    columns = torch.empty(features, cdiv(T, _COLUMN_PADDING) * _COLUMN_PADDING, dtype=x.dtype, device=x.device)
    _library.by_columns(columns, x)
    return columns


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x (T, features)[:, columns] (T, count), then columns of zeros up to a multiple of ALIGNMENT; columns int32."""
    return _gather(x, columns.shape[0], columns, None, 0)


def gather_whole_rows(x: Tensor, crow: Tensor, count: int, width: int) -> Tensor:
    """As gather_columns: x (T, rows of S)[:, the `count` rows of S that are not empty], each of `width` entries."""
    return _gather(x, count, None, crow, width)


def _gather(x: Tensor, count: int, columns: Tensor | None, crow: Tensor | None, width: int) -> Tensor:
    padded = cdiv(count, ALIGNMENT) * ALIGNMENT
    allocate = torch.empty if padded == count else torch.zeros
    gathered = allocate(x.shape[0], padded, dtype=x.dtype, device=x.device)
    _library.gather_columns(gathered[:, :count], unit_stride(x), columns, crow, width)
    return gathered


def pack_entries(S: Sparse) -> Tensor:
    """(nnz and padding,) of 8 bytes: column and fp32 value of each entry."""
    entries = torch.empty(S.nnz + _ENTRY_PADDING, dtype=torch.int64, device=S.values.device)
    _library.pack_entries(entries, S.col, S.permutation, kernel_dtype(S.values))
    return entries


def shrink(x: Tensor, A: Tensor, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """x̂ Aᵀ (T, r rounded up to 16) in A's dtype; x (T, K), A (r, K) in x's dtype or fp32."""
    x, A = unit_stride(x), unit_stride(A)
    (T, K), R = x.shape, cdiv(A.shape[0], RANK_STEP) * RANK_STEP
    most = 16 if not _on_tensor_cores(x, A) else 64 if A.dtype == x.dtype else 32  # ranks a block, as in shrink.cu
    tiles = cdiv(T, _SHRINK_TOKENS) * cdiv(R, most)
    splits, _ = hardware.splits_of(K, _SHRINK_BYTES // x.element_size(), tiles, x.device, _MOST_SPLITS)
    H = torch.empty(T, R, dtype=A.dtype, device=x.device)
    _library.shrink(H, x, A, *_dropout_arguments(dropout), _parts(splits, H.shape, x.device))
    return H


def outer(z: Tensor, P: Tensor, out: Tensor, scaling: float, dropout: Dropout = NO_DROPOUT) -> None:
    """out (F, r), of any strides and P's dtype = scaling · ẑᵀ P[:, :r]; z (T, F), P (T, R) as shrink makes it."""
    z = unit_stride(z)
    (T, F), R = z.shape, P.shape[1]
    most = 32 if P.dtype == z.dtype and _on_tensor_cores(z, P) else 16  # ranks a block, as in outer.cu
    tiles = cdiv(F, _OUTER_FEATURES) * cdiv(R, most)
    splits, _ = hardware.splits_of(T, _OUTER_TOKENS, tiles, z.device, _MOST_SPLITS)
    _library.outer(out, z, P, scaling, *_dropout_arguments(dropout), _parts(splits, (F, R), z.device))


def epilogue(
    y: Tensor, accumulate: bool, H: Tensor | None, B: Tensor | None, scaling: float, dropout: Dropout,
    crow: Tensor | None, entries: Tensor | None, x: Tensor | None, x_columns: Tensor | None, D: Tensor | None,
    in_features: int,
) -> None:  # fmt: skip
    """y = (y +) scaling · dropout(H Bᵀ) + x Sᵀ + D at the rows of S that are not empty; see csrc/cuda/kernels.h.

    D (T, rows) fp32. x is read in tiles that fit in shared memory, or x_columns (by_columns) in its place.
    """
    _library.epilogue(
        y, accumulate, H, B, scaling, *_dropout_arguments(dropout), crow, entries, x, x_columns, D, in_features,
        hardware.multiprocessors(y.device),
    )  # fmt: skip


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """(nnz,) Σ_t dy[t, row] x[t, col], by entry."""
    dy, x = by_columns(dy), by_columns(x)
    nnz, padded = col.shape[0], x.shape[1]
    splits, _ = hardware.splits_of(padded, _SDDMM_TOKENS, cdiv(nnz, _SDDMM_ENTRIES), x.device, _MOST_SPLITS)
    out = torch.empty(nnz, dtype=dtype, device=x.device)
    _library.sddmm(out, dy, x, crow, col, _parts(splits, (nnz,), x.device))
    return out


def pick(matrix: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """(nnz,) the entries of a matrix at a pattern's places."""
    out = torch.empty(col.shape, dtype=dtype, device=matrix.device)
    _library.pick(out, unit_stride(matrix), crow, col)
    return out


def scatter(out: Tensor, base: Tensor | None, S: Sparse) -> Tensor:
    """out = base + S; base None: S alone, base = out: in place. Returns out."""
    _library.scatter(out, None if base is None else unit_stride(base), kernel_dtype(S.values), S.crow, S.col)
    return out


def _parts(splits: int, shape, device: torch.device) -> Tensor | None:
    return None if splits == 1 else torch.empty(splits, *shape, dtype=torch.float32, device=device)


def _dropout_arguments(dropout: Dropout) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale) as the kernels take them."""
    return dropout.seed, dropout.threshold, dropout.keep_scale


def _on_tensor_cores(x: Tensor, other: Tensor) -> bool:
    """As csrc/cuda/arithmetic.h says of their dtypes."""
    return x.dtype == torch.bfloat16 or x.dtype == other.dtype == torch.float16


def unit_stride(matrix: Tensor) -> Tensor:
    """The same numbers with neighbours in a row next to each other in memory."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def kernel_dtype(tensor: Tensor) -> Tensor:
    """In a dtype that the kernels read."""
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
