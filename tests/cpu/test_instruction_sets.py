"""Every instruction set's kernels pass the ops' tests, not only the ones that this processor would choose."""

import os
import subprocess
import sys

import pytest

import rosa_kernels as rk
from paths import REPOSITORY, TESTS
from rosa_kernels.backends import cpu

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)


def _run(instruction_set: str, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"ROSA_KERNELS_CPU": instruction_set}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.parametrize("instruction_set", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
def test_ops_on(instruction_set):
    if instruction_set not in cpu.build_info().split(";")[0].split():
        pytest.skip(f"this processor has no {instruction_set}, or the compiler had none")
    named = _run(instruction_set, "-c", "from rosa_kernels.backends import cpu; print(cpu.instruction_set())")
    assert named.stdout.strip() == instruction_set, named.stderr
    run = _run(
        instruction_set,
        "-m",
        "pytest",
        str(TESTS / "ops" / "test_ops.py"),
        "-q",
        "-x",
        "-k",
        "cpu-",
        "-p",
        "no:cacheprovider",
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_unknown_instruction_set_is_an_error():
    run = _run("sse9", "-c", "from rosa_kernels.backends import cpu; cpu.instruction_set()")
    assert run.returncode != 0 and "ROSA_KERNELS_CPU" in run.stderr
