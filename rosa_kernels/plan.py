"""Which way is cheapest: one GEMM through a merged weight, or the base GEMM and the adapter beside it."""

import torch


def merges(x: torch.Tensor, weight_shape: torch.Size, seed: torch.Tensor | None) -> bool:
    """True where the CPU multiplies by W + scaling · B A + S, made for the call, instead of adding the adapter to y.

    In FLOPs per rank, merging costs out · in once and saves tokens · (in + out); it pays from
    tokens = in · out / (in + out) on. It is exact enough in fp32 alone: bf16 would round small deltas away (8-60 % of them).
    Dropout acts on the low-rank path's x and leaves nothing to merge.
    """
    if x.dtype != torch.float32 or seed is not None:
        return False
    out_features, in_features = weight_shape
    tokens = x.numel() // max(1, in_features)
    return tokens * (in_features + out_features) > in_features * out_features
