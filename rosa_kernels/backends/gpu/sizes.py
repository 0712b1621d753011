"""The largest sizes that the GPU kernels count. A larger call is refused before anything is launched.

Offsets into tensors are 64-bit numbers in every kernel, so that a tensor may have more than 2**31 elements. Positions
along one of its axes are 32-bit numbers, which cost fewer registers.
"""

from rosa_kernels.pattern import MOST_ENTRIES

MOST_LENGTH = MOST_ENTRIES
"""Of tokens and of features: as for entries, the end of the last tile must not wrap."""
MOST_RANK = 16 * 65535
"""A tile has 16 ranks or more, and the axis of a grid that holds the tiles has 65,535 programs at most."""


def check_sizes(tokens: int, in_features: int, out_features: int, r: int = 0) -> None:
    """A ValueError where the kernels cannot count one of them."""
    if max(tokens, in_features, out_features) <= MOST_LENGTH and r <= MOST_RANK:
        return
    for tensor, what, size, most in (
        ("x", "tokens", tokens, MOST_LENGTH),
        ("x", "in_features", in_features, MOST_LENGTH),
        ("y", "out_features", out_features, MOST_LENGTH),
        ("lora_A", "ranks", r, MOST_RANK),
    ):
        if size > most:
            raise ValueError(f"{tensor}: on a GPU expected at most {most} {what}, got {size}")
