"""The JSON file that a run of all GPU races writes: bench/results/<device>-<backends>.json."""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import rosa_kernels as rk
from interleaved import Race
from layers import DENSITY, DTYPES, Layer, Shape

RESULTS = Path(__file__).parents[1] / "results"
DRY_RUN = "dry run on the CPU: the times mean nothing"


@dataclass(frozen=True)
class Case:
    """One race of an operation. str(case) is the test's id."""

    shape: Shape
    dtypes: str
    mode: str  # a key of gpu_timing.MODES
    density: float | None  # None: without S
    device: str  # "cuda", or "cpu" in a dry run

    def __str__(self) -> str:
        return f"{self.problem}-{self.mode}"

    @property
    def problem(self) -> str:
        return f"{self.shape}-{self.dtypes}" + ("" if self.density is None else f"-{self.density:.1%}")

    @property
    def layer_dtype(self) -> torch.dtype:
        return DTYPES[self.dtypes][0]

    def layer(self, structure: str = "unstructured") -> Layer:
        return Layer(self.shape, self.dtypes, structure, self.density or DENSITY, self.device)


@dataclass
class Result:
    operation: str
    case: Case
    race: Race
    backend: str  # that served "ours"
    l2: str
    left_out: dict[str, str]  # candidate -> why it did not run

    def as_json(self) -> dict:
        """Times are seconds a call. Ratios are ours over each other candidate, of the lower quartiles."""
        ours = self.race.lower_quartile("ours")
        others = [name for name in self.race.seconds if name != "ours"]
        return {
            "verdict": self.race.verdict,
            "ours_over": {name: ours / self.race.lower_quartile(name) for name in others},
            "unjudged": sorted(self.race.unjudged),
            "left_out": self.left_out,
            "seconds": self.race.summary()["seconds"],
            "backend": self.backend,
            "l2": self.l2,
        }


def report(results: Iterable[Result], did_not_finish: list[str], partial: str | None, dry_run: bool) -> dict:
    """partial says why some races are missing, or is None. did_not_finish names the races that an error ended."""
    results = list(results)
    races: dict[str, dict] = {}
    for result in results:
        case = result.case
        entry = races.setdefault(
            f"{result.operation}[{case.problem}]",
            {
                "operation": result.operation,
                "out_features": case.shape.out_features,
                "in_features": case.shape.in_features,
                "tokens": case.shape.tokens,
                "dtypes": case.dtypes,
                "density": case.density,
            },
        )
        entry[case.mode] = result.as_json()
    return {
        "dry_run": dry_run,
        "partial": partial,
        "did_not_finish": did_not_finish,
        **_machine(dry_run),
        "backends": sorted({result.backend for result in results}),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rosa_kernels": rk.__version__,
        "commit": _commit(),
        "races": races,
    }


def keep(directory: Path, content: dict) -> str:
    """Writes the report and says where. bench/results takes only runs of all shapes on a GPU."""
    reason = DRY_RUN if content["dry_run"] else content["partial"]
    if reason and directory.resolve() == RESULTS.resolve():
        return f"not written to bench/results ({reason}); --results DIRECTORY keeps it elsewhere"
    return f"written: {_write(directory, content)}"


def _write(directory: Path, content: dict) -> Path:
    """Writes <device>-<backends>.json into the directory, whole or not at all."""
    device_and_backends = "-".join((content["device"], *content["backends"])).lower()
    name = "dry-run" if content["dry_run"] else re.sub(r"[^a-z0-9]+", "-", device_and_backends).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _machine(dry_run: bool) -> dict:
    return {
        "device": DRY_RUN if dry_run else torch.cuda.get_device_name(),
        "driver": None if dry_run else _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside of a git checkout."""
    here = ("git", "-C", str(RESULTS.parent))
    commit = _output_of(*here, "rev-parse", "HEAD")
    changed = commit and _output_of(*here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with uncommitted changes" if changed else commit


def _output_of(*command: str) -> str | None:
    """The first line that the command prints, or None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
