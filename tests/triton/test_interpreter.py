"""The Triton kernels pass the ops' tests under Triton's interpreter, in processes of their own.

TRITON_INTERPRET is read when Triton is imported, and the interpreter is slow: the cores share the tests of
interpreter_subset.py. interpreter_guard.py refuses there what the interpreter computes wrongly in bf16. `pytest
-rA` shows how many passed.
"""

import os

import pytest

from child_runs import count_passed

pytest.importorskip("triton", reason="backend triton: Triton is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreted run: this is one"
)

FILES = (
    "ops/test_ops.py",
    "ops/test_dropout.py",
    "ops/test_gradients.py",
    "ops/test_dispatch.py",
    "triton/test_algorithms.py",
    "triton/test_autotune.py",
    "triton/test_interpreter_guard.py",
)
LARGE_SIZES = ("triton/test_large_sizes.py",)


def test_the_interpreted_kernels_pass_the_ops_tests(exhaustive):
    """Fewer than these numbers mean that a selection or a parameter went wrong, and little was tested."""
    every, fewest = (1, 900) if exhaustive else (23, 38)
    assert count_passed(FILES, {"TRITON_INTERPRET": "1"}, every=every) >= fewest


@pytest.mark.exhaustive
def test_the_interpreted_kernels_reach_large_sizes():
    assert count_passed(LARGE_SIZES, {"TRITON_INTERPRET": "1"}) >= 35
