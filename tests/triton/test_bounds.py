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

from paths import REPOSITORY, TESTS

pytest.importorskip("triton", reason="backend triton: Triton is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="starts interpreted runs: this is one"
)

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


def run_sanitized(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "LD_PRELOAD": str(sanitizer_library()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


@needs_sanitizer
def test_a_kernel_within_its_tensors_passes():
    run = run_sanitized(str(TESTS / "support" / "triton_oob_kernels.py"), "nothing")
    assert run.returncode == 0 and run.stdout == "unharmed\n", run.stderr[-3000:]


@needs_sanitizer
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_planted_access_one_element_past_the_end_is_caught(access):
    run = run_sanitized(str(TESTS / "support" / "triton_oob_kernels.py"), access)
    assert run.returncode != 0 and "unharmed" not in run.stdout
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in run.stderr and f"{access.upper()} of size 4" in run.stderr


@needs_sanitizer
def test_the_kernels_stay_within_their_tensors():
    files = [str(TESTS / name) for name in ("ops/test_ops.py", "triton/test_algorithms.py")]
    # -s: the sanitizer writes its report past pytest's capture
    run = run_sanitized("-m", "pytest", *files, f"--part=0/{EVERY}", "-q", "-s", "-p", "no:cacheprovider", "--tb=short")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout
    print(run.stdout.splitlines()[-1])
