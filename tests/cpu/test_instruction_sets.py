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


def chosen(instruction_set: str, **environment: str) -> subprocess.CompletedProcess:
    """A process that prints the instruction set of its kernels, or why they do not serve."""
    report = "from rosa_kernels.backends import cpu; print(cpu.unavailable_reason() or cpu.instruction_set())"
    command = [sys.executable, "-c", report]
    environment = os.environ | {"ROSA_KERNELS_CPU": instruction_set} | environment
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


def test_an_unknown_instruction_set_is_an_error_at_import():
    """The error lists what this processor has; whoever asks for another backend goes on without these kernels."""
    run = chosen("sse9")
    error = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and error.startswith("ImportError: ROSA_KERNELS_CPU=sse9: expected one of")
    for name in cpu.build_info().split(" for ")[1].split(";")[0].split():
        assert name in error.split("expected")[1]
    assert "ROSA_KERNELS_BACKEND=reference" in error
    without = chosen("sse9", ROSA_KERNELS_BACKEND="reference")
    assert without.returncode == 0, without.stderr
    assert "expected one of the instruction sets" in without.stdout


def test_the_set_is_chosen_at_import():
    """A variable that changes later changes nothing; a wrong name in it would be met by no check."""
    command = "import os; from rosa_kernels.backends import cpu; os.environ['ROSA_KERNELS_CPU'] = 'sse9';"
    command += "print(cpu.instruction_set())"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
    assert run.stdout.strip() == cpu.instruction_set(), run.stderr
