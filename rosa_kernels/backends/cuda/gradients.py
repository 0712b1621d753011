"""dA, dB and dS."""

import torch
from torch import Tensor

from rosa_kernels.backends import lora_gemm
from rosa_kernels.backends.cuda import bindings, heuristics
from rosa_kernels.backends.gpu import cost_model, device_rates, hardware
from rosa_kernels.backends.gpu.split_bf16_gemm import adapters, matmul
from rosa_kernels.pattern import ROW


def low_rank_gradients(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB):
    """As gpu_ops.Kernels says; dH as bindings.shrink gives it."""
    if dropout.seed is None and x.dtype == lora_A.dtype == lora_B.dtype:  # the kernels would read x and dy twice too
        dA, dB, dH = lora_gemm.low_rank_gradients(dy, x, lora_A, lora_B, scaling, need_dx, need_dA, need_dB)
        return dA, dB, _padded(dH)
    A, B = adapters(lora_A, lora_B, x.dtype)
    dA = dB = dH = None
    if need_dB:
        dB = torch.empty(B.shape, dtype=B.dtype, device=x.device)
        bindings.lora_grad(dy, bindings.shrink(x, A, dropout), dB, scaling)
        dB = dB.to(lora_B.dtype)
    if need_dA:
        dH = bindings.shrink(dy, B.T)
        dA = torch.empty(A.shape, dtype=A.dtype, device=x.device)
        bindings.lora_grad(x, dH, dA.T, scaling, dropout)
        dA = dA.to(lora_A.dtype)
    return dA, dB, dH


def _padded(H: Tensor | None) -> Tensor | None:
    """H (T, r) with zeros up to a multiple of bindings.RANK_STEP."""
    if H is None or H.shape[1] % bindings.RANK_STEP == 0:
        return H
    return torch.nn.functional.pad(H, (0, -H.shape[1] % bindings.RANK_STEP))


def sddmm(dy, x, crow, col, structure, dtype, rows=None):
    """As gpu_ops.Kernels says; dy (T, M), x (T, N) of one dtype and any strides."""
    (T, M), N, nnz = dy.shape, x.shape[1], col.shape[0]
    if nnz == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    tf32 = hardware.precision(x) == "tf32"
    call = cost_model.SDDMMCall(T, M, N, nnz, structure, x.element_size(), tf32, dtype != x.dtype)
    way = heuristics.choose_sddmm(call, device_rates.rates(x.device, hardware.target(x.device)))
    return take_sddmm(way, dy, x, crow, col, structure, dtype, rows)


def take_sddmm(way, dy, x, crow, col, structure, dtype, rows=None):
    """sddmm by one of heuristics.sddmm_ways; nnz > 0."""
    M, N, nnz = dy.shape[1], x.shape[1], col.shape[0]
    if dtype not in (x.dtype, torch.float32):  # wider, or of another kind of 16 bits
        return take_sddmm(way, dy, x, crow, col, structure, torch.float32, rows).to(dtype)
    if way == "entries_columns":
        return bindings.sddmm(dy, x, crow, col, dtype)
    if way == "library":
        return bindings.gather_entries(matmul(dy.T, x, dtype), crow, col, dtype)
    if structure == ROW:
        count = nnz // N
        dy = bindings.gather_whole_rows(dy, crow, count, N) if rows is None else bindings.gather_columns(dy, rows)
        return matmul(dy.T, x, dtype)[:count].reshape(-1)
    count = nnz // M
    return matmul(dy.T, bindings.gather_columns(x, col[:count]), dtype)[:, :count].reshape(-1)
