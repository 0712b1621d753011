"""A binary that is installed and does not serve gives its reason in words; the package itself goes on importing."""

import os
import shutil
import subprocess
import sys

import pytest

import rosa_kernels as rk
from paths import REPOSITORY
from rosa_kernels.backends.cpu import library

BINARY = REPOSITORY / "rosa_kernels" / "_C.abi3.so"
REPORT = "import rosa_kernels as rk; print(rk.available_backends()['cpu'])"


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its binary."""
    copy = tmp_path / "copy" / "rosa_kernels"
    shutil.copytree(REPOSITORY / "rosa_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def reason_of(package, *more_paths) -> tuple[str, str]:
    """What a fresh process that imports this package says of backend cpu, and its warnings."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (package.parent, *more_paths)))}
    for variable in ("CPU_EMULATED", "CUDA_EMULATED"):
        environment.pop(variable, None)
    run = subprocess.run(
        [sys.executable, "-P", "-c", REPORT] if sys.version_info >= (3, 11) else [sys.executable, "-c", REPORT],
        env=environment, capture_output=True, text=True, check=False, cwd=package.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip(), run.stderr


@pytest.mark.parametrize("error,words", [(None, "were not built"), ("no <vector>", "did not build (no <vector>)")])
def test_no_binary_is_not_built(monkeypatch, recwarn, package, error, words):
    monkeypatch.setattr(library.native_library, "build_error", lambda name: error)
    assert words in library._load(package, [str(package.parent)])
    assert not recwarn.list


def test_a_binary_that_does_not_load_gives_the_loaders_words(package):
    (package / "_C.abi3.so").write_bytes(b"not a library")
    reason, warned = reason_of(package)
    assert "do not load" in reason and "_C.abi3.so" in reason and "pip install again" in reason
    assert "do not load" in warned


def test_a_binary_under_another_name_is_named(package):
    other = package / "_C.cpython-310-x86_64-linux-gnu.so"
    other.write_bytes(b"of another build")
    reason, warned = reason_of(package)
    assert str(other) in reason and "another name" in reason and "another name" in warned


def test_a_binary_beside_another_copy_of_the_package_is_named(package, tmp_path):
    elsewhere = tmp_path / "site" / "rosa_kernels"
    elsewhere.mkdir(parents=True)
    (elsewhere / "_C.abi3.so").write_bytes(b"of an installed package")
    reason, warned = reason_of(package, elsewhere.parent)
    assert str(elsewhere) in reason and str(package) in reason and "imported from" in warned


@pytest.mark.skipif(rk.available_backends()["cpu"] is not None, reason="needs a binary that loads")
def test_a_binary_of_other_sources_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(library, "_OPS", (*library._OPS, "made_up"))
    reason = library._load_fault(BINARY)
    assert reason is not None and "lack made_up" in reason
