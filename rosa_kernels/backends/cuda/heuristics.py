"""Which kernels and library calls of the CUDA backend make y, dx and dS: the cheapest by the count.

gpu/cost_model.py says how seconds are counted, and what library calls are worth. The base is always a library GEMM, or
part of one GEMM by W + scaling · B A + S where that is exact enough. What the count says of the kernels, for 16-bit
operands on an H100 (T tokens, an N x K weight, nnz entries of S):

- One pass over y, the epilogue, makes the low-rank part and x Sᵀ. It writes T · N elements, to which the base's GEMM
  adds.
- The epilogue gathers x from shared memory, where a transposed copy of 16 tokens lies. A warp reads the tokens of 4
  entries by some 12 instructions (SASS of sm_90). That takes 3 to 4 cycles of a multiprocessor, because random features
  share banks: as measured, 1.1 times what L2 would deliver.
- The entries themselves, 8 bytes each, come from L2 once for each 16 tokens, and so do A and B.
- Where shared memory does not hold all K features, x comes from a transposed copy in L2.
- The dense delta as a second library GEMM costs 2 · T · N · K FLOPs at any density. At T = N = K = 4096 it costs as
  much as the epilogue near a density of 0.45 %.
"""

import functools
from typing import NamedTuple

from rosa_kernels.backends.gpu import cost_model
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall, sddmm_seconds
from rosa_kernels.backends.gpu.device_rates import Rates
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.pattern import COLUMN, ROW

EPILOGUE_TOKENS, PACKED_ENTRY_BYTES = 16, 8
"""As csrc/cuda/constants.h says; tests/cuda/test_constants.py fails where the two differ."""
SHARED_OVER_L2 = 1.1
"""Entries that a gather from shared memory serves, over those from L2: as measured on an H100."""
_SPARSE_IN_THE_EPILOGUE = ("shared", "global", "rows")


class LinearAlgorithm(NamedTuple):
    """Who multiplies the weight, and where H and x Sᵀ come from. "" stands for a part that the call does not have.

    base: the "library", or the library with a "merged" weight that leaves nothing else to do.
    low_rank: H is made by the "kernel" or the "library".
    sparse: the epilogue gathers x from "shared" or "global" memory; the library multiplies whole "rows" and "columns".
    low_rank and sparse "delta": the matrix scaling · B A + S is multiplied by the library.
    """

    base: str
    low_rank: str = ""
    sparse: str = ""

    @property
    def runs_the_epilogue(self) -> bool:
        return self.low_rank == "kernel" or self.sparse in _SPARSE_IN_THE_EPILOGUE


def linear_algorithms(call: LinearCall, rates: Rates) -> list[LinearAlgorithm]:
    """Those that may serve the call, in a fixed order."""
    algorithms = [LinearAlgorithm("merged")] if cost_model.may_merge(call) else []
    base = "library" if call.has_base else ""
    for sparse in _choices_of_sparse(call, rates):
        algorithms += [LinearAlgorithm(base, low_rank, sparse) for low_rank in _choices_of_low_rank(call, sparse)]
    return algorithms


def _choices_of_sparse(call: LinearCall, rates: Rates) -> tuple[str, ...]:
    if not call.nnz:
        return ("",)
    if call.structure in (ROW, COLUMN):
        return ("rows",) if call.structure == ROW else ("columns",)
    fits = call.in_features * EPILOGUE_TOKENS * call.element_size <= rates.shared_memory
    return ("shared" if fits else "global", *(("delta",) if cost_model.may_round_delta(call) else ()))


def _choices_of_low_rank(call: LinearCall, sparse: str) -> tuple[str, ...]:
    if not call.r:
        return ("",)
    if sparse == "delta":
        return ("delta",)
    by_library = not call.dropout and not call.mixed_lora and sparse not in _SPARSE_IN_THE_EPILOGUE
    return ("kernel", "library") if by_library else ("kernel",)


@functools.lru_cache(maxsize=4096)
def choose_linear(call: LinearCall, rates: Rates) -> LinearAlgorithm:
    return min(linear_algorithms(call, rates), key=lambda algorithm: linear_seconds(call, algorithm, rates))


def linear_seconds(call: LinearCall, algorithm: LinearAlgorithm, rates: Rates) -> float:
    """What the algorithm is expected to take."""
    T, N, K, size = call.T, call.out_features, call.in_features, call.element_size
    tiles = cdiv(T, EPILOGUE_TOKENS)  # each reads all of A, B and S from L2
    seconds = cost_model.library_seconds(call, *algorithm, rates)
    if algorithm.low_rank == "kernel" and not call.H_known:
        in_parts = tiles < 2 * rates.multiprocessors  # which another launch adds
        A = tiles * K * call.r * size / rates.l2_bandwidth
        seconds += (1 + in_parts) * rates.launch_seconds + max(T * K * size / rates.bandwidth, A)
    if algorithm.runs_the_epilogue:
        behind_the_base = algorithm.base and not algorithm.low_rank and algorithm.sparse == "rows"
        y = T * N * size * (2 if behind_the_base else 1) / rates.bandwidth
        B = tiles * N * call.r * size / rates.l2_bandwidth
        seconds += rates.launch_seconds + max(y, B + _gather_seconds(call, algorithm.sparse, rates))
    return seconds


def _gather_seconds(call: LinearCall, sparse: str, rates: Rates) -> float:
    """Of x by entry of S, and of what is made for it: packed entries, and a transposed copy where that is "global"."""
    if sparse not in ("shared", "global"):
        return 0.0
    size, tiles = call.element_size, cdiv(call.T, EPILOGUE_TOKENS)
    x = call.T * call.in_features * size / rates.bandwidth
    packing = rates.launch_seconds + (x if sparse == "shared" else rates.launch_seconds + 2 * x)
    by_entry = tiles * EPILOGUE_TOKENS * size / (SHARED_OVER_L2 if sparse == "shared" else 1)
    return packing + call.nnz * max(by_entry, tiles * PACKED_ENTRY_BYTES) / rates.l2_bandwidth


def low_rank_gradients_by_library(T: int, out_features: int, element_size: int, rates: Rates) -> bool:
    """Always, where the dtypes are one: the kernels would read x and dy once too."""
    return True


def sddmm_algorithms(call: SDDMMCall) -> tuple[str, ...]:
    """Those that may serve the call.

    "packed", for rows and columns, copies the columns of dy or x that they need for a library GEMM. For other patterns
    "library" makes all of dyᵀ x and gathers its entries, and "entries_transposed" makes a dot product for each entry
    from transposed copies of dy and x: 2 · T bytes from L2.
    """
    return ("packed",) if call.structure in (ROW, COLUMN) else ("library", "entries_transposed")


@functools.lru_cache(maxsize=4096)
def choose_sddmm(call: SDDMMCall, rates: Rates) -> str:
    return min(sddmm_algorithms(call), key=lambda algorithm: sddmm_seconds(call, algorithm, rates))
