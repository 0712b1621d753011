"""The cost model of the Triton backend: which kernels and library calls make y, dx and dS.

Seconds = the larger of FLOPs / rate and bytes / bandwidth, plus a constant a launch; the cheapest legal way is taken.
What the count says, for 16-bit operands on an H100 (T tokens, N x K weight, density d):

- Base. A library GEMM is faster than the kernel's loop, but the adapter then costs another read and write of y, 2 T N
  elements, and a launch. The kernel's loop wins while the GEMM is small or bound by reading W (few tokens).
- fp32 without tf32: W + scaling B A + S, made for the call, is one library GEMM and exact enough. Never in 16 bits or
  tf32, whose operands would round small deltas away.
- Unstructured S. Reading x by entry moves a 32-byte sector for each entry and token from L2; from a copy of x by
  columns an element (and 16 bytes a load), so that is the way for a sparse S: d below 0.3 % at many tokens. A dense S
  costs the base's FLOPs once more whatever d, beside W in the kernel's loop or, with s·BA in the same matrix, as a
  second library GEMM: D = s·BA + S is rounded once as an operand, relative to itself; W is not. Tiles of W + S
  densified inside the loop would round S into W; tiles of S made there would be made anew for every tile of tokens.
  Values wider than x take three dots. Compiled for sm_90 in 128 x 128 x 64 tiles, a step of the loop is 116
  instructions with W alone and 163 with S beside it (512 more cycles of the tensor cores); an entry of each of 128
  rows, gathered by columns, is 435: even near 38 entries in a row at K = 4096 (tests/test_triton_aot.py).
- Rows are a GEMM with fewer outputs, columns and 16 x 16 blocks one with fewer inputs, gathered around the dots.
- dS. A tile of dyᵀ x on the tensor cores costs 2 T N K FLOPs whatever d, and so does a library GEMM, which is faster
  but keeps all of dW and rounds it; gathering by entry costs L2 reads that grow with d: the way for fp32 or a very
  sparse S.
"""

import functools
import math
from typing import NamedTuple

from rosa_kernels.pattern import BLOCK16, COLUMN, ROW
from rosa_kernels.plan.gpu_table import Rates

LARGEST_R_INSIDE = 64
"""Largest rank whose H the linear kernel makes itself, for few tokens: each tile of outputs makes it anew."""
FEW_TOKENS = 512
"""Above, x is gathered from a copy by columns only."""
_SECTOR = 32
"""Bytes that a gather moves from L2 for one element."""


class LinearCall(NamedTuple):
    """y (tokens, N) from x (tokens, K), or dx likewise; sizes in elements."""

    tokens: int
    N: int
    K: int
    r: int = 0
    nnz: int = 0
    structure: int = 0
    element_size: int = 2
    tf32: bool = False
    base: bool = True
    dropout: str = ""
    mixed_lora: bool = False
    mixed_values: bool = False
    H_known: bool = False
    H_whole: bool = False
    """Known in one part and in the dtype of x, as a library GEMM takes it."""


class LinearWay(NamedTuple):
    """base: "kernel", "library", "merged" or "". H: made "inside" the kernel, "before" it, by the "library";
    "known"; or "".

    S: "gather", "gather_columns" (from a copy of x by columns), "dense" beside W in the kernel, "shared" (columns),
    "rows", "blocks", or "". H and S "delta": one matrix scaling · B A + S, multiplied by the library.
    """

    base: str
    H: str = ""
    S: str = ""

    @property
    def runs_the_kernel(self) -> bool:
        """Whether the linear kernel runs: not where library calls do all of it."""
        return self.base == "kernel" or self.H in ("inside", "before", "known") or self.S in _S_IN_THE_KERNEL


_S_IN_THE_KERNEL = ("gather", "gather_columns", "dense", "shared")


def linear_ways(call: LinearCall) -> list[LinearWay]:
    """The legal ways, in a fixed order."""
    ways = []
    if call.base and call.element_size == 4 and not call.tf32 and not call.dropout:
        ways.append(LinearWay("merged"))
    for base in ("library", "kernel") if call.base else ("",):
        for S in _sparse_ways(call, base):
            ways += [LinearWay(base, H, S) for H in _low_rank_ways(call, base, S)]
    return ways


def _sparse_ways(call: LinearCall, base: str) -> tuple[str, ...]:
    if not call.nnz:
        return ("",)
    by_structure = {ROW: ("rows",), COLUMN: ("shared",), BLOCK16: ("blocks",)}
    if call.structure in by_structure:
        return by_structure[call.structure]
    gather = ("gather",) if call.tokens <= FEW_TOKENS else ()
    exact = not call.mixed_values and not (call.r and (call.mixed_lora or call.dropout))
    delta = ("delta",) if base != "kernel" and exact else ()
    return (*gather, "gather_columns", "dense", *delta)


def _low_rank_ways(call: LinearCall, base: str, S: str) -> tuple[str, ...]:
    if not call.r:
        return ("",)
    if S == "delta":
        return ("delta",)
    by_library = base == "library" and S not in _S_IN_THE_KERNEL and not call.dropout and not call.mixed_lora
    if call.H_known:
        return ("known", "library") if by_library and call.H_whole else ("known",)
    few = call.r <= LARGEST_R_INSIDE and call.tokens <= FEW_TOKENS
    inside = ("inside",) if few else ()
    return (*inside, "before", *(("library",) if by_library else ()))


@functools.lru_cache(maxsize=4096)
def choose_linear(call: LinearCall, rates: Rates) -> LinearWay:
    return min(linear_ways(call), key=lambda way: linear_seconds(call, way, rates))


def linear_seconds(call: LinearCall, way: LinearWay, rates: Rates) -> float:
    """What the way is expected to take."""
    T, N, K, size = call.tokens, call.N, call.K, call.element_size
    flops_rate = gemm_rate(rates, size, call.tf32)
    seconds = 0.0

    def run(flops: float, elements: float, efficiency: float = 1.0) -> float:
        return rates.launch_seconds + max(flops / (flops_rate * efficiency), elements * size / rates.bandwidth)

    if way.base == "merged":
        return run(2 * N * K * call.r, 3 * N * K) + run(0, 2 * call.nnz) + run(2 * T * N * K, T * (N + K) + N * K)
    if way.base == "library":
        seconds += run(2 * T * N * K, T * (N + K) + N * K)
    if way.S == "delta":
        seconds += (
            run(0, N * K + 2 * call.nnz)
            + run(2 * N * K * call.r, 2 * N * K)
            + run(2 * T * N * K, T * (2 * N + K) + N * K)
        )
    if way.H == "before" and T > FEW_TOKENS:  # its parts are added
        seconds += rates.launch_seconds
    if way.H in ("before", "library") and not call.H_known:
        seconds += run(2 * T * K * call.r * (3 if call.mixed_lora else 1), T * K + call.r * (T + K))
    if way.H == "library":
        seconds += run(2 * T * N * call.r, 2 * T * N + call.r * (T + N))
    if way.S in ("rows", "blocks"):
        columns = call.nnz / K if way.S == "rows" else N
        seconds += run(
            2 * T * call.nnz * (3 if call.mixed_values else 1),
            T * K + 2 * T * columns + call.nnz,
            rates.kernel_efficiency * _filled(T, columns, rates),
        )
    if way.S == "dense":
        seconds += run(0, (3 if call.mixed_values else 1) * N * K)
    if way.S == "gather_columns":
        seconds += run(0, 2 * T * K)
    if way.runs_the_kernel:
        flops, elements = _kernel_work(call, way)
        efficiency = rates.kernel_efficiency * _filled(T, N, rates)
        seconds += run(flops, elements, efficiency) + _l2_seconds(call, way, rates)
    return seconds


def _filled(T: float, N: float, rates: Rates) -> float:
    """Share of the multiprocessors that work, on average, in the waves of a product's tiles."""
    waves = max(1, T / 128) * max(1, N / 128) / rates.multiprocessors
    return waves / math.ceil(waves)


def _kernel_work(call: LinearCall, way: LinearWay) -> tuple[float, float]:
    """(FLOPs, elements moved) of the linear kernel without its gathers."""
    T, N, K = call.tokens, call.N, call.K
    dots = 3 if call.mixed_values else 1
    reads_x = way.base == "kernel" or way.H == "inside" or way.S
    elements = T * N * (2 if way.base == "library" else 1) + (T * K if reads_x else 0)
    flops = 2.0 * T * N * call.r
    if way.base == "kernel":
        flops, elements = flops + 2.0 * T * N * K, elements + N * K
    if way.H == "inside":  # for each tile of outputs anew
        flops += 2.0 * T * K * max(16, call.r) * -(-N // 128)
    if way.S == "dense":
        flops += 2.0 * T * N * K * dots
        elements += N * K * (2 if call.mixed_values else 1)
    if way.S == "shared":
        flops += 2.0 * T * call.nnz * dots
    return flops, elements


def _l2_seconds(call: LinearCall, way: LinearWay, rates: Rates) -> float:
    """Of reads that L2 serves again and again: x by entry of S, or for H in every tile of outputs."""
    T, size = call.tokens, call.element_size
    by_entry = {"gather": _SECTOR * T, "gather_columns": max(_SECTOR, T * size)}.get(way.S, 0)
    for_H = T * call.K * size * call.N / 64 if way.H == "inside" and way.base != "kernel" else 0
    return (call.nnz * by_entry + for_H) / rates.l2_bandwidth


def gemm_rate(rates: Rates, element_size: int, tf32: bool) -> float:
    if element_size == 2:
        return rates.flops_16_bit
    return rates.flops_tf32 if tf32 else rates.flops_fp32


def low_rank_gradients_by_library(tokens: int, N: int, element_size: int, rates: Rates) -> bool:
    """True where library GEMMs for H, dH, dA and dB beat the kernels, where dropout and dtypes allow them.

    They are 4 launches in place of 7, with the additions of parts, but read dy (tokens, N) twice. Few tokens come in no
    parts: 3 launches.
    """
    return tokens > 32 and 3 * rates.launch_seconds > tokens * N * element_size / rates.bandwidth


def dy_read_once(r: int) -> bool:
    """True where one kernel makes dB and dH from one read of dy.

    A second read of dy moves T·O elements; making dH beside dB moves a part of it, T·r in fp32, written and read,
    for each 128 outputs: 2 · T · r · 4 bytes · O / 128 against 2 · T · O bytes in 16 bits. Half at r = 16.
    """
    return r <= 16


def parts_added_first(parts: int, elements: int, readers: int, rates: Rates) -> bool:
    """True where adding fp32 parts of H or dH once beats letting each of `readers` tiles of outputs add them.

    elements: of one part. Each reader takes every part from L2.
    """
    one = 4 * elements
    by_readers = readers * parts * one / rates.l2_bandwidth
    first = rates.launch_seconds + (parts + 1) * one / rates.bandwidth + readers * one / rates.l2_bandwidth
    return first < by_readers


class SDDMMCall(NamedTuple):
    tokens: int
    M: int
    N: int
    nnz: int
    structure: int = 0
    element_size: int = 2
    tf32: bool = False
    mixed: bool = False
    rows_known: bool = False
    """Whether the non-empty rows are at hand, for structure ROW."""


def sddmm_ways(call: SDDMMCall) -> tuple[str, ...]:
    """ "shared" for rows, columns and 16 x 16 blocks, or "packed": a copy of the columns of dy or x that they need, and
    a library GEMM. Else "tiled"; "entries", or "entries_columns" from copies of dy and x by columns; or "library": all
    of dyᵀ x and a pick of its entries. Not by the library where that rounds once more."""
    if call.structure in (ROW, COLUMN, BLOCK16):
        known = call.structure == COLUMN or (call.structure == ROW and call.rows_known)
        return ("shared", "packed") if known and not call.mixed else ("shared",)
    return ("tiled", "entries", "entries_columns", *(() if call.mixed else ("library",)))


@functools.lru_cache(maxsize=4096)
def choose_sddmm(call: SDDMMCall, rates: Rates) -> str:
    return min(sddmm_ways(call), key=lambda way: sddmm_seconds(call, way, rates))


def sddmm_seconds(call: SDDMMCall, way: str, rates: Rates) -> float:
    T, M, N, size = call.tokens, call.M, call.N, call.element_size
    rate = gemm_rate(rates, size, call.tf32)
    floor = (T * (M + N) + call.nnz) * size / rates.bandwidth
    if way == "library":
        picking = (M * N + call.nnz * _SECTOR / size) * size / rates.bandwidth
        return 2 * rates.launch_seconds + max(2 * T * M * N / rate, floor + M * N * size / rates.bandwidth) + picking
    if way == "shared":  # gathered columns come by the sector, for each tile of the others again
        across = (N if call.structure == ROW else M) / 64
        packed = call.nnz / (N if call.structure == ROW else M)
        gathered = T * packed * _SECTOR * across / rates.l2_bandwidth
        return rates.launch_seconds + max(2 * T * call.nnz / (rate * rates.kernel_efficiency), floor, gathered)
    if way == "packed":
        packed = T * call.nnz / (N if call.structure == ROW else M)
        copying = packed * (_SECTOR + size) / rates.bandwidth
        return 2 * rates.launch_seconds + copying + max(2 * T * call.nnz / rate, floor)
    if way == "tiled":
        efficiency = rates.kernel_efficiency * _filled(M, N, rates)
        return rates.launch_seconds + max(2 * T * M * N / (rate * efficiency), floor)
    # dy's column serves all entries of a row that a program holds; x's is another for each entry
    if way == "entries":
        return rates.launch_seconds + max(call.nnz * T * _SECTOR / rates.l2_bandwidth, floor)
    copies = 2 * rates.launch_seconds + 2 * T * (M + N) * size / rates.bandwidth
    return copies + rates.launch_seconds + max(call.nnz * T * size / rates.l2_bandwidth, floor)
