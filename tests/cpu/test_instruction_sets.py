"""Every instruction set's kernels pass the ops' tests, not only the ones that this processor would choose."""

import os
import subprocess
import sys

import pytest

import rosa_kernels as rk
from child_runs import count_passed
from paths import REPOSITORY
from rosa_kernels.backends import cpu

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)


def chosen(instruction_set: str) -> subprocess.CompletedProcess:
    """A process that prints the instruction set of its kernels."""
    command = [sys.executable, "-c", "from rosa_kernels.backends import cpu; print(cpu.instruction_set())"]
    environment = os.environ | {"ROSA_KERNELS_CPU": instruction_set}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY)


ONLY_EXHAUSTIVE = (pytest.param(name, marks=pytest.mark.exhaustive) for name in ("amx", "avx512bf16", "avx512", "avx2"))


@pytest.mark.parametrize("instruction_set", [*ONLY_EXHAUSTIVE, "portable"])
def test_ops_on(instruction_set, exhaustive):
    if instruction_set not in cpu.build_info().split(";")[0].split():
        pytest.skip(f"this processor has no {instruction_set}, or the compiler had none")
    named = chosen(instruction_set)
    assert named.stdout.strip() == instruction_set, named.stderr
    every, fewest = (1, 700) if exhaustive else (23, 30)
    environment = {"ROSA_KERNELS_CPU": instruction_set}
    assert count_passed(("ops/test_ops.py",), environment, "-k", "cpu-", every=every, processes=1) >= fewest


def test_unknown_instruction_set_is_an_error():
    run = chosen("sse9")
    assert run.returncode != 0 and "ROSA_KERNELS_CPU" in run.stderr
