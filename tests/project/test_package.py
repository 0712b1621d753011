"""What is shipped: the source distribution's files, the wheel's name, and what becomes of a compiler that fails.

The builds run setup.py on a copy of what git tracks, with stand-ins for the compilers and for torch, so that they take
seconds. The last test compiles for real.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from paths import REPOSITORY

COMPILER = """#!/bin/sh
# Takes any options; writes an empty file where a compiler writes its output.
{failure}
case "$*" in
  *--version*) echo "release 13.0, V13.0.48" ;;
  *--list-gpu-code*) echo "sm_80 sm_90 sm_100" ;;
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
FAILURE = """
case "$*" in *{source}*)
  echo "{source}:3: note: before"
  echo "{source}:7: error: no such thing" >&2
  exit 3 ;;
esac
"""
PROBE = "-fsyntax-only"
STRAY_FILES = (
    "bench/.benchmarks/a.json",
    "build/a.o",
    "csrc/cpu/a.so",
    "models/runs/a/config.json",
    "rosa_kernels/_C.abi3.so",
    "rosa_kernels/_C.build_error.txt",
    "runs/a.json",
    "tests/__pycache__/a.pyc",
)


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("the tests are not run from a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (REPOSITORY / name).exists()]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A copy of the tracked files, and stand-ins for a torch of CUDA 13.0, a C++ compiler and nvcc."""

    def __init__(self, directory: Path):
        self.root = directory / "project"
        for name in tracked_files():
            target = self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPOSITORY / name).read_bytes())
        self.tools = directory / "tools"
        version = self.tools / "torch" / "version.py"
        version.parent.mkdir(parents=True)
        version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n")
        self.set_compilers()

    def set_compilers(self, failing_cpp: str = "", failing_cuda: str = "") -> None:
        """Stand-ins that fail on a command with that word in it."""
        for path, word in (("c++", failing_cpp), ("cuda/bin/nvcc", failing_cuda)):
            failure = FAILURE.format(source=word) if word else ""
            executable(self.tools / path, COMPILER.format(failure=failure))

    def setup(self, build: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "ROSA_KERNELS_BUILD": build,
            "CXX": str(self.tools / "c++"),
            "CUDA_HOME": str(self.tools / "cuda"),
            "PYTHONPATH": str(self.tools),
            "TORCH_CUDA_ARCH_LIST": "9.0",
            **variables,
        }
        command = [sys.executable, "setup.py", "-q", *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)

    def wheel(self, build: str) -> zipfile.Path:
        """The only wheel that a build makes."""
        done = self.setup(build, "bdist_wheel", "--dist-dir", f"made-{build}")
        assert done.returncode == 0, done.stderr
        (wheel,) = (self.root / f"made-{build}").glob("*.whl")
        return zipfile.Path(wheel)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def tag(wheel: zipfile.Path) -> str:
    (line,) = re.findall(r"^Tag: (.*)$", wheel.joinpath(dist_info(wheel), "WHEEL").read_text(), re.MULTILINE)
    assert wheel.root.filename.endswith(f"-{line}.whl")
    return line


def dist_info(wheel: zipfile.Path) -> str:
    return next(path.name for path in wheel.iterdir() if path.name.endswith(".dist-info"))


def natives(wheel: zipfile.Path) -> set[str]:
    """The libraries and the reasons for their absence."""
    files = {path.name for path in wheel.joinpath("rosa_kernels").iterdir() if path.is_file()}
    return {name for name in files if not name.endswith(".py")} - {"py.typed"}


class TestSourceDistribution:
    @pytest.mark.parametrize("build", ["none", "auto"])
    def test_holds_what_git_tracks_and_nothing_stray(self, checkout, build):
        for stray in STRAY_FILES:
            path = checkout.root / stray
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("stray")
        done = checkout.setup(build, "sdist", "--dist-dir", "made")
        assert done.returncode == 0, done.stderr
        (archive,) = (checkout.root / "made").glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            files = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
        made = {"PKG-INFO", "setup.cfg"} | {name for name in files if name.startswith("rosa_kernels.egg-info/")}
        expected = {name for name in tracked_files() if not name.startswith(".")}
        assert files - made == expected


class TestWheel:
    def test_serves_every_python(self, checkout):
        wheel = checkout.wheel("auto")
        assert re.fullmatch(r"cp310-abi3-(linux|macosx)_\w+", tag(wheel))
        assert natives(wheel) == {"_C.abi3.so", "_cuda.abi3.so"}
        assert wheel.joinpath("rosa_kernels", "py.typed").exists()

    def test_without_kernels_is_of_no_platform(self, checkout):
        (checkout.root / "rosa_kernels" / "_C.abi3.so").write_text("built in place before")
        wheel = checkout.wheel("none")
        assert tag(wheel) == "py3-none-any"
        assert natives(wheel) == set()

    def test_of_a_narrower_build_has_no_library_of_an_earlier_one(self, checkout):
        assert natives(checkout.wheel("auto")) == {"_C.abi3.so", "_cuda.abi3.so"}
        assert natives(checkout.wheel("cpu")) == {"_C.abi3.so"}

    def test_asks_for_the_torch_that_setup_py_builds_against(self, checkout):
        wheel = checkout.wheel("none")
        metadata = wheel.joinpath(dist_info(wheel), "METADATA").read_text()
        (oldest,) = re.findall(r"^Requires-Dist: torch>=(\S+)$", metadata, re.MULTILINE)
        assert f"OLDEST_TORCH = ({oldest.replace('.', ', ')})" in (REPOSITORY / "setup.py").read_text()


class TestFailingCompiler:
    """Under "auto" the package installs without the library and says why; a build asked for by name is an error."""

    @pytest.mark.parametrize(
        "word", [PROBE, "csrc/cpu/bindings.cpp", "-shared"], ids=["at once", "on a file", "linking"]
    )
    def test_of_cpp(self, checkout, word):
        checkout.wheel("cpu")  # an earlier build's library must not be shipped
        checkout.set_compilers(failing_cpp=word, failing_cuda="--version")
        wheel = checkout.wheel("auto")
        assert tag(wheel) == "py3-none-any"
        assert natives(wheel) == {"_C.build_error.txt", "_cuda.build_error.txt"}
        reason = wheel.joinpath("rosa_kernels", "_C.build_error.txt").read_text()
        assert "c++ failed with exit status 3" in reason
        assert reason.endswith(f"{word}:3: note: before\n{word}:7: error: no such thing\n")
        done = checkout.setup("cpu", "bdist_wheel")
        assert done.returncode != 0
        assert f"{word}:7: error: no such thing" in done.stderr

    def test_of_nvcc_on_one_file(self, checkout):
        checkout.set_compilers(failing_cuda="csrc/cuda/sddmm.cu")
        wheel = checkout.wheel("auto")
        assert natives(wheel) == {"_C.abi3.so", "_cuda.build_error.txt"}
        assert tag(wheel).startswith("cp310-abi3-")
        done = checkout.setup("cuda", "bdist_wheel")
        assert done.returncode != 0
        assert "ROSA_KERNELS_BUILD=cuda: " in done.stderr
        assert done.stderr.rstrip().endswith("csrc/cuda/sddmm.cu:7: error: no such thing")

    def test_that_is_not_there(self, checkout):
        (checkout.tools / "c++").unlink()
        wheel = checkout.wheel("auto")
        assert "c++ is not found" in wheel.joinpath("rosa_kernels", "_C.build_error.txt").read_text()

    def test_in_place_leaves_no_earlier_library(self, checkout):
        package = checkout.root / "rosa_kernels"
        assert checkout.setup("auto", "build_ext", "--inplace").returncode == 0
        assert (package / "_C.abi3.so").exists() and (package / "_cuda.abi3.so").exists()
        checkout.set_compilers(failing_cuda="csrc/cuda/sddmm.cu")
        assert checkout.setup("auto", "build_ext", "--inplace").returncode == 0
        assert (package / "_C.abi3.so").exists() and not (package / "_cuda.abi3.so").exists()
        assert (package / "_cuda.build_error.txt").exists()
        checkout.set_compilers()
        assert checkout.setup("auto", "build_ext", "--inplace").returncode == 0
        assert (package / "_cuda.abi3.so").exists() and not (package / "_cuda.build_error.txt").exists()

    def test_is_what_the_package_repeats(self, checkout):
        checkout.set_compilers(failing_cpp=PROBE)
        assert checkout.setup("auto", "build_ext", "--inplace").returncode == 0
        command = [sys.executable, "-m", "rosa_kernels"]
        environment = os.environ | {"PYTHONPATH": str(checkout.root)}
        printed = subprocess.run(
            command, cwd=checkout.root, env=environment, capture_output=True, text=True, check=True
        )
        (line,) = re.findall(r"^  cpu .*$", printed.stdout, re.MULTILINE)
        assert f"{PROBE}:7: error: no such thing" in line


class TestArchitectures:
    """Of the CUDA kernels, where TORCH_CUDA_ARCH_LIST names none. Each nvcc knows other ones."""

    @pytest.mark.parametrize(
        ("known", "gpus", "compiled"),
        [
            ("sm_80 sm_86 sm_90", "", "sm_80 sm_90,compute_90"),
            ("sm_80 sm_89 sm_90 sm_100 sm_103 sm_120", "", "sm_80 sm_90 sm_100,compute_100 sm_120"),
            ("sm_80 sm_89 sm_90 sm_100 sm_120", "8.9", "sm_89,compute_89"),
            ("sm_80 sm_90", "12.0", "sm_80 sm_90,compute_90"),
        ],
    )
    def test_are_those_of_the_gpus_here_or_the_default_ones(self, checkout, tmp_path, known, gpus, compiled):
        log = tmp_path / "log"
        nvcc = COMPILER.format(failure=f'echo "$*" >> {log}').replace("sm_80 sm_90 sm_100", known)
        executable(checkout.tools / "cuda/bin/nvcc", nvcc)
        executable(checkout.tools / "nvidia-smi", f"#!/bin/sh\necho {gpus}\n")
        path = f"{checkout.tools}:{os.environ['PATH']}"
        done = checkout.setup("cuda", "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST="", PATH=path)
        assert done.returncode == 0, done.stderr
        (command,) = [line for line in log.read_text().splitlines() if " -c csrc/cuda/shrink.cu " in line]
        assert " ".join(re.findall(r"code=\[(\S+)\]", command)) == compiled


CHECK_INSTALLED = """
import sys
from pathlib import Path
import torch
import rosa_kernels as rk
from rosa_kernels.dispatch import available_backends
assert not Path(rk.__file__).is_relative_to(sys.argv[1]), rk.__file__
assert available_backends()["cpu"] is None, available_backends()
torch.manual_seed(0)
W, x, A, B = torch.randn(48, 64), torch.randn(8, 64), torch.randn(4, 64), torch.randn(48, 4)
pattern = rk.CSRPattern.from_mask(torch.rand(48, 64) < 0.1)
values = torch.randn(pattern.nnz)
results = []
for backend in ("cpu", "reference"):
    with rk.use_backend(backend):
        results.append(rk.rosa_linear(x, W, None, A, B, 0.5, values, pattern))
torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.exhaustive
def test_kernels_of_the_installed_source_distribution_work(tmp_path):
    """Source distribution -> wheel -> a new environment outside the checkout, without the network."""
    root = Checkout(tmp_path).root

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["ROSA_KERNELS_BUILD"] = "cpu"
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "made", cwd=root)
    (archive,) = (tmp_path / "made").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path / "made", unpacked)
    (wheel,) = (tmp_path / "made").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "torch_of_the_tests.pth").write_text(str(Path(torch.__file__).parents[1]))
    assert run(python, "-c", CHECK_INSTALLED, REPOSITORY).strip() == "equal"
