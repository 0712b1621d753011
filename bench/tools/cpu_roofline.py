"""Shows how near each CPU kernel comes to this machine's GEMM and copy rates: `python bench/tools/cpu_roofline.py`.

A kernel (cpu_kernels.py) is compared with the fp32 GEMM of PyTorch, a copy in memory and a copy in cache. All are timed
in turn within each round, so that a slow spell of the machine meets all of them. A figure is the lower quartile of its
rounds.
"""

import argparse
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

import rosa_kernels as rk
from cpu_kernels import DTYPES, Kernel, kernels_of
from interleaved import WallClock, aligned, calls_a_round, lower_quartile
from layers import DENSITY, RANK, STEP_SHAPES, Shape
from rosa_kernels.backends import cpu

GEMM_SIZE = 1536
COPIED, COPIED_IN_CACHE = 2**27, 2**21  # bytes read, and as many written
GOAL = 1.05  # over the plain GEMM, for rows, columns and blocks

LEGEND = f"""\
GFLOP/s, GB/s  the FLOPs and bytes that the kernel cannot do without, over its time
of GEMM        the share of what torch.mm of {GEMM_SIZE} x {GEMM_SIZE} fp32 matrices reaches in the same rounds
of copy        the share of what copy_ of {COPIED >> 20} MiB reaches; a copy moves 2 bytes per byte
Mentry/s       entries of S times tokens, in millions
gather GB/s    the fp32 bytes of x or dy that single entries of an unstructured S load
of cache       the share of what copy_ of {COPIED_IN_CACHE >> 20} MiB reaches in cache; above 100 % nearer caches serve
bound          the highest of these shares
plain ms       one fp32 torch.mm or addmm_ with as many FLOPs as the S part, its inputs side by side
ratio          the kernel's time over it, at equal FLOPs; the goal for rows, columns and blocks is {GOAL:.2f}
Rank {RANK}, {DENSITY:.0%} density."""

COLUMNS = (
    *("kernel", "ms", "GFLOP/s", "of GEMM", "GB/s", "of copy", "Mentry/s", "gather GB/s", "of cache", "bound"),
    *("plain ms", "ratio"),
)


class Machine:
    """The machine's own rates. They are measured in the same rounds as the kernels."""

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
        """Returns FLOP/s of the GEMM and bytes/s of the copies."""
        work = {"gemm": 2 * GEMM_SIZE**3, "copy": 2 * COPIED, "cache": 2 * COPIED_IN_CACHE}
        return {name: amount / seconds[name] for name, amount in work.items()}


def lower_quartiles(candidates: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Returns each candidate's seconds a call, from rounds that take about `seconds` together."""
    clock = WallClock()
    for function in candidates.values():
        function()
    one_call = {name: clock(function, 1) for name, function in candidates.items()}
    calls = calls_a_round(clock, one_call)
    rounds = max(5, min(40, round(seconds / sum(calls[name] * t for name, t in one_call.items()))))
    samples = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            samples[name].append(clock(function, calls[name]) / calls[name])
    return {name: lower_quartile(times) for name, times in samples.items()}


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


def roofline(shape: Shape, dtype: str, threads: list[int], machine: Machine, seconds: float) -> None:
    """Prints a table for each thread count, and then how the times scale with it."""
    kernels = kernels_of(shape, DTYPES[dtype])
    by_threads = {}
    for count in threads:
        torch.set_num_threads(count)
        times = by_threads[count] = measure(kernels, machine, seconds)
        rates = machine.rates(times)
        print(f"\n{shape} {dtype}, {count} threads: GEMM {rates['gemm'] / 1e9:.0f} GFLOP/s, ", end="")
        print(f"copy {rates['copy'] / 1e9:.1f} GB/s, in cache {rates['cache'] / 1e9:.0f} GB/s\n")
        rows = [COLUMNS, *(row(kernel, times, rates) for kernel in kernels)]
        print(aligned(rows, numbers=True), flush=True)
    if len(threads) > 1:
        print(f"\n{shape} {dtype}, speed-up over {threads[0]} threads\n\n{scaling(kernels, by_threads)}", flush=True)


def scaling(kernels: list[Kernel], by_threads: dict[int, dict[str, float]]) -> str:
    """Returns the speed-up of the machine's rates, of each kernel and of all kernels together."""
    names = [kernel.name for kernel in kernels]
    rows = [("", *(f"{count} threads" for count in by_threads))]
    first, *_ = by_threads.values()
    for name in ("gemm", "copy", "cache", *names):
        rows.append((name, *(f"{first[name] / times[name]:.2f}" for times in by_threads.values())))
    totals = [sum(times[name] for name in names) for times in by_threads.values()]
    rows.append(("all kernels, ms", *(f"{total * 1e3:.1f}" for total in totals)))
    rows.append(("all kernels", *(f"{totals[0] / total:.2f}" for total in totals)))
    return aligned(rows, numbers=True)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts (default: 1 2)")
    parser.add_argument(
        *("--shape", "--shapes"),
        type=Shape.parse,
        nargs="+",
        default=STEP_SHAPES,
        metavar="OUTxINxTOKENS",
        help=f"out_features x in_features x tokens (default: {' '.join(map(str, STEP_SHAPES))})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="dtype of x, y and W (default: both)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="how long a table's rounds take; there are at least 5 (default: 5)"
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
