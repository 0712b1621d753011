"""Which way is cheapest on a CPU: a merged weight, library GEMMs or the C++ kernels for the adapter's part, or those for all.

Costs are counted in multiply-adds of the library's fp32 GEMM, so that one model serves every CPU: what another kind of
multiply-add, or an element moved, takes relative to those. Only what differs between the ways is counted.
"""

from enum import Enum
from math import prod

import torch
from torch import Tensor

from rosa_kernels.pattern import UNSTRUCTURED

# Measured with AVX2 (Zen 3) on two threads; bench/races/test_cost_model_regret.py shows what trusting them costs.
_LOW_RANK = 1.5  # a multiply-add of the kernels' low-rank part
_ENTRY = 5.0  # an entry of S for a token, gathered; in rows, columns and blocks it is a dense multiply-add
_ELEMENT = 7.0  # an element of x read, or of y read or written
_MERGED_ELEMENT = 30.0  # an element of the merged weight: read, written, and read again by the GEMM
_MERGED_ENTRY = 50.0  # an entry of S added to it
_PACKED_RANK = 0.7  # a multiply-add of B A where the kernels' own GEMM merges while it packs
_STRIP_ELEMENT = 100.0  # an element of x or dy, for each strip after the first: the GEMMs read and pack it again

_PACKED_ELEMENT = 0.65  # an element of the weight packed in pairs, over one of y or dx read and written again
_FUSED_ELEMENTS = (
    2**23
)  # of a weight that the kernels multiply no slower than the library: each block of tokens reads it again
_SWEPT_SOONER = 2**16  # elements of A and B: fewer meet a block of tokens sooner than the library is called five times
_BLOCK_TOKENS = 64  # csrc/cpu/kernels.h: TOKENS

STRIP_ELEMENTS = 2**22
"""Of a strip of the merged weight, 16 MiB: malloc keeps so much for the next one; what it gives back to the system
returns as fresh pages, slower than merging."""

WIDENED_TOKENS = 12
"""From here on fp32 GEMMs serve bf16 faster than the library's bf16 products by rows, where the CPU has no instructions
for those."""


class Way(Enum):
    """How the adapter's part joins the base's product."""

    MERGED = "one GEMM by W + scaling · B A + S, made for the call"
    GEMMS = "library GEMMs add the low-rank part"
    KERNELS = "one pass of the C++ kernels adds all of it"
    FUSED = "the C++ kernels multiply by W too: no pass over y or dx but the one that writes it"


def widens(x: Tensor, fast_bfloat16: bool) -> bool:
    """True where x Wᵀ in bf16 goes through fp32 GEMMs; in the backward dy W and dyᵀ x do for any number of tokens.

    PyTorch's bf16 GEMM without AVX512-BF16 or AMX is 8 (F.linear) to 130 times (dy @ W) slower than its fp32 GEMM on
    an AVX2 CPU; github.com/pytorch/pytorch/issues/146508 has more.
    """
    return x.dtype == torch.bfloat16 and not fast_bfloat16 and x.numel() >= WIDENED_TOKENS * x.shape[-1]


def few_tokens(dtype: torch.dtype, with_weight: bool, instruction_set: str, fast_bfloat16: bool, own: bool) -> int:
    """Up to how many tokens one pass over W as it lies, or without a weight over S token by token, is the fastest.

    Their time over F.linear and two more products: in fp32, where the library has vectors as long, 0.4 for 4 tokens, 0.8 for
    16, 0.94 for 32 and 1.03 for 64; half of these where it uses AVX2 and they AVX-512. Without vectors of their own 0.9 for one.
    In bf16 beside a library with instructions for it 0.3-0.7 for one and 0.4-0.9 for 8.
    """
    if instruction_set == "portable":
        return 1
    if not with_weight or (dtype == torch.bfloat16 and fast_bfloat16):
        return 8  # S alone: 0.6 of the kernels' time by blocks for 8, 1.2-2 for 16
    return 64 if own and instruction_set != "avx2" else 32


def forward_way(
    x: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, values: Tensor | None,
    structure: int, seed: Tensor | None, widened: bool, own: bool,
) -> Way:  # fmt: skip
    """Way for y. Only fp32 is merged, or bf16 widened to it: bf16 would round 8-60 % of the small deltas away.

    own: the kernels' dense products beat the library's, in fp32 by their own GEMM, in bf16 by products of pairs: those of the
    low-rank part take 0.7-1.01 of the library's time at 2 to 2048 tokens.
    """
    tokens = prod(x.shape[:-1])
    if _fuses(tokens, x, weight, lora_A, structure, own):
        return Way.FUSED
    by_gemm = not own and _library_serves(x, lora_A, lora_B, values, seed, widened)
    unmerged = Way.GEMMS if by_gemm else Way.KERNELS
    if not _may_merge(x, weight, seed, widened):
        return unmerged
    out_features, in_features = weight.shape
    if values is None and not own and 3 * tokens <= min(out_features, in_features):
        return unmerged  # by the costs below whatever r; saves these calls the counting
    low_rank = (1.0 if by_gemm else _LOW_RANK) * _rank(lora_A) * (in_features + out_features)
    moved = _ELEMENT * (in_features + 2 * out_features)
    adding = tokens * (low_rank + _sparse_cost(values, structure) + moved)
    return Way.MERGED if _merging_cost(weight, lora_A, values, widened, own, x.numel()) < adding else unmerged


def dx_way(
    dy: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, values: Tensor | None,
    structure: int, seed: Tensor | None, widened: bool, own: bool,
) -> Way:  # fmt: skip
    """Way for dx. The sweep for dA, dB and dS reads x and dy whatever it is, so that KERNELS costs dx's own part alone.

    GEMMS stands for dA and dB too: for bf16 where the kernels' products are not the faster ones, and for so few tokens that the
    kernels' blocks are half empty.
    """
    tokens = prod(dy.shape[:-1])
    if _fuses(tokens, dy, weight, lora_A, structure, own):
        return Way.FUSED
    if _library_serves(dy, lora_A, lora_B, values, seed, widened):
        few = tokens <= _BLOCK_TOKENS * torch.get_num_threads()
        if own:
            small = dy.dtype == torch.bfloat16 and lora_A.numel() + lora_B.numel() <= _SWEPT_SOONER
            few = tokens < _BLOCK_TOKENS and not small
        if few or not (own or dy.dtype == torch.float32):
            return Way.GEMMS
    if not _may_merge(dy, weight, seed, widened):
        return Way.KERNELS
    in_features = weight.shape[1]
    low_rank = _LOW_RANK * _rank(lora_A) * in_features
    adding = _tokens_of_the_sweep(tokens) * (low_rank + _sparse_cost(values, structure) + 2 * _ELEMENT * in_features)
    return Way.MERGED if _merging_cost(weight, lora_A, values, widened, own, dy.numel()) < adding else Way.KERNELS


def legal_ways(x, weight, lora_A, lora_B, values, seed, widened, own) -> tuple[Way, ...]:
    """All of the ways that give the right numbers, for those who measure what the choice among them is worth."""
    ways = [Way.KERNELS]
    if _library_serves(x, lora_A, lora_B, values, seed, widened):
        ways.append(Way.GEMMS)
    if _may_merge(x, weight, seed, widened):
        ways.append(Way.MERGED)
    if _may_fuse(x, weight, own):
        ways.append(Way.FUSED)
    return tuple(ways)


def _may_fuse(x: Tensor, weight: Tensor | None, own: bool) -> bool:
    return own and x.dtype == torch.bfloat16 and weight is not None and weight.numel() > 0


def _fuses(tokens: int, x: Tensor, weight: Tensor | None, lora_A: Tensor | None, structure: int, own: bool) -> bool:
    """The weight is packed for the call, in_features elements of it for each feature of y, and that is won back over the
    elements of y, one for each token, that are not read and written again. The dual holds for dx. Rows, columns and blocks
    by themselves touch so little of y that their own kernels win up to some 1000 features."""
    if (
        not _may_fuse(x, weight, own)
        or weight.numel() > _FUSED_ELEMENTS
        or (lora_A is None and structure != UNSTRUCTURED)
    ):
        return False
    return tokens >= _PACKED_ELEMENT * x.shape[-1]


def _library_serves(x, lora_A, lora_B, values, seed, widened) -> bool:
    """A low-rank part alone, all in one dtype: S, dropout and mixed dtypes would cost the library extra passes."""
    alone = lora_A is not None and values is None and seed is None and not widened
    return alone and x.dtype == lora_A.dtype == lora_B.dtype


def _may_merge(x, weight, seed, widened) -> bool:
    """Dropout acts on the low-rank path's x alone and leaves nothing to merge."""
    return weight is not None and seed is None and (x.dtype == torch.float32 or widened)


def _tokens_of_the_sweep(tokens: int) -> int:
    """What all threads together have time for while one of them sweeps its blocks: one block keeps one thread busy."""
    threads = torch.get_num_threads()
    if tokens <= _BLOCK_TOKENS:
        return tokens * threads
    step = _BLOCK_TOKENS * threads
    return -(-tokens // step) * step


def _merging_cost(
    weight: Tensor, lora_A: Tensor | None, values: Tensor | None, widened: bool, own: bool, read: int
) -> float:
    """read: elements of x or dy. A weight that is widened, or packed by the kernels, anyway comes in strips, through memory, at
    no extra cost."""
    elements = weight.numel()
    cost = _MERGED_ENTRY * (0 if values is None else values.shape[0])
    if own:
        return cost + _PACKED_RANK * elements * _rank(lora_A)
    cost += elements * _rank(lora_A)
    if widened:
        return cost
    return cost + _MERGED_ELEMENT * elements + _STRIP_ELEMENT * read * (strip_count(elements) - 1)


def strip_count(elements: int) -> int:
    """Strips of a weight of so many elements."""
    return max(1, -(-elements // STRIP_ELEMENTS))


def _sparse_cost(values: Tensor | None, structure: int) -> float:
    """Of S for a token."""
    if values is None:
        return 0.0
    return (_ENTRY if structure == UNSTRUCTURED else _LOW_RANK) * values.shape[0]


def _rank(lora_A: Tensor | None) -> int:
    return 0 if lora_A is None else lora_A.shape[0]
