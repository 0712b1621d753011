"""The cost model of the CUDA backend: which kernels and library calls make y, dx and dS.

The base is always a library GEMM, or one GEMM by W + scaling B A + S where that is exact enough (plan/cost_model.py). What is
left for the kernels, by the count for 16-bit operands on an H100 (T tokens, N x K weight, nnz entries of S):

- One pass over y, 2 T N elements, adds the low-rank part and S. An entry costs 16 tokens 32 bytes of shared memory,
  where a copy of x by columns lies: a read of 4 entries' tokens by a warp, some 12 instructions (SASS of sm_90), takes 3
  to 4 cycles of a multiprocessor, as random features share banks. Measured: 1.1 times what L2 would deliver. The entries
  themselves, 8 bytes each, come from L2 once for each 16 tokens, and so do A and B. Where shared memory does not hold
  all K features, x comes by columns from L2.
- Or D = scaling B A + S, dense, and a second library GEMM: 2 T N K FLOPs whatever the density. Even near 0.45 %
  at T = N = K = 4096.
- Rows of S are a library GEMM with fp32 results, which the pass adds at their places; columns of S a library GEMM of
  gathered columns of x that accumulates into y.
- dS: all of dyᵀ x by the library and a pick of its entries, or a dot product of two columns for each entry, 2 T bytes
  from L2. Rows and columns: a library GEMM of gathered columns.
"""

import functools
from typing import NamedTuple

from rosa_kernels.backends.gpu import cost_model
from rosa_kernels.backends.gpu.cost_model import LinearCall, LinearWay, SDDMMCall
from rosa_kernels.backends.gpu.device_rates import Rates
from rosa_kernels.pattern import COLUMN, ROW

TOKENS_A_BLOCK = 16
SHARED_OVER_L2 = 1.1
"""Entries that a gather from shared memory serves, over those from L2: as measured on an H100."""
ENTRY_BYTES = 8


class CudaWay(NamedTuple):
    """base: "library", "merged" or "". H: "kernel", "library", "delta", or "". S: "shared" or "global" (where x is
    gathered from), "rows", "columns", "delta", or "". H and S "delta": one matrix scaling B A + S, multiplied by the
    library."""

    base: str
    H: str = ""
    S: str = ""

    @property
    def runs_the_epilogue(self) -> bool:
        return self.H == "kernel" or self.S in _S_IN_THE_EPILOGUE


_S_IN_THE_EPILOGUE = ("shared", "global", "rows")


def linear_ways(call: LinearCall, shared_limit: int) -> list[CudaWay]:
    """The legal ways, in a fixed order. shared_limit: bytes of shared memory that a block may have."""
    ways = []
    if call.base and call.element_size == 4 and not call.tf32 and not call.dropout:
        ways.append(CudaWay("merged"))
    base = "library" if call.base else ""
    for S in _sparse_ways(call, shared_limit):
        if S == "delta":
            ways.append(CudaWay(base, "delta" if call.r else "", S))
            continue
        by_library = call.r and not call.dropout and not call.mixed_lora and S not in _S_IN_THE_EPILOGUE
        ways += [CudaWay(base, H, S) for H in (("kernel", "library") if by_library else ("kernel" if call.r else "",))]
    return ways


def _sparse_ways(call: LinearCall, shared_limit: int) -> tuple[str, ...]:
    if not call.nnz:
        return ("",)
    if call.structure in (ROW, COLUMN):
        return ("rows",) if call.structure == ROW else ("columns",)
    fits = call.K * TOKENS_A_BLOCK * call.element_size <= shared_limit
    return ("shared" if fits else "global", *(("delta",) if cost_model.may_be_one_delta(call) else ()))


@functools.lru_cache(maxsize=4096)
def choose_linear(call: LinearCall, shared_limit: int, rates: Rates) -> CudaWay:
    return min(linear_ways(call, shared_limit), key=lambda way: linear_seconds(call, way, rates))


def linear_seconds(call: LinearCall, way: CudaWay, rates: Rates) -> float:
    """What the way is expected to take."""
    T, N, K, size = call.tokens, call.N, call.K, call.element_size
    by_library = LinearWay(way.base, *(part if part in ("library", "delta") else "" for part in (way.H, way.S)))
    seconds = cost_model.linear_seconds(call, by_library, rates)
    if way.S in ("rows", "columns"):
        seconds += cost_model.library_structure_seconds(call, way.S, rates)
    if way.H == "kernel" and not call.H_known:
        in_parts = _tiles(T) < 2 * rates.multiprocessors  # which another launch adds
        A = _tiles(T) * K * call.r * size / rates.l2_bandwidth
        seconds += (1 + in_parts) * rates.launch_seconds + max(T * K * size / rates.bandwidth, A)
    if way.runs_the_epilogue:
        y = T * N * size * (2 if way.base or way.S == "columns" else 1) / rates.bandwidth
        B = _tiles(T) * N * call.r * size / rates.l2_bandwidth
        seconds += rates.launch_seconds + max(y, B + _gather_seconds(call, way, rates))
    return seconds


def _tiles(tokens: int) -> int:
    """Each reads all of A, B and S from L2."""
    return -(-tokens // TOKENS_A_BLOCK)


def _gather_seconds(call: LinearCall, way: CudaWay, rates: Rates) -> float:
    if way.S not in ("shared", "global"):
        return 0.0
    T, size, tiles = call.tokens, call.element_size, _tiles(call.tokens)
    x = T * call.K * size / rates.bandwidth
    packing = rates.launch_seconds + (x if way.S == "shared" else rates.launch_seconds + 2 * x)
    by_entry = tiles * TOKENS_A_BLOCK * size / (SHARED_OVER_L2 if way.S == "shared" else 1)
    return packing + call.nnz * max(by_entry, tiles * ENTRY_BYTES) / rates.l2_bandwidth


def sddmm_ways(call: SDDMMCall) -> tuple[str, ...]:
    """ "packed" for rows and columns: a library GEMM of the columns of dy or x that they need. Else "library", all of
    dyᵀ x and a pick of its entries, or "entries_columns", by entry from copies of dy and x by columns."""
    return ("packed",) if call.structure in (ROW, COLUMN) else ("library", "entries_columns")


@functools.lru_cache(maxsize=4096)
def choose_sddmm(call: SDDMMCall, rates: Rates) -> str:
    return min(sddmm_ways(call), key=lambda way: cost_model.sddmm_seconds(call, way, rates))
