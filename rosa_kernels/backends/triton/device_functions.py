"""What the kernels share: dots, rounding, dropout's mask, searches in CSR indices, the order of tiles.

Operands keep the dtype of x, and sums are fp32. EMULATED is true under TRITON_INTERPRET=1. The interpreter's bf16
arithmetic works on raw bits, and its rounding to bf16 loses carries (Triton 3.7-3.9). So bf16 is widened before any
arithmetic, and rounded here.
"""

import triton
import triton.language as tl

from rosa_kernels.backends.triton import launcher

EMULATED = tl.constexpr(launcher.EMULATED)


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """fp32 -> dtype, rounded to nearest even."""
    if EMULATED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        quiet_nan = tl.full(values.shape, 0x7FC0, tl.uint16)
        return tl.where(values == values, rounded, quiet_nan).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for operands of one dtype. PRECISION, "ieee" or "tf32", is how fp32 operands are multiplied."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def power_of_two(exponent):
    """2.0 ** exponent, -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dot_mixed(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b where b may be wider than a: then b is a sum of numbers of a's dtype, to fp32's precision.

    Three numbers of bf16 hold 24 bits, two of fp16 22 bits. fp16's numbers end at 2**-24. So b is scaled there by a
    power of two, which takes the largest number of the tile to 2**14, and the terms end 38 bits below it.
    """
    if b.dtype == a.dtype:
        return dot(a, b, acc, PRECISION)
    wide = b.to(tl.float32)
    if a.dtype == tl.float32:
        return dot(a, wide, acc, PRECISION)
    if a.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(wide), 1), 0)
        exponent = min(14 - ((largest.to(tl.int32, bitcast=True) >> 23) - 127), 126)
        product = dot_terms(a, wide * power_of_two(exponent), tl.zeros_like(acc), PRECISION)
        return acc + power_of_two(-exponent) * product
    return dot_terms(a, wide, acc, PRECISION)


@triton.jit
def dot_terms(a, wide, acc, PRECISION: tl.constexpr):
    """acc + a wide, an fp32 `wide` as two numbers of fp16 or three of bf16 each."""
    high = narrow(wide, a.dtype)
    infinite = tl.abs(high.to(tl.float32)) == float("inf")  # then the product is too, not NaN
    rest = tl.where(infinite, 0.0, wide - high.to(tl.float32))
    low = narrow(rest, a.dtype)
    if a.dtype == tl.bfloat16:
        acc = dot(a, narrow(rest - low.to(tl.float32), a.dtype), acc, PRECISION)
    return dot(a, high, dot(a, low, acc, PRECISION), PRECISION)


def int32_threshold(threshold: int) -> int:
    """A Dropout's threshold less 2**31, as keep_tile compares it. At p = 1 one word in 2**32 is kept, times 0."""
    return min(threshold, 2**32 - 1) - 2**31


@triton.jit
def keep_tile(key, tokens, first_feature, threshold, BLOCK_F: tl.constexpr):
    """(len(tokens), BLOCK_F) bools: the elements that dropout keeps, as rosa_kernels/dropout.py defines them.

    key: the seed's value. first_feature: a multiple of 4. threshold: drop_threshold's less 2**31, as int32 holds it.
    """
    groups = first_feature // 4 + tl.arange(0, BLOCK_F // 4)
    zeros = tl.zeros((tokens.shape[0], BLOCK_F // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(key, zeros + groups[None, :], zeros + tokens[:, None].to(tl.int32), zeros, zeros)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(tokens.shape[0], BLOCK_F)
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def sum_of_parts(parts, offsets, mask, part_size, PARTS):
    """Σ_p parts[p] at the offsets, in order and in fp32; parts (PARTS, part_size), part_size an int64."""
    total = tl.load(parts + offsets, mask=mask, other=0.0).to(tl.float32)
    for part in range(1, PARTS):
        total += tl.load(parts + part * part_size + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def row_of_entry(crow, rows, entries, STEPS):
    """The row that holds each entry: the last with crow[row] <= entry, found by STEPS >= log2(rows) + 1 halvings."""
    low = tl.zeros_like(entries)
    high = low + rows
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        below = tl.load(crow + middle) <= entries
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def first_entry_at(col, start, end, column, STEPS):
    """Of each row, the first entry in [start, end) whose column is at least `column`, by STEPS >= log2(end - start) + 1
    halvings."""
    low = start
    high = end
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        open_ = low < high
        below = open_ & (tl.load(col + middle, mask=open_, other=0) < column)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def first_axis_fastest(program, length, BLOCK: tl.constexpr):
    """(tile along the first axis, of that length; tile along the second) of a program of a flat grid.

    A grid's second axis has 65,535 programs at most, its first 2**31 - 1.
    """
    tiles = tl.cdiv(length, BLOCK)
    return program % tiles, program // tiles


@triton.jit
def tile_position(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(m, n) of a program's tile: GROUP_M tiles down, then across, so that neighbours in time share L2 lines."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % height, within // height
