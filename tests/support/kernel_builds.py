"""Builds of the package's C++ kernels apart from the one in use: under a sanitizer, or with a planted fault."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_emulation
from paths import REPOSITORY, TESTS

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "rosa_kernels")
PORTABLE_ALONE = '#!/bin/sh\ncase " $* " in *" -mavx"*) exit 1;; esac\nexec {compiler} "$@"\n'
"""A compiler that knows no instruction set but the portable one: setup.py then leaves the others out."""


@dataclass(frozen=True)
class Fault:
    """A change of one place in a file of csrc/cpu."""

    file: str
    right: str
    wrong: str

    def plant(self, csrc: Path) -> None:
        path = csrc / "cpu" / self.file
        text = path.read_text()
        assert text.count(self.right) == 1, f"{self.file} has {text.count(self.right)} places to change: {self.right}"
        path.write_text(text.replace(self.right, self.wrong))


def build(directory: Path, sanitize: str = "", fault: Fault | None = None) -> Path:
    """The folder that PYTHONPATH must name for a build in this directory; with a fault, of the portable kernels."""
    source = directory / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    environment = {"ROSA_KERNELS_BUILD": "cpu", "ROSA_KERNELS_SANITIZE": sanitize}
    if fault is not None:
        fault.plant(source / "csrc")
        compiler = directory / "portable_alone"
        compiler.write_text(PORTABLE_ALONE.format(compiler=cuda_emulation.compiler()))
        compiler.chmod(0o700)
        environment["CXX"] = str(compiler)
    library = directory / "library"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        f"--build-lib={library}",
        f"--build-temp={directory / 'temp'}",
    ]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return library


def start_fuzzer(
    library: Path, first: int, count: int, instruction_set: str, sanitizer: str = "plain"
) -> subprocess.Popen:
    """The fuzzer in a process of its own, on a build: `sanitizer` is a variant of cuda_emulation.py."""
    environment = os.environ | cuda_emulation.environment(sanitizer) | {"ROSA_KERNELS_CPU": instruction_set}
    environment["PYTHONPATH"] = os.pathsep.join((str(library), str(TESTS / "support")))
    command = [sys.executable, str(TESTS / "support" / "fuzz.py"), str(first), str(count)]
    return subprocess.Popen(
        command, cwd=library, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
