"""The CUDA kernels pass the ops' tests on the CPU, under the emulation of cuda_emulation.h, in processes of their own:
all with their threads in order, some in reversed order, under AddressSanitizer and under ThreadSanitizer.

Missed barriers, shared memory read before it is written, accesses out of bounds and races fail here, as the planted
ones of test_faults.py do. `pytest -rA` shows how many passed.
"""

import os

import pytest

import cuda_emulation
from child_runs import count_passed

pytestmark = pytest.mark.skipif("CUDA_EMULATED" in os.environ, reason="starts emulated runs: this is one")

OPS = (
    "ops/test_ops.py",
    "ops/test_dropout.py",
    "ops/test_gradients.py",
    "ops/test_dispatch.py",
    "cuda/test_algorithms.py",
)
CALLS = ("cuda/test_large_sizes.py", "cuda/test_refusals.py")
"""Of single kernels, in a second."""


def needs(variant):
    reason = cuda_emulation.unavailable_reason(variant)
    return pytest.mark.skipif(reason is not None, reason=f"no emulation: {reason}")


def run(variant: str, files: tuple[str, ...], every: int, fewest: int, order: str = "forward") -> None:
    """Fewer than `fewest` that pass mean that a selection or a parameter went wrong."""
    environment = cuda_emulation.environment(variant)
    environment |= {"CUDA_EMULATED": str(cuda_emulation.build(variant)), "ROSA_EMULATION_ORDER": order}
    assert count_passed(files, environment, every=every) >= fewest


@needs("plain")
def test_the_kernels_pass_the_ops_tests(exhaustive):
    every, fewest = (1, 2000) if exhaustive else (29, 65)
    run("plain", OPS, every, fewest)


@needs("plain")
@pytest.mark.exhaustive
def test_they_reach_large_sizes_and_refuse_what_does_not_fit():
    run("plain", CALLS, every=1, fewest=350)


@pytest.mark.exhaustive
@needs("plain")
def test_they_do_so_whatever_order_threads_and_blocks_take():
    run("plain", OPS, every=11, fewest=150, order="reversed")


@pytest.mark.exhaustive
@needs("address")
def test_no_access_is_out_of_bounds_or_misaligned():
    run("address", OPS, every=31, fewest=60)
    run("address", CALLS, every=1, fewest=350)


@pytest.mark.exhaustive
@needs("thread")
def test_no_two_accesses_race():
    run("thread", ("cuda/test_algorithms.py",), every=23, fewest=12)
