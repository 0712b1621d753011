"""The Triton kernels pass the ops' tests under Triton's interpreter, in processes of their own.

TRITON_INTERPRET is read when Triton is imported, and the interpreter is slow: the cores share the tests of
interpreter_subset.py. interpreter_guard.py refuses there what the interpreter computes wrongly in bf16. `pytest
-rA` shows how many passed.
"""

import os
import re
import subprocess
import sys

import pytest

from paths import REPOSITORY, TESTS

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
    "triton/test_interpreter_guard.py",
)
PROCESSES = max(1, len(os.sched_getaffinity(0)))
FEWEST = 900
"""Tests that have to pass in all: fewer means that a selection or a parameter went wrong, and little was tested."""


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def outcome(process: subprocess.Popen) -> tuple[str, int]:
    """All that it wrote, and how many tests passed."""
    output, _ = process.communicate()
    passed = re.search(r"(\d+) passed", output)
    return output, int(passed[1]) if passed else 0


def test_the_interpreted_kernels_pass_the_ops_tests():
    files = [str(TESTS / name) for name in FILES]
    processes = [start(*files, f"--part={part}/{PROCESSES}") for part in range(PROCESSES)]
    outcomes = [outcome(process) for process in processes]
    for process, (output, _) in zip(processes, outcomes):
        assert process.returncode == 0, output[-6000:]
    passed = sum(count for _, count in outcomes)
    endings = [output.splitlines()[-1] for output, _ in outcomes]
    print(f"{passed} interpreted tests passed in {PROCESSES} processes: {endings}")
    assert passed >= FEWEST
