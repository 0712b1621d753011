"""The calls of cost_model.py from the tensors of an op. These functions run in every call."""

import torch
from torch import Tensor

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall


def linear_call(
    x: Tensor, tokens: int, out_features: int, in_features: int, weight: Tensor | None, lora_A: Tensor | None,
    lora_B: Tensor | None, values: Tensor | None, structure: int, dropout: str = "", H_known: bool = False,
    keeps_H: bool = False,
) -> LinearCall:  # fmt: skip
    """y from x; or dx from dy in x's place, with the layer's sizes swapped and the structure of Sᵀ."""
    dtype, r, mixed_lora, nnz, mixed_values = x.dtype, 0, False, 0, False
    if lora_A is not None:
        r, mixed_lora = lora_A.shape[0], not lora_A.dtype == lora_B.dtype == dtype
    if values is not None:
        nnz, mixed_values = values.shape[0], values.dtype != dtype
    tf32 = dtype == torch.float32 and hardware.precision(x) == "tf32"
    return LinearCall(  # by position, which is faster
        tokens, out_features, in_features, r, nnz, structure if nnz else 0, dtype.itemsize, tf32, weight is not None,
        dropout if r else "", mixed_lora, mixed_values, H_known and r > 0, dtype == torch.float16, keeps_H,
    )  # fmt: skip


def sddmm_call(
    x: Tensor, tokens: int, out_features: int, in_features: int, nnz: int, structure: int, dtype: torch.dtype
) -> SDDMMCall:
    """dS of a dtype from dy and x."""
    tf32 = x.dtype == torch.float32 and hardware.precision(x) == "tf32"
    return SDDMMCall(tokens, out_features, in_features, nnz, structure, x.dtype.itemsize, tf32, dtype != x.dtype)
