"""Which kernels and library calls of the Triton backend make y, dx and dS: the cheapest by the count.

gpu/cost_model.py says how seconds are counted, and what library calls are worth. What the count says of the kernels,
for 16-bit operands on an H100 (T tokens, an N x K weight):

- The linear kernel multiplies the weight itself beside an S or wider adapters where the GEMM is small, or bound by
  reading W for few tokens. There one launch from Python costs less than several calls.
- Reading x by entry of an unstructured S moves a 32-byte sector from L2 for each entry and token. From a transposed
  copy of x it moves one element, 16 bytes a load. That is best for a sparse S: a density below 0.3 % at many tokens.
- A dense S in the kernel's loop, beside W, costs the base's FLOPs once more at any density. The alternative is the
  delta as a second library GEMM. Tiles of W + S densified inside the loop would round S into W. Tiles of S made there
  would be made anew for every tile of tokens. Values wider than x take three dots.
- 16 x 16 blocks are multiplied by the kernel, which gathers their inputs around the dots.
- dS by tiles of dyᵀ x on the tensor cores costs 2 · T · N · K FLOPs at any density. A library GEMM is faster but keeps
  all of dW. Gathering by entry is best for fp32 or a very sparse S.

Compiled for sm_90 in 128 x 128 x 64 tiles, a step of the loop is 116 instructions with W alone. It is 163 with S beside
W, which takes 512 more cycles of the tensor cores. One entry of each of 128 rows, gathered from a transposed copy, is
435 instructions (tests/triton/test_aot.py). On an H100 the loop reached 0.73 of the library's FLOP/s, and a gather from
a transposed copy half of the L2 rate that others report; both figures are in gpu/device_rates.py.
"""

import functools
import math
from typing import NamedTuple

from rosa_kernels.backends.gpu import cost_model
from rosa_kernels.backends.gpu.cost_model import SECTOR, LinearCall, SDDMMCall, gemm_rate, step_seconds
from rosa_kernels.backends.gpu.device_rates import Rates
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

LARGEST_R_INSIDE = 64
"""Largest rank whose H the linear kernel makes itself, for few tokens: each tile of outputs makes it anew."""
FEW_TOKENS = 512
"""Above this, x is gathered from a transposed copy only."""
_L2_LATENCY = 0.8e-6
"""Seconds that one step of a gather was seen to take on an H100: a load of indices, then a load of x."""
_SPARSE_IN_THE_KERNEL = ("gather", "gather_transposed", "dense")


class LinearAlgorithm(NamedTuple):
    """Who multiplies the weight, and where H and x Sᵀ come from. "" stands for a part that the call does not have.

    base: the "kernel", the "library", or the library with a "merged" weight that leaves nothing else to do.
    low_rank: H is made "inside" the kernel, "before" it, by the "library", or "known" already.
    sparse: "gather" reads x by entry and "gather_transposed" a transposed copy of it; "dense" stands beside W in the
    kernel's loop; "blocks" are multiplied by the kernel on its own; "rows" and "columns" are the library's.
    low_rank and sparse "delta": the matrix scaling · B A + S is multiplied by the library.
    """

    base: str
    low_rank: str = ""
    sparse: str = ""

    @property
    def runs_the_kernel(self) -> bool:
        """Whether the linear kernel runs before blocks or whole rows are added."""
        return (
            self.base == "kernel"
            or self.low_rank in ("inside", "before", "known")
            or self.sparse in _SPARSE_IN_THE_KERNEL
        )


def linear_algorithms(call: LinearCall) -> list[LinearAlgorithm]:
    """Those that may serve the call, in a fixed order."""
    algorithms = [LinearAlgorithm("merged")] if cost_model.may_merge(call) else []
    for base in ("library", "kernel") if call.has_base else ("",):
        for sparse in _choices_of_sparse(call, base):
            choices = _choices_of_low_rank(call, base, sparse)
            algorithms += [LinearAlgorithm(base, low_rank, sparse) for low_rank in choices]
    return algorithms


def _choices_of_sparse(call: LinearCall, base: str) -> tuple[str, ...]:
    if not call.nnz:
        return ("",)
    by_structure = {ROW: ("rows",), COLUMN: ("columns",), BLOCK16: ("blocks",)}
    if call.structure in by_structure:
        return by_structure[call.structure]
    gather = ("gather",) if call.T <= FEW_TOKENS else ()
    delta = ("delta",) if base != "kernel" and cost_model.may_round_delta(call) else ()
    return (*gather, "gather_transposed", "dense", *delta)


def _choices_of_low_rank(call: LinearCall, base: str, sparse: str) -> tuple[str, ...]:
    if not call.r:
        return ("",)
    if sparse == "delta":
        return ("delta",)
    by_library = base == "library" and sparse not in _SPARSE_IN_THE_KERNEL and not call.dropout and not call.mixed_lora
    if call.H_known:
        return ("known", "library") if by_library else ("known",)
    few = call.r <= LARGEST_R_INSIDE and call.T <= FEW_TOKENS and not call.keeps_H
    return (*(("inside",) if few else ()), "before", *(("library",) if by_library else ()))


@functools.lru_cache(maxsize=4096)
def choose_linear(call: LinearCall, rates: Rates) -> LinearAlgorithm:
    return min(linear_algorithms(call), key=lambda algorithm: linear_seconds(call, algorithm, rates))


def linear_seconds(call: LinearCall, algorithm: LinearAlgorithm, rates: Rates) -> float:
    """What the algorithm is expected to take."""
    T, N, K = call.T, call.out_features, call.in_features
    seconds = cost_model.library_seconds(call, *algorithm, rates)
    loop_efficiency = rates.kernel_efficiency * _busy_share(T, N, rates)
    if algorithm.low_rank == "before":
        seconds += rates.kernel_launch_seconds  # its parts are added
        dots = 3 if call.mixed_lora else 1
        seconds += step_seconds(call, rates, 2 * T * K * call.r * dots, T * K + call.r * (T + K), 1.0)
    if algorithm.sparse == "blocks":
        dots = 3 if call.mixed_values else 1
        elements = T * K + 2 * T * N + call.nnz
        seconds += step_seconds(call, rates, 2 * T * call.nnz * dots, elements, loop_efficiency)
    if algorithm.sparse == "dense":
        seconds += step_seconds(call, rates, 0, (3 if call.mixed_values else 1) * N * K, 1.0)
    if algorithm.sparse == "gather_transposed":
        seconds += step_seconds(call, rates, 0, 2 * T * K, 1.0)
    if algorithm.runs_the_kernel:
        seconds += step_seconds(call, rates, *_kernel_work(call, algorithm), loop_efficiency)
        seconds += _l2_seconds(call, algorithm, rates)
    return seconds


def _busy_share(rows: float, columns: float, rates: Rates) -> float:
    """The share of the multiprocessors that work, on average, while tiles of a product are computed in waves."""
    waves = max(1, rows / 128) * max(1, columns / 128) / rates.multiprocessors
    return waves / math.ceil(waves)


def _kernel_work(call: LinearCall, algorithm: LinearAlgorithm) -> tuple[float, float]:
    """(FLOPs, elements moved) of the linear kernel without its gathers."""
    T, N, K = call.T, call.out_features, call.in_features
    reads_x = algorithm.base == "kernel" or algorithm.low_rank == "inside" or algorithm.sparse
    elements = T * N + (T * K if reads_x else 0)
    flops = 2.0 * T * N * call.r
    if algorithm.base == "kernel":
        flops, elements = flops + 2.0 * T * N * K, elements + N * K
    if algorithm.low_rank == "inside":  # for each tile of outputs anew
        flops += 2.0 * T * K * max(16, call.r) * -(-N // 128) * (3 if call.mixed_lora else 1)
    if algorithm.sparse == "dense":
        flops += 2.0 * T * N * K * (3 if call.mixed_values else 1)
        elements += N * K * (2 if call.mixed_values else 1)
    return flops, elements


def _l2_seconds(call: LinearCall, algorithm: LinearAlgorithm, rates: Rates) -> float:
    """Reads that L2 serves again and again.

    H made inside the kernel reads A in every tile of outputs, and x too where W is not multiplied there. A gather reads
    x by entry of S, one entry of a row after the other: where they are many, each waits for L2 in turn.
    """
    T, N, K, size = call.T, call.out_features, call.in_features, call.element_size
    seconds = 0.0
    if algorithm.low_rank == "inside":
        A = call.r * K * (4 if call.mixed_lora else size)
        x = 0 if algorithm.base == "kernel" else T * K * size
        seconds += (A * N / 32 + x * N / 64) / rates.l2_bandwidth
    if algorithm.sparse in ("gather", "gather_transposed"):
        by_entry = SECTOR * T if algorithm.sparse == "gather" else max(SECTOR, T * size)
        at_once = 8 if T <= 16 else 4 if T <= 32 else 1  # entries of a row, by the tiles of few tokens
        in_turn = _L2_LATENCY * call.nnz / (N * at_once)
        seconds += max(call.nnz * by_entry / rates.l2_bandwidth, in_turn)
    return seconds


def low_rank_gradients_by_library(T: int, out_features: int, element_size: int, rates: Rates) -> bool:
    """Whether the launches that library GEMMs for dH, dA and dB save are worth their second read of dy.

    They are 3 calls in place of 5 launches, which include the additions of parts. Few tokens come in no parts: there
    the kernels take 3 launches.
    """
    launches = 3 if T <= 32 else 5
    saved = launches * rates.kernel_launch_seconds - 3 * rates.launch_seconds
    return saved > T * out_features * element_size / rates.bandwidth


def dy_read_once(r: int) -> bool:
    """Whether one kernel makes dB and dH from one read of dy.

    A second read of dy moves T · N elements. Making dH beside dB moves a part of it, T · r in fp32, written and read,
    for each 128 outputs: 2 · T · r · 4 bytes · N / 128 against 2 · T · N bytes in 16 bits. That is half at r = 16.
    """
    return r <= 16


def sddmm_algorithms(call: SDDMMCall) -> tuple[str, ...]:
    """Those that may serve the call.

    "packed", for rows and columns, copies the columns of dy or x that they need for a library GEMM. "blocks" is for 16
    x 16 blocks. For other patterns "tiled" multiplies tiles of dyᵀ x, "entries" gathers by entry, "entries_transposed"
    does so from transposed copies of dy and x, and "library" makes all of dyᵀ x, in fp32 for a wider dS, and gathers
    its entries.
    """
    if call.structure in (ROW, COLUMN):
        return ("packed",)
    return ("blocks",) if call.structure == BLOCK16 else ("tiled", "entries", "entries_transposed", "library")


@functools.lru_cache(maxsize=4096)
def choose_sddmm(call: SDDMMCall, rates: Rates) -> str:
    return min(sddmm_algorithms(call), key=lambda algorithm: sddmm_seconds(call, algorithm, rates))


def sddmm_seconds(call: SDDMMCall, algorithm: str, rates: Rates) -> float:
    """What the algorithm is expected to take."""
    T, N, K = call.T, call.out_features, call.in_features
    rate = gemm_rate(rates, call.element_size, call.tf32) * rates.kernel_efficiency
    floor = cost_model.sddmm_floor_seconds(call, rates)
    if algorithm == "blocks":  # gathered columns come by the sector, for each row of blocks again
        gathered = T * call.nnz / 16 * SECTOR / rates.l2_bandwidth
        return rates.kernel_launch_seconds + max(2 * T * call.nnz / rate, floor, gathered)
    if algorithm == "tiled":
        return rates.kernel_launch_seconds + max(2 * T * N * K / (rate * _busy_share(N, K, rates)), floor)
    if algorithm == "entries":
        return cost_model.entries_seconds(call, SECTOR, rates)
    return cost_model.sddmm_seconds(call, algorithm, rates)
