"""dS: Σ_t dy[t, row_e] x[t, col_e] for each entry e of a pattern."""

import torch
from torch import Tensor

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.backend import GpuBackend
from rosa_kernels.backends.gpu.cost_model import SDDMMCall
from rosa_kernels.backends.gpu.split_bf16_gemm import matmul
from rosa_kernels.pattern import ROW


def sddmm(
    backend: GpuBackend, dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, structure: int, dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(nnz,) of dtype; dy (T, out_features) and x (T, in_features) of one dtype and any strides.

    rows: those of a ROW pattern that are not empty, if they are at hand.
    """
    (T, out_features), in_features, nnz = dy.shape, x.shape[1], col.shape[0]
    if nnz == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    tf32 = hardware.precision(x) == "tf32"
    call = SDDMMCall(T, out_features, in_features, nnz, structure, x.element_size(), tf32, dtype != x.dtype)
    rates = device_rates.rates(x.device, hardware.architecture(x.device))
    algorithm = backend.heuristics.choose_sddmm(call, rates)
    if algorithm == "packed":
        return _packed(backend, dy, x, crow, col, structure, dtype, rows).to(dtype)
    if algorithm == "library":
        return backend.gather_entries(matmul(dy.T, x, dtype), crow, col, dtype)
    return backend.sddmm_kernels[algorithm](dy, x, crow, col, dtype)


def _packed(backend, dy, x, crow, col, structure, dtype, rows) -> Tensor:
    """For whole rows a GEMM of their columns of dy, for whole columns one of those of x."""
    out_features, in_features, nnz = dy.shape[1], x.shape[1], col.shape[0]
    if structure == ROW:
        count = nnz // in_features
        if rows is None:
            dy = backend.gather_whole_rows(dy, crow, count, in_features)
        else:
            dy = backend.gather_columns(dy, rows)
        return matmul(dy.T, x, dtype)[:count].reshape(-1)
    count = nnz // out_features
    return matmul(dy.T, backend.gather_columns(x, col[:count]), dtype)[:, :count].reshape(-1)
