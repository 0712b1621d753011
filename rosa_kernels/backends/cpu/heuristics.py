"""The CPU's choice of an algorithm: a merged weight, library GEMMs or the C++ kernels.

A cost is a number of multiply-adds of the library's fp32 GEMM, so that one model serves every CPU: another kind of
multiply-add, or moving an element, costs as many of those as take the same time. What all algorithms have in common is
not counted.
"""

from enum import Enum
from math import prod

import torch
from torch import Tensor

from rosa_kernels.pattern import UNSTRUCTURED

# These costs were measured with AVX2 (Zen 3) on two threads; bench/races/test_cost_model_regret.py measures how
# much time a wrong choice costs on other processors.
_LOW_RANK = 1.5  # one multiply-add of the kernels' low-rank part
_ENTRY = 5.0  # one entry of an unstructured S for one token; in rows, columns and blocks it costs _LOW_RANK
_ELEMENT = 7.0  # one element of x read, or of y read or written
_MERGED_ELEMENT = 30.0  # one element of the merged weight: it is read, written, and read again by the GEMM
_MERGED_ENTRY = 50.0  # one entry of S added to the weight
_PACKED_RANK = 0.7  # one multiply-add of B A where our GEMM merges while it packs
_STRIP_ELEMENT = 100.0  # one element of x or dy, for each strip after the first: the GEMMs read and pack it again

_PACKED_ELEMENT = 0.65
"""Packing an element of the weight for bf16 costs this many times what reading and writing one of y or dx costs."""

_MOST_FUSED_ELEMENTS = 2**23
"""The kernels multiply by a bf16 weight of up to so many elements as fast as the library. Each block of tokens
reads the whole weight, and a larger one does not stay in the cache."""

_SMALL_ADAPTER = 2**16
"""The kernels sweep an A and a B of up to so many elements together faster than the library starts its five GEMMs."""

BLOCK_TOKENS = 64
"""Tokens that the kernels take at a time: BLOCK_TOKENS of csrc/cpu/common/kernels.h."""

STRIP_ELEMENTS = 2**22
"""Elements of a strip of the merged weight, 16 MiB. malloc keeps so much for the next strip; what is larger it gives
back to the system, and fresh pages cost more than merging does."""

WIDENED_TOKENS = 12
"""From so many tokens on fp32 GEMMs serve bf16 faster than the library's bf16 GEMM where the CPU has no instructions
for bf16."""


class Algorithm(Enum):
    """How the adapter's part joins the base layer's product."""

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


def decode_tokens(
    dtype: torch.dtype, with_weight: bool, instruction_set: str, fast_bfloat16: bool, our_gemm: bool
) -> int:
    """The most tokens for which the decode kernel is the fastest: it reads W once, as it lies, or S token by token.

    Its time over that of F.linear and two more products is, in fp32 where the library's vectors are as long as ours,
    0.4 for 4 tokens, 0.8 for 16, 0.94 for 32 and 1.03 for 64. It is half of these where the library uses AVX2 and our
    kernels AVX-512, and 0.9 for one token where our kernels have no vectors of their own. In bf16 beside a library with
    instructions for it, it is 0.3 to 0.7 for one token and 0.4 to 0.9 for 8.
    """
    if instruction_set == "portable":
        return 1
    if not with_weight or (dtype == torch.bfloat16 and fast_bfloat16):
        return 8  # S alone takes 0.6 of the block kernels' time for 8 tokens, and 1.2 to 2 times it for 16
    return BLOCK_TOKENS if our_gemm and instruction_set != "avx2" else 32


def forward_algorithm(
    x: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, values: Tensor | None,
    structure: int, seed: Tensor | None, widened: bool, our_gemm: bool,
) -> Algorithm:  # fmt: skip
    """The algorithm for y.

    It merges fp32 alone, or bf16 widened to it: bf16 would round 8-60 % of the small deltas away.

    our_gemm: our kernels' dense products are faster than the library's. In fp32 that is our GEMM; in bf16 those of the
    low-rank part take 0.7 to 1.01 of the library's time at 2 to 2048 tokens.
    """
    tokens = prod(x.shape[:-1])
    if _fuses(tokens, x, weight, lora_A, structure, our_gemm):
        return Algorithm.FUSED
    by_library = not our_gemm and _library_serves(x, lora_A, lora_B, values, seed, widened)
    unmerged = Algorithm.GEMMS if by_library else Algorithm.KERNELS
    if not _may_merge(x, weight, seed, widened):
        return unmerged
    out_features, in_features = weight.shape
    if values is None and not our_gemm and 3 * tokens <= min(out_features, in_features):
        return unmerged  # the costs below say so for every r; most calls save counting them
    low_rank = (1.0 if by_library else _LOW_RANK) * _rank(lora_A) * (in_features + out_features)
    moved = _ELEMENT * (in_features + 2 * out_features)
    adding = tokens * (low_rank + _sparse_cost(values, structure) + moved)
    merges = _merging_cost(weight, lora_A, values, widened, our_gemm, x.numel()) < adding
    return Algorithm.MERGED if merges else unmerged


def dx_algorithm(
    dy: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None, values: Tensor | None,
    structure: int, seed: Tensor | None, widened: bool, our_gemm: bool,
) -> Algorithm:  # fmt: skip
    """The algorithm for dx. KERNELS costs dx's own part alone: dA, dB and dS need the pass over x and dy in any case.

    GEMMS makes dA and dB too. It is chosen for bf16 where our kernels' products are slower than the library's, and for
    so few tokens that the kernels' blocks are half empty.
    """
    tokens = prod(dy.shape[:-1])
    if _fuses(tokens, dy, weight, lora_A, structure, our_gemm):
        return Algorithm.FUSED
    if _library_serves(dy, lora_A, lora_B, values, seed, widened):
        few = tokens <= BLOCK_TOKENS * torch.get_num_threads()
        if our_gemm:
            small = dy.dtype == torch.bfloat16 and lora_A.numel() + lora_B.numel() <= _SMALL_ADAPTER
            few = tokens < BLOCK_TOKENS and not small
        if few or not (our_gemm or dy.dtype == torch.float32):
            return Algorithm.GEMMS
    if not _may_merge(dy, weight, seed, widened):
        return Algorithm.KERNELS
    in_features = weight.shape[1]
    low_rank = _LOW_RANK * _rank(lora_A) * in_features
    adding = _tokens_of_the_sweep(tokens) * (low_rank + _sparse_cost(values, structure) + 2 * _ELEMENT * in_features)
    merges = _merging_cost(weight, lora_A, values, widened, our_gemm, dy.numel()) < adding
    return Algorithm.MERGED if merges else Algorithm.KERNELS


def legal_algorithms(x, weight, lora_A, lora_B, values, seed, widened, our_gemm) -> tuple[Algorithm, ...]:
    """The algorithms that give the right numbers for a call; tests and races force each of them."""
    legal = [Algorithm.KERNELS]
    if _library_serves(x, lora_A, lora_B, values, seed, widened):
        legal.append(Algorithm.GEMMS)
    if _may_merge(x, weight, seed, widened):
        legal.append(Algorithm.MERGED)
    if _may_fuse(x, weight, our_gemm):
        legal.append(Algorithm.FUSED)
    return tuple(legal)


def _may_fuse(x: Tensor, weight: Tensor | None, our_gemm: bool) -> bool:
    return our_gemm and x.dtype == torch.bfloat16 and weight is not None and weight.numel() > 0


def _fuses(
    tokens: int, x: Tensor, weight: Tensor | None, lora_A: Tensor | None, structure: int, our_gemm: bool
) -> bool:
    """Whether the fused kernel pays for packing the weight.

    For each feature of y the call packs in_features elements, and it saves reading and writing y once: one element for
    each token. The same holds for dx with the features exchanged. Rows, columns and blocks without a low-rank part
    touch so little of y that their own kernels are faster up to some 1000 features.
    """
    if not _may_fuse(x, weight, our_gemm) or weight.numel() > _MOST_FUSED_ELEMENTS:
        return False
    if lora_A is None and structure != UNSTRUCTURED:
        return False
    return tokens >= _PACKED_ELEMENT * x.shape[-1]


def _library_serves(x, lora_A, lora_B, values, seed, widened) -> bool:
    """A low-rank part alone, all in one dtype: S, dropout and mixed dtypes would cost the library extra passes."""
    alone = lora_A is not None and values is None and seed is None and not widened
    return alone and x.dtype == lora_A.dtype == lora_B.dtype


def _may_merge(x, weight, seed, widened) -> bool:
    """Dropout changes the x of the low-rank path alone, and one merged weight meets one x."""
    return weight is not None and seed is None and (x.dtype == torch.float32 or widened)


def _tokens_of_the_sweep(tokens: int) -> int:
    """Tokens that all threads have time for while the busiest one sweeps its blocks: a block is one thread's work."""
    threads = torch.get_num_threads()
    if tokens <= BLOCK_TOKENS:
        return tokens * threads
    step = BLOCK_TOKENS * threads
    return -(-tokens // step) * step


def _merging_cost(
    weight: Tensor, lora_A: Tensor | None, values: Tensor | None, widened: bool, our_gemm: bool, read: int
) -> float:
    """The cost of merging, where the GEMM reads so many elements of x or dy.

    Strips cost nothing where the weight passes through memory in strips anyway: when it is widened, and when our GEMM
    packs it.
    """
    elements = weight.numel()
    cost = _MERGED_ENTRY * (0 if values is None else values.shape[0])
    if our_gemm:
        return cost + _PACKED_RANK * elements * _rank(lora_A)
    cost += elements * _rank(lora_A)
    if widened:
        return cost
    return cost + _MERGED_ELEMENT * elements + _STRIP_ELEMENT * read * (strip_count(elements) - 1)


def strip_count(elements: int) -> int:
    """The number of strips that a weight of so many elements is cut into."""
    return max(1, -(-elements // STRIP_ELEMENTS))


def _sparse_cost(values: Tensor | None, structure: int) -> float:
    """The cost of x Sᵀ for one token."""
    if values is None:
        return 0.0
    return (_ENTRY if structure == UNSTRUCTURED else _LOW_RANK) * values.shape[0]


def _rank(lora_A: Tensor | None) -> int:
    return 0 if lora_A is None else lora_A.shape[0]
