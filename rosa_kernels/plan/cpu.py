"""Which way is cheapest on a CPU: a merged weight, library GEMMs or the C++ kernels for the adapter's part."""

import torch
from torch import Tensor


def merges(x: Tensor, weight: Tensor | None, seed: Tensor | None) -> bool:
    """True where one GEMM by W + scaling · B A + S, made for the call, beats adding the adapter to y.

    In FLOPs per rank, merging costs out · in once and saves tokens · (in + out); it pays from
    tokens = in · out / (in + out) on. It is exact enough in fp32 alone: bf16 would round small deltas away (8-60 % of
    them). Dropout acts on the low-rank path's x and leaves nothing to merge.
    """
    if weight is None or x.dtype != torch.float32 or seed is not None:
        return False
    out_features, in_features = weight.shape
    tokens = x.numel() // max(1, in_features)
    return tokens * (in_features + out_features) > in_features * out_features


def low_rank_by_gemm(x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, values: Tensor | None, seed) -> bool:
    """True where an unmerged low-rank part goes through the library's GEMMs.

    Alone and all in x's dtype, it meets tuned bf16 instructions there that the kernels do not use yet. With S beside
    it one pass over y for both is faster, and rounds y once less; dropout and mixed dtypes would cost the library
    extra copies. For one token the library's four calls cost more than the multiplications.
    """
    alone = lora_A is not None and values is None and seed is None
    return alone and x.dtype == lora_A.dtype == lora_B.dtype and x.numel() > x.shape[-1]
