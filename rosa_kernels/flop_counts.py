"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: two FLOPs for each multiply-add of their formulas.

T tokens take T · in_features · out_features multiply-adds of a dense product, and T · nnz of one with S. The backward
is counted as PyTorch counts its own, H = x Aᵀ being kept. Arguments are the ops', each tensor as its shape.
"""

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from rosa_kernels import ops  # noqa: F401 (it defines the ops)

_ops = torch.ops.rosa_kernels


@register_flop_formula(_ops.rosa_linear_with_H)
@register_flop_formula(_ops.rosa_linear)
def _rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, *rest, **_):
    used = [shape for shape in (weight, lora_A, lora_B, values) if shape is not None]
    return 2 * prod(x[:-1]) * sum(map(prod, used))


@register_flop_formula(_ops.rosa_linear_backward)
def _rosa_linear_backward(dy, x, weight, lora_A, lora_B, scaling, values, *rest, **_):
    need_dx, need_dweight, _need_dbias, need_dA, need_dB, need_dvalues = rest[8]
    weight, lora_A, lora_B, values = (0 if shape is None else prod(shape) for shape in (weight, lora_A, lora_B, values))
    for_dx = weight + lora_A + values if need_dx else 0
    for_dH = lora_B if need_dx or need_dA else 0
    others = need_dweight * dy[-1] * x[-1] + need_dA * lora_A + need_dB * lora_B + need_dvalues * values
    return 2 * prod(x[:-1]) * (for_dx + for_dH + others)


@register_flop_formula(_ops.spmm)
def _spmm(x, values, *rest, **_):
    return 2 * prod(x[:-1]) * prod(values)


@register_flop_formula(_ops.sddmm)
def _sddmm(dy, x, crow, col, *rest, **_):
    return 2 * prod(x[:-1]) * prod(col)
