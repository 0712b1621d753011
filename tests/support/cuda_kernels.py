"""torch.ops.rosa_kernels_cuda.*: one function for each kernel of csrc/cuda/kernels.h, which allocates the result.

T counts tokens. features are in_features where x is multiplied and out_features where dy is. R is r rounded up to
RANK_STEP. In the names of this field, shrink is H = x Aᵀ, from many features down to r; expand is H Bᵀ, which the
epilogue computes.
"""

import torch
from torch import Tensor

from rosa_kernels.backends.gpu import hardware, sizes
from rosa_kernels.backends.kept_H import RANK_STEP
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton.operands import NO_DROPOUT, Dropout, Sparse
from rosa_kernels.backends.triton.split_bf16_gemm import ALIGNMENT

# csrc/cuda/constants.h says what these are; tests/cuda/test_constants.py fails where the two differ.
MOST_LENGTH = sizes.MOST_LENGTH
TOKEN_PADDING = 64
ENTRY_PADDING, PACKED_ENTRY_BYTES = 32, 8
SPLIT_TERMS = 3
STATIC_SHARED_BYTES = 1024
SHRINK_TOKENS, SHRINK_STEP_BYTES = 16, 512
SHRINK_RANKS, SHRINK_RANKS_IN_TERMS, SHRINK_RANKS_BY_LANES = 64, 32, 16
LORA_GRAD_FEATURES, LORA_GRAD_RANKS, LORA_GRAD_STEP_TOKENS = 64, 32, 128
SDDMM_BLOCK_ENTRIES = 64
EPILOGUE_TOKENS = 16

_SDDMM_SPLIT_TOKENS = 512
"""A split of sddmm takes at least so many tokens, the kernel's longest step twice."""
_MOST_SPLITS = 16
_CHECKED = True
"""indices_checked of the ops that go by a pattern's indices: they were checked when the pattern was made."""
_kernels = torch.ops.rosa_kernels_cuda


def transpose(x: Tensor) -> Tensor:
    """xᵀ (features, T rounded up to TOKEN_PADDING) of x (T, features), with zeros beyond T."""
    x = unit_stride(x)
    T, features = x.shape
    out = torch.empty(features, cdiv(T, TOKEN_PADDING) * TOKEN_PADDING, dtype=x.dtype, device=x.device)
    _kernels.transpose(out, x)
    return out


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x[:, columns] of x (T, features), then columns of zeros up to a multiple of ALIGNMENT; columns is int32."""
    return _gather(x, columns.shape[0], columns, None, 0)


def gather_whole_rows(x: Tensor, crow: Tensor, count: int, row_length: int) -> Tensor:
    """As gather_columns, for the columns of x that belong to the `count` rows of S that are not empty.

    Each of these rows has row_length entries, so that the kernel finds them in crow.
    """
    return _gather(x, count, None, crow, row_length)


def _gather(x: Tensor, count: int, columns: Tensor | None, crow: Tensor | None, row_length: int) -> Tensor:
    padded = cdiv(count, ALIGNMENT) * ALIGNMENT
    allocate = torch.empty if padded == count else torch.zeros
    gathered = allocate(x.shape[0], padded, dtype=x.dtype, device=x.device)
    _kernels.gather_columns(gathered[:, :count], unit_stride(x), columns, crow, row_length, _CHECKED)
    return gathered


def pack_entries(S: Sparse) -> Tensor:
    """S's entries as the epilogue reads them: 8 bytes each, the column and the fp32 value; then room for padding."""
    packed_entries = torch.empty(S.nnz + ENTRY_PADDING, dtype=torch.int64, device=S.values.device)
    _kernels.pack_entries(packed_entries, S.col, S.permutation, kernel_dtype(S.values), _CHECKED)
    return packed_entries


def shrink(x: Tensor, A: Tensor, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """H = dropout(x) Aᵀ (T, R) in A's dtype; x (T, features), A (r, features) in x's dtype or fp32."""
    x, A = unit_stride(x), unit_stride(A)
    (T, features), R = x.shape, cdiv(A.shape[0], RANK_STEP) * RANK_STEP
    ranks = SHRINK_RANKS if A.dtype == x.dtype else SHRINK_RANKS_IN_TERMS
    tiles = cdiv(T, SHRINK_TOKENS) * cdiv(R, ranks if _on_tensor_cores(x, A) else SHRINK_RANKS_BY_LANES)
    splits, _ = hardware.splits_of(features, SHRINK_STEP_BYTES // x.element_size(), tiles, x.device, _MOST_SPLITS)
    H = torch.empty(T, R, dtype=A.dtype, device=x.device)
    _kernels.shrink(H, x, A, *_dropout_arguments(dropout), _parts(splits, H.shape, x.device))
    return H


def lora_grad(z: Tensor, H: Tensor, out: Tensor, scaling: float, dropout: Dropout = NO_DROPOUT) -> None:
    """out (features, r) = scaling · dropout(z)ᵀ H[:, :r]: dB from z = dy and H, or dAᵀ from z = x and dH in H's place.

    z is (T, features), and H (T, R) as shrink makes it. out has H's dtype and any strides.
    """
    z = unit_stride(z)
    (T, features), R = z.shape, H.shape[1]
    ranks = LORA_GRAD_RANKS if H.dtype == z.dtype and _on_tensor_cores(z, H) else RANK_STEP
    tiles = cdiv(features, LORA_GRAD_FEATURES) * cdiv(R, ranks)
    splits, _ = hardware.splits_of(T, LORA_GRAD_STEP_TOKENS, tiles, z.device, _MOST_SPLITS)
    _kernels.lora_grad(out, z, H, scaling, *_dropout_arguments(dropout), _parts(splits, (features, R), z.device))


def epilogue(
    y: Tensor, accumulate: bool, H: Tensor | None, B: Tensor | None, scaling: float, dropout: Dropout,
    crow: Tensor | None, packed_entries: Tensor | None, x: Tensor | None, x_transposed: Tensor | None,
    row_products: Tensor | None, in_features: int, bias: Tensor | None = None, row_terms: int = 1,
) -> None:  # fmt: skip
    """y = (y +) bias + scaling · dropout(H Bᵀ) + x Sᵀ; see csrc/cuda/kernels.h.

    The kernel reads x in tiles that must fit in shared memory; where they do not, x_transposed stands for x. Where S
    has whole rows, row_products (T, rows that are not empty) fp32 stands for both x and S.
    """
    _kernels.epilogue(
        y, accumulate, bias, H, B, scaling, *_dropout_arguments(dropout), crow, packed_entries, x, x_transposed,
        row_products, row_terms, in_features, hardware.multiprocessors(y.device), _CHECKED,
    )  # fmt: skip


def sddmm(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_t dy[t, row] x[t, col] for each entry (nnz,), one dot product after another."""
    dy, x = transpose(dy), transpose(x)
    nnz, padded_tokens = col.shape[0], x.shape[1]
    tiles = cdiv(nnz, SDDMM_BLOCK_ENTRIES)
    splits, _ = hardware.splits_of(padded_tokens, _SDDMM_SPLIT_TOKENS, tiles, x.device, _MOST_SPLITS)
    out = torch.empty(nnz, dtype=dtype if dtype == x.dtype else torch.float32, device=x.device)
    _kernels.sddmm(out, dy, x, crow, col, _parts(splits, (nnz,), x.device), _CHECKED)
    return out.to(dtype)


def gather_entries(matrix: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix at a pattern's places, (nnz,)."""
    out = torch.empty(col.shape, dtype=matrix.dtype, device=matrix.device)
    _kernels.gather_entries(out, unit_stride(matrix), crow, col, _CHECKED)
    return out.to(dtype)


def densify(out: Tensor, weight: Tensor | None, S: Sparse) -> Tensor:
    """out = weight + S, or S alone where weight is None; weight may be out itself. Returns out."""
    weight = None if weight is None else unit_stride(weight)
    _kernels.densify(out, weight, kernel_dtype(S.values), S.crow, S.col, _CHECKED)
    return out


def _parts(splits: int, shape, device: torch.device) -> Tensor | None:
    """Room for the sums of each split, which a second kernel adds in order; None where nothing is split."""
    return None if splits == 1 else torch.empty(splits, *shape, dtype=torch.float32, device=device)


def _dropout_arguments(dropout: Dropout) -> tuple[Tensor | None, int, float]:
    """(seed, threshold, scale) as the kernels take them."""
    return dropout.seed, dropout.threshold, dropout.keep_scale


def _on_tensor_cores(x: Tensor, other: Tensor) -> bool:
    """Whether x and the other operand meet on tensor cores: ON_TENSOR_CORES of csrc/cuda/device_functions.h."""
    return x.dtype == torch.bfloat16 or x.dtype == other.dtype == torch.float16


def unit_stride(matrix: Tensor) -> Tensor:
    """The same matrix with neighbours in a row next to each other in memory, copied where they are not."""
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def kernel_dtype(tensor: Tensor) -> Tensor:
    """The same numbers in a dtype that the kernels read: float64 becomes float32."""
    return tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
