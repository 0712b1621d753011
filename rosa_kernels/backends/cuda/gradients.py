"""dA and dB by kernels, and H as they take it."""

import torch
from torch import Tensor

from rosa_kernels.backends.cuda import bindings
from rosa_kernels.backends.gpu.split_bf16_gemm import adapters


def H_of_matrix(H: Tensor) -> Tensor:
    """H (T, r) with zeros up to a multiple of bindings.RANK_STEP, as bindings.shrink makes it."""
    if H.shape[1] % bindings.RANK_STEP == 0:
        return H
    return torch.nn.functional.pad(H, (0, -H.shape[1] % bindings.RANK_STEP))


def matrix_of_H(H: Tensor, r: int) -> Tensor:
    return H[:, :r]


def gradients_by_kernels(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB):
    """As gpu/lora.py says."""
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
