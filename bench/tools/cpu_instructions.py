"""Counts the instructions that each CPU kernel takes: `python bench/tools/cpu_instructions.py` (needs valgrind and cc).

valgrind's callgrind counts the same on every run, however noisy the machine is. It knows AVX2 and nothing newer, so
these are the AVX2 kernels, on one thread. The kernels are those of cpu_kernels.py.
"""

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cpu_kernels import DTYPES, kernels_of
from layers import Shape

MARKS = """\
#include <valgrind/callgrind.h>
void begin(void) { CALLGRIND_TOGGLE_COLLECT; }
void end(const char* name) { CALLGRIND_TOGGLE_COLLECT; CALLGRIND_DUMP_STATS_AT(name); }
"""
LANES = 8
LEGEND = f"""\
instructions   those of one call whose scratch memory is already there
/multiply-add  instructions over the vector multiply-adds ({LANES} a vector) that the FLOPs need; 1.00 is the least
One thread; callgrind, AVX2."""


def run_kernels(shape: Shape, dtype: str, marks: ctypes.CDLL) -> None:
    """Calls each kernel twice under callgrind and counts the second call, which finds its memory made."""
    torch.set_num_threads(1)
    for kernel in kernels_of(shape, DTYPES[dtype]):
        kernel.run()
        marks.begin()
        kernel.run()
        marks.end(kernel.name.encode())


def instructions(shape: Shape, dtype: str) -> dict[str, int]:
    """Returns {kernel's name: instructions of a call}."""
    with tempfile.TemporaryDirectory() as directory:
        marks = Path(directory, "marks.so")
        compiler = ["cc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(marks)]
        subprocess.run(compiler, input=MARKS, check=True, text=True)
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out", "--collect-atstart=no"]
        command += [sys.executable, __file__, "--shape", str(shape), "--dtype", dtype, "--marks", str(marks)]
        environment = os.environ | {"ROSA_KERNELS_CPU": "avx2", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr[-3000:])
        dumps = [path.read_text() for path in Path(directory).glob("out.[0-9]*")]
    pattern = re.compile(r"^desc: Trigger: Client Request: (.+?)$.*^totals: (\d+)", re.MULTILINE | re.DOTALL)
    return {name: int(total) for name, total in (pattern.search(dump).groups() for dump in dumps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        default=Shape(768, 768, 512),
        metavar="OUTxINxTOKENS",
        help="out_features x in_features x tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="dtype of x, y and W (default: both)"
    )
    parser.add_argument("--marks", help=argparse.SUPPRESS)  # main() gives it to the process under valgrind
    options = parser.parse_args()
    if options.marks:
        run_kernels(options.shape, *options.dtype, ctypes.CDLL(options.marks))
        return
    for needed in ("valgrind", "cc"):
        if shutil.which(needed) is None:
            sys.exit(f"{needed} is not found: install it (apt install valgrind gcc)")
    print(LEGEND)
    for dtype in options.dtype:
        print(f"\n{options.shape}, {dtype}\n{'kernel':<28}{'instructions':>14}{'/multiply-add':>15}")
        counts = instructions(options.shape, dtype)
        # The processor that valgrind shows may lack kernels that this one has: those that multiply the frozen weight.
        for kernel in (kernel for kernel in kernels_of(options.shape, DTYPES[dtype]) if kernel.name in counts):
            count = counts[kernel.name]
            print(f"{kernel.name:<28}{count:>14,}{count / (kernel.flops / 2 / LANES):>15.2f}", flush=True)


if __name__ == "__main__":
    main()
