"""Philox4x32-10 in plain Python integers: what the package's dropout masks are held to."""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_32 = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low_product, high_product = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high_product >> 32) ^ c1 ^ k0,
            high_product & _LOW_32,
            (low_product >> 32) ^ c3 ^ k1,
            low_product & _LOW_32,
        )
        k0, k1 = (k0 + _INCREMENTS[0]) & _LOW_32, (k1 + _INCREMENTS[1]) & _LOW_32
    return c0, c1, c2, c3


def keep_mask(seed: int, tokens: int, in_features: int, p: float) -> torch.Tensor:
    """(tokens, in_features) bool: element (t, i) is kept iff word i % 4 at counter (i // 4, t, 0, 0) is >= p 2**32."""
    threshold = round(p * 2**32)
    key = (seed & _LOW_32, seed >> 32)
    groups = -(-in_features // 4)
    words = [
        [word for group in range(groups) for word in philox4x32_10((group, token, 0, 0), key)][:in_features]
        for token in range(tokens)
    ]
    return torch.tensor(words, dtype=torch.int64).reshape(tokens, in_features) >= threshold


def seed_drawn_after(manual_seed: int, device: torch.device = torch.device("cpu")) -> int:
    """The seed of a device's first dropout call after torch.manual_seed(manual_seed), by the documented draw."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(manual_seed)
        return int(torch.randint(2**62, (1,), dtype=torch.int64, device=device))
