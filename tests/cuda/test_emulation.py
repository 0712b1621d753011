"""The CUDA kernels pass the ops' tests on the CPU, under the emulation of cuda_emulation.h, in processes of their own:
all with their threads in order, some in reversed order, under AddressSanitizer and under ThreadSanitizer.

Missed barriers, shared memory read before it is written, accesses out of bounds and races fail here, as the planted
ones of test_faults.py do. `pytest -rA` shows how many passed.
"""

import os
import re
import subprocess
import sys
import time

import pytest

import cuda_emulation
from paths import REPOSITORY, TESTS

pytestmark = pytest.mark.skipif("CUDA_EMULATED" in os.environ, reason="starts emulated runs: this is one")

OPS = (
    "ops/test_ops.py",
    "ops/test_dropout.py",
    "ops/test_gradients.py",
    "ops/test_dispatch.py",
    "cuda/test_algorithms.py",
)
PROCESSES = max(1, len(os.sched_getaffinity(0)))


def needs(variant):
    reason = cuda_emulation.unavailable_reason(variant)
    return pytest.mark.skipif(reason is not None, reason=f"no emulation: {reason}")


def run(variant: str, files: tuple[str, ...], every: int, fewest: int, order: str = "forward") -> None:
    """Every n-th test of the files, in processes that share them; n shares no factor with the numbers of parameters.
    Fewer than `fewest` that pass mean that a selection or a parameter went wrong."""
    environment = os.environ | cuda_emulation.environment(variant)
    environment |= {"CUDA_EMULATED": str(cuda_emulation.build(variant)), "ROSA_EMULATION_ORDER": order}
    # -s: the sanitizers write past pytest's capture
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tb=short"]
    command += [str(TESTS / name) for name in files]
    start = time.perf_counter()
    processes = [
        subprocess.Popen(
            [*command, f"--part={part * every}/{PROCESSES * every}"],
            env=environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, f"{output[:6000]}\n...\n{output[-6000:]}"
    passed = sum(int(count) for output in outputs for count in re.findall(r"(\d+) passed", output))
    seconds = time.perf_counter() - start
    print(f"{variant}, {order}: {passed} emulated tests passed in {PROCESSES} processes in {seconds:.0f} s")
    assert passed >= fewest


@needs("plain")
def test_the_kernels_pass_the_ops_tests():
    run("plain", OPS, every=1, fewest=2000)


@needs("plain")
def test_they_do_so_whatever_order_threads_and_blocks_take():
    run("plain", OPS, every=5, fewest=400, order="reversed")


@needs("address")
def test_no_access_is_out_of_bounds_or_misaligned():
    run("address", OPS, every=31, fewest=60)


@needs("thread")
def test_no_two_accesses_race():
    run("thread", ("cuda/test_algorithms.py",), every=23, fewest=12)
