"""Every op beside its formula in plain PyTorch, with S dense: what the derivatives of an op are held against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels.dropout import keep_mask, keep_scale

SCALING = 0.5
SHAPE = OUT_FEATURES, IN_FEATURES = 5, 7


PATTERNS = {
    "unstructured": rk.CSRPattern.random(SHAPE, 0.4, seed=0),
    "rows": rk.CSRPattern.from_rows(torch.tensor([1, 3]), SHAPE),
    "columns": rk.CSRPattern.from_columns(torch.tensor([0, 2, 5]), SHAPE),
    "blocks": rk.CSRPattern.from_blocks(torch.eye(3, 4, dtype=torch.bool), 2, SHAPE),
    "no entries": rk.CSRPattern.random(SHAPE, 0.0, seed=0),
}


def dense(values: Tensor, pattern: rk.CSRPattern) -> Tensor:
    """S (out_features, in_features), differentiable in the values."""
    positions = pattern.row_of_entry(), pattern.col_indices.long()
    return values.new_zeros(pattern.shape).index_put(positions, values)


@dataclass(frozen=True)
class Op:
    """A function of the named tensors and a pattern, and the same in plain PyTorch."""

    names: tuple[str, ...]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def _low_rank(x, lora_A, lora_B):
    return SCALING * F.linear(F.linear(x, lora_A), lora_B)


OPS = {
    "lora_linear": Op(
        ("x", "weight", "bias", "lora_A", "lora_B"),
        lambda p, x, W, b, A, B: rk.lora_linear(x, W, b, A, B, SCALING),
        lambda p, x, W, b, A, B: F.linear(x, W, b) + _low_rank(x, A, B),
    ),
    "sparse_linear": Op(
        ("x", "weight", "bias", "values"),
        lambda p, x, W, b, v: rk.sparse_linear(x, W, b, v, p),
        lambda p, x, W, b, v: F.linear(x, W, b) + F.linear(x, dense(v, p)),
    ),
    "rosa_linear": Op(
        ("x", "weight", "bias", "lora_A", "lora_B", "values"),
        lambda p, x, W, b, A, B, v: rk.rosa_linear(x, W, b, A, B, SCALING, v, p),
        lambda p, x, W, b, A, B, v: F.linear(x, W, b) + _low_rank(x, A, B) + F.linear(x, dense(v, p)),
    ),
    "rosa_delta": Op(
        ("x", "lora_A", "lora_B", "values"),
        lambda p, x, A, B, v: rk.rosa_delta(x, A, B, SCALING, v, p),
        lambda p, x, A, B, v: _low_rank(x, A, B) + F.linear(x, dense(v, p)),
    ),
    "spmm": Op(("x", "values"), lambda p, x, v: rk.spmm(x, v, p), lambda p, x, v: F.linear(x, dense(v, p))),
    "sddmm": Op(
        ("dy", "x"),
        lambda p, dy, x: rk.sddmm(dy, x, p),
        lambda p, dy, x: (dy.flatten(0, -2).T @ x.flatten(0, -2))[p.row_of_entry(), p.col_indices.long()],
    ),
    "csr_add": Op(("weight", "values"), lambda p, W, v: rk.csr_add(W, v, p), lambda p, W, v: W + dense(v, p)),
}


def tensors_for(
    op: Op, pattern: rk.CSRPattern, dtype: torch.dtype, tokens: tuple[int, ...] = (3,), r: int = 2, seed: int = 0
) -> tuple[Tensor, ...]:
    """The op's tensors, normal numbers of variance 1/4 that are exact in bfloat16."""
    out_features, in_features = pattern.shape
    shapes = {
        "x": (*tokens, in_features),
        "dy": (*tokens, out_features),
        "weight": (out_features, in_features),
        "bias": (out_features,),
        "lora_A": (r, in_features),
        "lora_B": (out_features, r),
        "values": (pattern.nnz,),
    }
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shapes[name], generator=generator) / 2).to(torch.bfloat16).to(dtype) for name in op.names)


def plain_dropout(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """dropout(x) by the mask that the kernels draw from this seed."""
    keep = keep_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape)
    return x * keep * keep_scale(dropout_p)
