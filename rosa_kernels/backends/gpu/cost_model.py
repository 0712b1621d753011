"""How the GPU backends count the seconds of a call, and what both of them leave to library GEMMs.

A step takes the larger of FLOPs / rate and bytes / bandwidth, plus a constant for each launch. A backend's own
heuristics.py lists the algorithms that may serve a call, adds the seconds of its kernels, and takes the cheapest.

What the count says of library calls, for 16-bit operands on an H100:

- A library GEMM is faster than a loop of ours. What the adapter adds is written to y first. The base's GEMM adds to
  it, and reads y while it computes.
- In fp32 without tf32, W + scaling · B A + S is made for the call. One library GEMM then does everything, and it is
  exact enough. This is never done in 16 bits or in tf32, whose operands would round small deltas away.
- The delta scaling · B A + S can be one dense matrix and a second library GEMM. Its cost does not depend on the
  density. It is rounded once, relative to itself; W is not rounded.
- The delta may also hold adapters that are wider than x, fp32 beside bf16: it is summed in fp32 and rounded once, an
  error of the size of y's own rounding. Splitting it into bf16 terms that lose nothing would cost its GEMM two or three
  times. fp16 is left out, because its numbers end at 2**-24.
- Whole rows of S are a library GEMM with fewer outputs, and whole columns one with fewer inputs, which are gathered.
  Wider values are rounded as in the delta. Where S is alone they are taken as three terms.
- dS can be all of dyᵀ x by a library GEMM, of which the pattern's entries are kept: 2 · T · N · K FLOPs at any density.
  Reading transposed copies of dy and x by entry costs L2 reads that grow with the density.
"""

from typing import NamedTuple

from rosa_kernels.backends.gpu.device_rates import Rates
from rosa_kernels.pattern import ROW

SECTOR = 32
"""Bytes that a gather moves from L2 for one element."""


class LinearCall(NamedTuple):
    """y (T, out_features) from x (T, in_features). A backward's dx from dy is such a call too, with the layer's sizes
    swapped. nnz counts elements, element_size bytes."""

    T: int
    out_features: int
    in_features: int
    r: int = 0
    nnz: int = 0
    structure: int = 0
    element_size: int = 2
    tf32: bool = False
    has_base: bool = True
    """Whether there is a weight to multiply."""
    dropout: str = ""
    """As LinearProblem.drop_at."""
    mixed_lora: bool = False
    """lora_A or lora_B is not of x's dtype."""
    mixed_values: bool = False
    """S is not of x's dtype."""
    H_known: bool = False
    fp16: bool = False
    keeps_H: bool = False
    """H is made for the backward, whether or not y needs it."""


def may_merge(call: LinearCall) -> bool:
    """Whether W + scaling · B A + S, made for the call, is exact enough."""
    has_adapter = call.r > 0 or call.nnz > 0
    return call.has_base and has_adapter and call.element_size == 4 and not call.tf32 and not call.dropout


def may_round_delta(call: LinearCall) -> bool:
    """Whether scaling · B A + S may be rounded to x's dtype and multiplied as one matrix.

    Rounding wider values is no worse than rounding H beside them. Where S is alone there is no such H.
    """
    wider = call.mixed_values or call.mixed_lora
    return not (call.r and call.dropout) and not (wider and (call.fp16 or not call.r))


def step_seconds(call: LinearCall, rates: Rates, flops: float, elements: float, efficiency: float = 0.0) -> float:
    """One step of a call: by the library, or by a kernel of ours that reaches this share of the library's FLOP/s."""
    launch = rates.kernel_launch_seconds if efficiency else rates.launch_seconds
    flops_rate = gemm_rate(rates, call.element_size, call.tf32) * (efficiency or 1.0)
    return launch + max(flops / flops_rate, elements * call.element_size / rates.bandwidth)


def library_seconds(call: LinearCall, base: str, low_rank: str, sparse: str, rates: Rates) -> float:
    """The parts of an algorithm that library GEMMs serve, with what makes their operands.

    base "merged" or "library", low_rank "library", and sparse "delta", "rows" or "columns" count. Other words are a
    backend's own.
    """
    T, N, K = call.T, call.out_features, call.in_features
    gemm = 2 * T * N * K, T * (N + K) + N * K
    seconds = 0.0
    if call.keeps_H and (base == "merged" or low_rank == "delta"):  # others make it on their way
        seconds += step_seconds(call, rates, 2 * T * K * call.r, T * K + call.r * (T + K))
    if base == "merged":
        seconds += step_seconds(call, rates, 2 * N * K * call.r, 3 * N * K)
        if call.nnz:
            seconds += step_seconds(call, rates, 0, 2 * call.nnz, 1.0)
        return seconds + step_seconds(call, rates, *gemm)
    if base == "library":
        adds = bool(low_rank or sparse)
        seconds += step_seconds(call, rates, gemm[0], gemm[1] + (T * N if adds else 0))
    if sparse == "delta":
        seconds += step_seconds(call, rates, 0, N * K + 2 * call.nnz, 1.0)
        if call.r:
            seconds += step_seconds(call, rates, 2 * N * K * call.r, 2 * N * K)
        if call.r and (call.mixed_lora or call.mixed_values):  # it is made in fp32, then narrowed
            seconds += step_seconds(call, rates, 0, 4 * N * K)
        seconds += step_seconds(call, rates, *gemm)
    if low_rank == "library":
        if not call.H_known:
            seconds += step_seconds(call, rates, 2 * T * K * call.r, T * K + call.r * (T + K))
        adds = sparse == "columns"
        seconds += step_seconds(call, rates, 2 * T * N * call.r, (2 if adds else 1) * T * N + call.r * (T + N))
    if sparse in ("rows", "columns"):
        seconds += _whole_rows_or_columns_seconds(call, sparse, rates)
    return seconds


def _whole_rows_or_columns_seconds(call: LinearCall, sparse: str, rates: Rates) -> float:
    """ "rows" are a GEMM with an fp32 result, which is then added at its places. "columns" are a gather of x, then a
    GEMM that adds to y."""
    T, size = call.T, call.element_size
    terms = 3 if call.mixed_values and size == 2 and not call.r else 1
    flops = 2 * T * call.nnz * terms / gemm_rate(rates, size, call.tf32)
    if sparse == "rows":
        product = T * call.nnz / call.in_features
        moved, scattered = T * call.in_features * size + 4 * product * terms, product * (4 + 2 * SECTOR)
    else:
        gathered = T * call.nnz / call.out_features
        moved = (T * call.out_features + gathered * terms) * size
        scattered = gathered * (SECTOR + size * terms)
    launches = rates.launch_seconds + rates.kernel_launch_seconds
    return launches + max(flops, moved / rates.bandwidth) + scattered / rates.bandwidth


def gemm_rate(rates: Rates, element_size: int, tf32: bool) -> float:
    """FLOP/s of a library GEMM."""
    if element_size == 2:
        return rates.flops_16_bit
    return rates.flops_tf32 if tf32 else rates.flops_fp32


class SDDMMCall(NamedTuple):
    """dS (nnz,) from dy (T, out_features) and x (T, in_features)."""

    T: int
    out_features: int
    in_features: int
    nnz: int
    structure: int = 0
    element_size: int = 2
    tf32: bool = False
    mixed: bool = False
    """dS is not of x's dtype."""


def sddmm_seconds(call: SDDMMCall, algorithm: str, rates: Rates) -> float:
    """Of "packed", "library" or "entries_transposed", which both backends have."""
    T, N, K, size = call.T, call.out_features, call.in_features, call.element_size
    rate = gemm_rate(rates, size, call.tf32)
    floor = sddmm_floor_seconds(call, rates)
    launches = rates.launch_seconds + rates.kernel_launch_seconds
    if algorithm == "library":
        dW = N * K * (4 if call.mixed else size) / rates.bandwidth
        gathering = min(dW, call.nnz * SECTOR / rates.bandwidth)
        return launches + max(2 * T * N * K / rate, floor + dW) + gathering
    if algorithm == "packed":
        packed = T * call.nnz / (K if call.structure == ROW else N)
        copying = packed * (SECTOR + size) / rates.bandwidth
        return launches + copying + max(2 * T * call.nnz / rate, floor)
    copies = 2 * rates.kernel_launch_seconds + 2 * T * (N + K) * size / rates.bandwidth
    return copies + entries_seconds(call, size, rates)


def sddmm_floor_seconds(call: SDDMMCall, rates: Rates) -> float:
    """Reading dy and x once and writing dS."""
    elements = call.T * (call.out_features + call.in_features) + call.nnz
    return elements * call.element_size / rates.bandwidth


def entries_seconds(call: SDDMMCall, bytes_an_element: int, rates: Rates) -> float:
    """A kernel that gathers by entry. dy's column serves all entries of a row that a program holds, but x's is another
    for each entry."""
    gathered = call.nnz * call.T * bytes_an_element / rates.l2_bandwidth
    return rates.kernel_launch_seconds + max(gathered, sddmm_floor_seconds(call, rates))
