"""The dropout mask of the low-rank path, defined once for every backend.

Element (t, i) of x, token t and feature i, is kept exactly where word i % 4 of Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) is at least p * 2**32; the key is the seed, the counter (i // 4, t, 0, 0).
One counter serves four neighbouring features, which is a quarter of the work, and none depends on in_features.
"""

import torch
from torch import Tensor

_ROUND_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def drop_threshold(p: float) -> int:
    """p as a 32-bit fraction, 2**32 for p = 1: an element whose word is below it is dropped."""
    return round(p * 2**32)


def keep_scale(p: float) -> float:
    """The factor of the elements that are kept: 1 / (1 - p), and 0 for p = 1."""
    return 0.0 if p >= 1 else 1 / (1 - p)


def new_seed(device: torch.device) -> Tensor:
    """(1,) int64, drawn from PyTorch's generator of that device. No host reads it, so nothing waits for a GPU."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def keep_mask(seed: Tensor, tokens: int, in_features: int, p: float) -> Tensor:
    """(tokens, in_features) bool: the elements that dropout with probability p keeps."""
    words = _philox(seed, tokens, -(-in_features // 4))
    return words.flatten(1)[:, :in_features] >= drop_threshold(p)


def _philox(seed: Tensor, tokens: int, groups: int) -> Tensor:
    """(tokens, groups, 4) int64 words in [0, 2**32)."""
    key = [seed & _LOW_32, (seed >> 32) & _LOW_32]
    group = torch.arange(groups, device=seed.device).expand(tokens, groups)
    token = torch.arange(tokens, device=seed.device)[:, None].expand(tokens, groups)
    zero = torch.zeros_like(group)
    c = [group, token & _LOW_32, zero, zero]
    for round_index in range(10):
        if round_index:
            key = [(k + increment) & _LOW_32 for k, increment in zip(key, _KEY_INCREMENTS)]
        # int64 products wrap, and a wrapped product still holds both 32-bit halves.
        low, high = c[0] * _ROUND_MULTIPLIERS[0], c[2] * _ROUND_MULTIPLIERS[1]
        c = [
            ((high >> 32) & _LOW_32) ^ c[1] ^ key[0],
            high & _LOW_32,
            ((low >> 32) & _LOW_32) ^ c[3] ^ key[1],
            low & _LOW_32,
        ]
    return torch.stack(c, -1)
