"""No Triton kernel reads or writes past a tensor: interpreted runs under AddressSanitizer, which knows every block of
memory by the byte.

The interpreter moves each element by a memcpy, and the sanitizer's library checks both of its ends. Masks that are
wrong by one show here even where the value read is thrown away.
"""

import os
import subprocess
import sys

import pytest

import cuda_emulation
from child_runs import count_passed
from paths import REPOSITORY, TESTS

pytest.importorskip("triton", reason="backend triton: Triton is not installed")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts interpreted runs: this is one"),
]

EVERY = 12
"""Takes every 12th test of the interpreted run's list, so some of each kind, in a minute."""


UNAVAILABLE = cuda_emulation.unavailable_reason("address")
needs_sanitizer = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def sanitized() -> dict[str, str]:
    """The environment of such a run."""
    return {"TRITON_INTERPRET": "1", **cuda_emulation.environment("address")}


def run_kernel(access: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TESTS / "support" / "triton_oob_kernels.py"), access]
    return subprocess.run(
        command, env=os.environ | sanitized(), capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


@needs_sanitizer
def test_a_kernel_within_its_tensors_passes():
    run = run_kernel("nothing")
    assert run.returncode == 0 and run.stdout == "unharmed\n", run.stderr[-3000:]


@needs_sanitizer
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_planted_access_one_element_past_the_end_is_caught(access):
    run = run_kernel(access)
    assert run.returncode != 0 and "unharmed" not in run.stdout
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in run.stderr and f"{access.upper()} of size 4" in run.stderr


@needs_sanitizer
def test_the_kernels_stay_within_their_tensors():
    files = ("ops/test_ops.py", "triton/test_algorithms.py")
    assert count_passed(files, sanitized(), every=EVERY, processes=1) > 0
