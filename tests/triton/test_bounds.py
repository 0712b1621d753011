"""No Triton kernel reads or writes past a tensor: interpreted runs under AddressSanitizer, which knows every block of
memory by the byte.

The interpreter moves each element by a memcpy, and the sanitizer's library checks both of its ends. Masks that are
wrong by one show here even where the value read is thrown away.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from child_runs import count_passed
from paths import REPOSITORY, TESTS

pytest.importorskip("triton", reason="backend triton: Triton is not installed")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts interpreted runs: this is one"),
]

EVERY = 12
"""Takes every 12th test of the interpreted run's list, so some of each kind, in a minute."""


@functools.cache
def sanitizer_library() -> Path | None:
    """libasan.so of the gcc at hand."""
    if shutil.which("gcc") is None:
        return None
    named = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = Path(named.stdout.strip())
    return library if library.is_absolute() else None  # gcc repeats the bare name of a file that it does not have


needs_sanitizer = pytest.mark.skipif(sanitizer_library() is None, reason="no gcc with AddressSanitizer's libasan.so")


def sanitized() -> dict[str, str]:
    """The environment of such a run."""
    return {
        "TRITON_INTERPRET": "1",
        "LD_PRELOAD": str(sanitizer_library()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
    }


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
