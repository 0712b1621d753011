"""What a GPU backend brings to the algorithms of this folder."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple


class GpuBackend(NamedTuple):
    """The functions that differ between Triton and CUDA. Each backend has its own form of H, which its kernels read."""

    heuristics: ModuleType
    """choose_linear(LinearCall, Rates) and choose_sddmm(SDDMMCall, Rates) name the algorithm of a call.
    low_rank_gradients_by_library says whether library GEMMs make dA and dB, where dropout and dtypes allow it."""
    finish_linear: Callable
    """(y or None, LinearProblem, algorithm) -> y with everything that library calls have left."""
    gradients_by_kernels: Callable
    """(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB) -> (dA, dB, dH), as in gpu/lora.py."""
    H_of_matrix: Callable
    """(T, r) in x's dtype -> the same H in the backend's form."""
    matrix_of_H: Callable
    """(H in the backend's form, r) -> (T, r). An algorithm with low_rank "library" asks for it."""
    sddmm_kernels: dict[str, Callable]
    """By the name of the algorithm: (dy, x, crow, col, dtype) -> dS (nnz,) of dtype, nnz > 0."""
    gather_columns: Callable
    """(x (T, features), columns) -> (T, count), then columns of zeros up to a multiple of ALIGNMENT."""
    gather_whole_rows: Callable
    """(dy, crow, count, in_features) -> as gather_columns, for the `count` rows that have all columns."""
    gather_entries: Callable
    """(dW, crow, col, dtype) -> (nnz,) the pattern's entries of dW."""
    densify: Callable
    """(out, weight, S) -> out = weight + S. weight None: S alone; weight is out: S is added in place."""
