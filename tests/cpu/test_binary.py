"""A binary that is installed and does not serve is an error in words, not a silent way to plain PyTorch."""

import os
import shutil
import subprocess
import sys

import pytest

import rosa_kernels as rk
from paths import REPOSITORY
from rosa_kernels.backends.cpu import binary

BINARY = REPOSITORY / "rosa_kernels" / "_C.abi3.so"
REPORT = "import rosa_kernels as rk; print(rk.available_backends()['cpu'])"


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its binary."""
    copy = tmp_path / "copy" / "rosa_kernels"
    shutil.copytree(REPOSITORY / "rosa_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def run(package, backend, *more_paths) -> subprocess.CompletedProcess:
    """A fresh process that imports this package and prints what it says of backend cpu."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (package.parent, *more_paths))),
        "ROSA_KERNELS_BACKEND": backend,
    }
    for variable in ("CPU_EMULATED", "CUDA_EMULATED"):
        environment.pop(variable, None)
    isolated = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *isolated, "-c", REPORT]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=package.parent)


def check_fault(package, *words, more_paths=()) -> None:
    """The import fails with these words; with another backend asked for they are the reason alone."""
    failed = run(package, "auto", *more_paths)
    assert (
        failed.returncode != 0 and "ImportError" in failed.stderr and "ROSA_KERNELS_BACKEND=reference" in failed.stderr
    )
    without = run(package, "reference", *more_paths)
    assert without.returncode == 0, without.stderr
    for word in words:
        assert word in failed.stderr and word in without.stdout, word


@pytest.mark.parametrize("error,words", [(None, "were not built"), ("no <vector>", "did not build (no <vector>)")])
def test_no_binary_is_not_built(monkeypatch, recwarn, package, error, words):
    monkeypatch.setattr(binary.native_binary, "build_error", lambda name: error)
    assert words in binary._load(package, [str(package.parent)])
    assert not recwarn.list


def test_a_binary_that_does_not_load_gives_the_loaders_words(package):
    (package / "_C.abi3.so").write_bytes(b"not a library")
    check_fault(package, "do not load", "_C.abi3.so", "pip install again")


def test_a_free_threaded_python_loads_the_binary_made_for_it():
    script = (
        "import sysconfig; get = sysconfig.get_config_var;"
        "sysconfig.get_config_var = lambda name: 1 if name == 'Py_GIL_DISABLED' else"
        " '.cpython-313t-x86_64-linux-gnu.so' if name == 'EXT_SUFFIX' else get(name);"
        "import runpy; print(runpy.run_path('rosa_kernels/backends/native_binary.py')['file_name']('_C'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "_C.cpython-313t-x86_64-linux-gnu.so"


def test_a_binary_under_another_name_is_named(package):
    other = package / "_C.cpython-310-x86_64-linux-gnu.so"
    other.write_bytes(b"of another build")
    check_fault(package, str(other), "another name")


def test_a_binary_beside_another_copy_of_the_package_is_named(package, tmp_path):
    elsewhere = tmp_path / "site" / "rosa_kernels"
    elsewhere.mkdir(parents=True)
    (elsewhere / "_C.abi3.so").write_bytes(b"of an installed package")
    check_fault(package, str(elsewhere), str(package), "imported from", more_paths=[elsewhere.parent])


@pytest.mark.skipif(rk.available_backends()["cpu"] is not None, reason="needs a binary that loads")
def test_a_binary_of_other_sources_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(binary, "_OPS", (*binary._OPS, "made_up"))
    reason = binary._load_fault(BINARY)
    assert reason is not None and "lack made_up" in reason
