"""python bench/cpu_roofline.py [--threads 1 2 ...] [--shape OxIxT ...] [--dtype fp32 bf16]

Every CPU kernel by itself (cpu_kernels.py) against what this machine does: its fp32 GEMM, a copy in memory and a copy
in cache. All are timed in turn within each round and a figure is the lower quartile of its rounds, so that a slow
spell meets all of them.
"""

import argparse
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import rosa_kernels as rk
from cpu_kernels import Kernel, kernels_of
from interleaved import WallClock
from layers import DENSITY, RANK, STEP_SHAPES, Shape
from rosa_kernels.backends import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMM_SIZE = 1536
COPIED, COPIED_IN_CACHE = 2**27, 2**21  # bytes read, and as many written
GOAL = 1.05  # over the plain GEMM, for rows, columns and blocks

LEGEND = f"""\
GFLOP/s and GB/s: FLOPs and bytes that the kernel cannot do without, by count, over its time; "of GEMM", "of copy": the
share of what torch.mm of {GEMM_SIZE} x {GEMM_SIZE} fp32 matrices and copy_ of {COPIED >> 20} MiB reach in the same rounds (a copy moves 2 bytes
per byte). "gather": fp32 bytes that single entries of an unstructured S load, as a share of copy_ of {COPIED_IN_CACHE >> 20} MiB, which
stays in cache; over 100 % they come from nearer caches. Mentry/s: entries of S times tokens. "bound": the
highest share. "plain": one fp32 torch.mm or addmm_ with as many FLOPs as the S part, its inputs side by side, and the kernel's time
over it, scaled to equal FLOPs (goal for rows, columns and blocks: {GOAL:.2f}). Rank {RANK}, {DENSITY:.0%} density."""

COLUMNS = (
    *("kernel", "ms", "GFLOP/s", "of GEMM", "GB/s", "of copy", "Mentry/s", "gather GB/s", "of cache", "bound"),
    *("plain ms", "ratio"),
)


class Machine:
    """Its own rates, measured as candidates like the kernels."""

    def __init__(self):
        a, b, c = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(3))
        near, far = (torch.zeros(2, size, dtype=torch.uint8) for size in (COPIED_IN_CACHE, COPIED))
        self.candidates = {
            "gemm": lambda: torch.mm(a, b, out=c),
            "copy": lambda: far[0].copy_(far[1]),
            "cache": lambda: near[0].copy_(near[1]),
        }

    @staticmethod
    def rates(seconds: dict[str, float]) -> dict[str, float]:
        """FLOP/s and bytes/s."""
        work = {"gemm": 2 * GEMM_SIZE**3, "copy": 2 * COPIED, "cache": 2 * COPIED_IN_CACHE}
        return {name: amount / seconds[name] for name, amount in work.items()}


def lower_quartiles(candidates: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Seconds a call of each candidate, all in turn within each of about `seconds` of rounds."""
    clock = WallClock()
    for function in candidates.values():
        function()
    one_call = {name: clock(function, 1) for name, function in candidates.items()}
    calls = {name: max(1, round(clock.min_sample_seconds / t)) for name, t in one_call.items()}
    rounds = max(5, min(40, round(seconds / sum(calls[name] * t for name, t in one_call.items()))))
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            samples[name].append(clock(function, calls[name]) / calls[name])
    return {name: statistics.quantiles(times, n=4, method="inclusive")[0] for name, times in samples.items()}


def measure(kernels: list[Kernel], machine: Machine, seconds: float) -> dict[str, float]:
    candidates = dict(machine.candidates)
    for kernel in kernels:
        candidates[kernel.name] = kernel.run
        if kernel.plain:
            candidates[f"plain {kernel.name}"] = kernel.plain
    return lower_quartiles(candidates, seconds)


def row(kernel: Kernel, seconds: dict[str, float], rates: dict[str, float]) -> tuple[str, ...]:
    time = seconds[kernel.name]
    work = {"gemm": kernel.flops, "copy": kernel.bytes, "cache": kernel.gathered}
    share = {name: amount / time / rates[name] for name, amount in work.items()}
    bound = {"gemm": "FLOPs", "copy": "memory", "cache": "gathers"}[max(share, key=share.get)]
    gathers = ("", "", "")
    if kernel.gathered:
        per_second = kernel.gathered / time
        gathers = (f"{per_second / 4e6:.0f}", f"{per_second / 1e9:.1f}", f"{share['cache']:.0%}")
    plain = ("", "")
    if kernel.plain:
        gemm = seconds[f"plain {kernel.name}"] * kernel.flops / kernel.plain_flops
        plain = (f"{gemm * 1e3:.2f}", f"{time / gemm:.2f}")
    return (
        *(kernel.name, f"{time * 1e3:.2f}"),
        *(f"{kernel.flops / time / 1e9:.1f}", f"{share['gemm']:.0%}"),
        *(f"{kernel.bytes / time / 1e9:.1f}", f"{share['copy']:.0%}"),
        *(*gathers, bound, *plain),
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """The first column to the left, the numbers to the right."""
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()
        for cells in rows
    )


def roofline(shape: Shape, dtype: str, threads: list[int], machine: Machine, seconds: float) -> None:
    """Prints a table for each thread count, then how the times scale."""
    kernels = kernels_of(shape, DTYPES[dtype])
    by_threads = {}
    for count in threads:
        torch.set_num_threads(count)
        times = by_threads[count] = measure(kernels, machine, seconds)
        rates = machine.rates(times)
        print(f"\n{shape} {dtype}, {count} threads: GEMM {rates['gemm'] / 1e9:.0f} GFLOP/s, ", end="")
        print(f"copy {rates['copy'] / 1e9:.1f} GB/s, in cache {rates['cache'] / 1e9:.0f} GB/s\n")
        print(table([COLUMNS, *(row(kernel, times, rates) for kernel in kernels)]), flush=True)
    if len(threads) > 1:
        print(f"\n{shape} {dtype}, speed-up over {threads[0]} threads\n\n{scaling(kernels, by_threads)}", flush=True)


def scaling(kernels: list[Kernel], by_threads: dict[int, dict[str, float]]) -> str:
    """Of the machine's rates, each kernel and all kernels together."""
    names = [kernel.name for kernel in kernels]
    rows = [("", *(f"{count} threads" for count in by_threads))]
    first, *_ = by_threads.values()
    for name in ("gemm", "copy", "cache", *names):
        rows.append((name, *(f"{first[name] / times[name]:.2f}" for times in by_threads.values())))
    totals = [sum(times[name] for name in names) for times in by_threads.values()]
    rows.append(("all kernels, ms", *(f"{total * 1e3:.1f}" for total in totals)))
    rows.append(("all kernels", *(f"{totals[0] / total:.2f}" for total in totals)))
    return table(rows)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def shape_of(text: str) -> Shape:
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not sizes:
        raise argparse.ArgumentTypeError(f"expected outputs x inputs x tokens as in 768x768x4096, got {text}")
    return Shape(*map(int, sizes.groups()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument(
        *("--shape", "--shapes"),
        type=shape_of,
        nargs="+",
        default=STEP_SHAPES,
        metavar="OxIxT",
        help=f"outputs x inputs x tokens (default: {' '.join(map(str, STEP_SHAPES))})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of x, y and W (default: both)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="of rounds for a table, at least 5 rounds (default: 5)"
    )
    arguments = parser.parse_args()
    if reason := rk.available_backends()["cpu"]:
        parser.error(f"backend cpu: {reason}")
    print(f"{processor()}, kernels for {cpu.instruction_set()}, torch {torch.__version__}\n\n{LEGEND}")
    machine = Machine()
    for shape in arguments.shape:
        for dtype in arguments.dtype:
            roofline(shape, dtype, arguments.threads, machine, arguments.seconds)


if __name__ == "__main__":
    main()
