"""dA and dB by library GEMMs, as several backends leave them to these."""

import torch
from torch import Tensor


def gradients_by_library(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, need_dH: bool, need_dA: bool, need_dB: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dA, dB, dH = dy B), None each where it is not needed.

    dy (T, out_features), x (T, in_features), lora_A (r, in_features) and lora_B (out_features, r) share a dtype.
    """
    dA = dB = dH = None
    if need_dH or need_dA:
        dH = dy @ lora_B
    if need_dA:
        dA = torch.addmm(lora_A, dH.T, x, beta=0, alpha=scaling)
    if need_dB:
        dB = torch.addmm(lora_B, dy.T, x @ lora_A.T, beta=0, alpha=scaling)
    return dA, dB, dH
