"""Kernels that read or write an element past a tensor's end, to see that AddressSanitizer catches it:
tests/triton/test_bounds.py runs this.

Run with TRITON_INTERPRET=1 and one argument, "nothing", "read" or "write": what to do past the end.
"""

import sys

import torch
import triton
import triton.language as tl

SIZE = 30


@triton.jit
def copy_kernel(out, x, LOADED, STORED, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < LOADED, other=0.0), mask=at < STORED)


def main(past_the_end: str) -> None:
    x, out = torch.ones(SIZE), torch.zeros(SIZE)
    loaded, stored = (SIZE + (past_the_end == name) for name in ("read", "write"))
    copy_kernel[(1,)](out, x, loaded, stored, BLOCK=32)
    assert torch.equal(out, x)
    print("unharmed")


if __name__ == "__main__":
    main(sys.argv[1])
