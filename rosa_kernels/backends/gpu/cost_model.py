"""The cost model of the Triton backend: which kernels and library calls make y, dx and dS.

Seconds = the larger of FLOPs / rate and bytes / bandwidth, plus a constant a launch; the cheapest legal way is taken.
What the count says, for 16-bit operands on an H100 (T tokens, N x K weight, density d):

- Base. A library GEMM is faster than the kernel's loop, but the adapter then costs another read and write of y, 2 T N
  elements, and a call. The kernel's loop wins beside an S or wider adapters while the GEMM is small or bound by reading W
  (few tokens): there Python's launch of one kernel costs less than several calls.
- fp32 without tf32: W + scaling B A + S, made for the call, is one library GEMM and exact enough. Never in 16 bits or
  tf32, whose operands would round small deltas away.
- Unstructured S. Reading x by entry moves a 32-byte sector for each entry and token from L2; from a copy of x by
  columns an element (and 16 bytes a load), so that is the way for a sparse S: d below 0.3 % at many tokens. A dense S
  costs the base's FLOPs once more whatever d, beside W in the kernel's loop or, with s·BA in the same matrix, as a
  second library GEMM: D = s·BA + S is rounded once as an operand, relative to itself; W is not. Tiles of W + S
  densified inside the loop would round S into W; tiles of S made there would be made anew for every tile of tokens.
  Values wider than x take three dots. Compiled for sm_90 in 128 x 128 x 64 tiles, a step of the loop is 116
  instructions with W alone and 163 with S beside it (512 more cycles of the tensor cores); an entry of each of 128
  rows, gathered by columns, is 435 (tests/test_triton_aot.py).
- Wider adapters, fp32 beside bf16: D is summed in fp32 and rounded once, an error of the size of y's own rounding. As
  terms of 16 bits that lose nothing they would cost its GEMM two or three times. Not in fp16, whose numbers end at 2**-24.
- Rows are a library GEMM with fewer outputs, columns one with fewer inputs, gathered; wider values are rounded as in D, or
  where S is alone taken as three terms. 16 x 16 blocks are multiplied by the kernel, their inputs gathered around the dots.
- dS. A tile of dyᵀ x on the tensor cores costs 2 T N K FLOPs whatever d, and so does a library GEMM, which is faster
  but keeps all of dW; gathering by entry costs L2 reads that grow with d: the way for fp32 or a very sparse S.

On an H100 the kernel's loop reached 0.73 of the library's FLOP/s, and a gather by columns half of the L2 rate that others
report: both are in plan/gpu_table.py.
"""

import functools
import math
from typing import NamedTuple

from rosa_kernels.backends.gpu.device_rates import Rates
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

LARGEST_R_INSIDE = 64
"""Largest rank whose H the linear kernel makes itself, for few tokens: each tile of outputs makes it anew."""
FEW_TOKENS = 512
"""Above, x is gathered from a copy by columns only."""
_SECTOR = 32
"""Bytes that a gather moves from L2 for one element."""
_L2_LATENCY = 0.8e-6
"""Seconds that a step of a gather takes, a load of indices before one of x: as seen on an H100."""


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
    fp16: bool = False


class LinearWay(NamedTuple):
    """base: "kernel", "library", "merged" or "". H: made "inside" the kernel, "before" it, by the "library";
    "known"; or "".

    S: "gather", "gather_columns" (from a copy of x by columns), "dense" beside W in the kernel, "blocks" by the kernel on
    its own, "rows" or "columns" by the library, or "". H and S "delta": one matrix scaling · B A + S, multiplied by the
    library.
    """

    base: str
    H: str = ""
    S: str = ""

    @property
    def runs_the_kernel(self) -> bool:
        """Whether the linear kernel runs: not where library calls do all of it."""
        return self.base == "kernel" or self.H in ("inside", "before", "known") or self.S in _S_IN_THE_KERNEL


_S_IN_THE_KERNEL = ("gather", "gather_columns", "dense")


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
    by_structure = {ROW: ("rows",), COLUMN: ("columns",), BLOCK16: ("blocks",)}
    if call.structure in by_structure:
        return by_structure[call.structure]
    gather = ("gather",) if call.tokens <= FEW_TOKENS else ()
    return (*gather, "gather_columns", "dense", *(("delta",) if base != "kernel" and may_be_one_delta(call) else ()))


def may_be_one_delta(call: LinearCall) -> bool:
    """Whether scaling · B A + S may be rounded to x's dtype and multiplied as one matrix.

    Where S is alone there is no H whose rounding that of wider values could stand for.
    """
    wider = call.mixed_values or call.mixed_lora
    return not (call.r and call.dropout) and not (wider and (call.fp16 or not call.r))


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

    def run(flops: float, elements: float, efficiency: float = 0.0) -> float:
        """By the library, or by a kernel of ours of some efficiency."""
        launch = rates.kernel_launch_seconds if efficiency else rates.launch_seconds
        return launch + max(flops / (flops_rate * (efficiency or 1.0)), elements * size / rates.bandwidth)

    if way.base == "merged":
        merging = run(2 * N * K * call.r, 3 * N * K) + (run(0, 2 * call.nnz, 1.0) if call.nnz else 0)
        return merging + run(2 * T * N * K, T * (N + K) + N * K)
    if way.base == "library":
        seconds += run(2 * T * N * K, T * (N + K) + N * K)
    if way.S == "delta":
        making = run(0, N * K + 2 * call.nnz, 1.0) + (run(2 * N * K * call.r, 2 * N * K) if call.r else 0)
        if call.r and (call.mixed_lora or call.mixed_values):  # in fp32, then narrowed
            making += run(0, 4 * N * K)
        seconds += making + run(2 * T * N * K, T * (2 * N + K) + N * K)
    if way.H == "before" and T > FEW_TOKENS:  # its parts are added
        seconds += rates.kernel_launch_seconds
    if way.H in ("before", "library") and not call.H_known:
        dots, efficiency = (3 if call.mixed_lora else 1), float(way.H == "before")
        seconds += run(2 * T * K * call.r * dots, T * K + call.r * (T + K), efficiency)
    if way.H == "library":
        seconds += run(2 * T * N * call.r, 2 * T * N + call.r * (T + N))
    if way.S in ("rows", "columns"):
        seconds += library_structure_seconds(call, way.S, rates)
    if way.S == "blocks":
        dots = 3 if call.mixed_values else 1
        efficiency = rates.kernel_efficiency * _filled(T, N, rates)
        seconds += run(2 * T * call.nnz * dots, T * K + 2 * T * N + call.nnz, efficiency)
    if way.S == "dense":
        seconds += run(0, (3 if call.mixed_values else 1) * N * K, 1.0)
    if way.S == "gather_columns":
        seconds += run(0, 2 * T * K, 1.0)
    if way.runs_the_kernel:
        flops, elements = _kernel_work(call, way)
        efficiency = rates.kernel_efficiency * _filled(T, N, rates)
        seconds += run(flops, elements, efficiency) + _l2_seconds(call, way, rates)
    return seconds


def library_structure_seconds(call: LinearCall, S: str, rates: Rates) -> float:
    """Of whole "rows": a GEMM with an fp32 result, added at its places; or "columns": a gather, a GEMM that adds to y."""
    T, size = call.tokens, call.element_size
    terms = 3 if call.mixed_values and size == 2 and not call.r else 1
    flops = 2 * T * call.nnz * terms / gemm_rate(rates, size, call.tf32)
    if S == "rows":
        D = T * call.nnz / call.K
        moved, scattered = T * call.K * size + 4 * D * terms, D * (4 + 2 * _SECTOR)
    else:
        gathered = T * call.nnz / call.N
        moved, scattered = (2 * T * call.N + gathered * terms) * size, gathered * (_SECTOR + size * terms)
    launches = rates.launch_seconds + rates.kernel_launch_seconds
    return launches + max(flops, moved / rates.bandwidth) + scattered / rates.bandwidth


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
        flops += 2.0 * T * K * max(16, call.r) * -(-N // 128) * (3 if call.mixed_lora else 1)
    if way.S == "dense":
        flops += 2.0 * T * N * K * dots
        elements += N * K * (2 if call.mixed_values else 1)
    return flops, elements


def _l2_seconds(call: LinearCall, way: LinearWay, rates: Rates) -> float:
    """Of reads that L2 serves again and again: x by entry of S, or A, and x too where W is not there, for H in every tile
    of outputs. An entry after the other of a row: where they are many, each waits for L2 in turn."""
    T, size = call.tokens, call.element_size
    seconds = 0.0
    if way.H == "inside":
        A = call.r * call.K * (4 if call.mixed_lora else size)
        x = 0 if way.base == "kernel" else T * call.K * size
        seconds += (A * call.N / 32 + x * call.N / 64) / rates.l2_bandwidth
    if way.S in ("gather", "gather_columns"):
        by_entry = _SECTOR * T if way.S == "gather" else max(_SECTOR, T * size)
        at_once = 8 if T <= 16 else 4 if T <= 32 else 1  # of a row, by the blocks of few tokens
        in_turn = _L2_LATENCY * call.nnz / (call.N * at_once)
        seconds += max(call.nnz * by_entry / rates.l2_bandwidth, in_turn)
    return seconds


def gemm_rate(rates: Rates, element_size: int, tf32: bool) -> float:
    if element_size == 2:
        return rates.flops_16_bit
    return rates.flops_tf32 if tf32 else rates.flops_fp32


def low_rank_gradients_by_library(tokens: int, N: int, element_size: int, rates: Rates) -> bool:
    """True where library GEMMs for H, dH, dA and dB beat the kernels, where dropout and dtypes allow them.

    They are 4 calls in place of 7 launches, with the additions of parts, but read dy (tokens, N) twice. Few tokens come in
    no parts: 3 launches.
    """
    launches = 3 if tokens <= 32 else 7
    saved = launches * rates.kernel_launch_seconds - 4 * rates.launch_seconds
    return saved > tokens * N * element_size / rates.bandwidth


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
    first = rates.kernel_launch_seconds + (parts + 1) * one / rates.bandwidth + readers * one / rates.l2_bandwidth
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


def sddmm_ways(call: SDDMMCall) -> tuple[str, ...]:
    """ "packed" for rows and columns: a copy of the columns of dy or x that they need, and a library GEMM. "blocks" for
    16 x 16 blocks. Else "tiled"; "entries", or "entries_columns" from copies of dy and x by columns; or "library": all of
    dyᵀ x, in fp32 for a wider dS, and a pick of its entries."""
    if call.structure in (ROW, COLUMN):
        return ("packed",)
    return ("blocks",) if call.structure == BLOCK16 else ("tiled", "entries", "entries_columns", "library")


@functools.lru_cache(maxsize=4096)
def choose_sddmm(call: SDDMMCall, rates: Rates) -> str:
    return min(sddmm_ways(call), key=lambda way: sddmm_seconds(call, way, rates))


def sddmm_seconds(call: SDDMMCall, way: str, rates: Rates) -> float:
    T, M, N, size = call.tokens, call.M, call.N, call.element_size
    rate = gemm_rate(rates, size, call.tf32)
    floor = (T * (M + N) + call.nnz) * size / rates.bandwidth
    if way == "library":
        dW = M * N * (4 if call.mixed else size) / rates.bandwidth
        picking = min(dW, call.nnz * _SECTOR / rates.bandwidth)
        launches = rates.launch_seconds + rates.kernel_launch_seconds
        return launches + max(2 * T * M * N / rate, floor + dW) + picking
    if way == "blocks":  # gathered columns come by the sector, for each row of blocks again
        gathered = T * call.nnz / 16 * _SECTOR / rates.l2_bandwidth
        return rates.kernel_launch_seconds + max(2 * T * call.nnz / (rate * rates.kernel_efficiency), floor, gathered)
    if way == "packed":
        packed = T * call.nnz / (N if call.structure == ROW else M)
        copying = packed * (_SECTOR + size) / rates.bandwidth
        launches = rates.launch_seconds + rates.kernel_launch_seconds
        return launches + copying + max(2 * T * call.nnz / rate, floor)
    if way == "tiled":
        efficiency = rates.kernel_efficiency * _filled(M, N, rates)
        return rates.kernel_launch_seconds + max(2 * T * M * N / (rate * efficiency), floor)
    # dy's column serves all entries of a row that a program holds; x's is another for each entry
    if way == "entries":
        return rates.kernel_launch_seconds + max(call.nnz * T * _SECTOR / rates.l2_bandwidth, floor)
    copies = 2 * rates.kernel_launch_seconds + 2 * T * (M + N) * size / rates.bandwidth
    return copies + rates.kernel_launch_seconds + max(call.nnz * T * size / rates.l2_bandwidth, floor)
