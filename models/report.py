"""report.json says what was trained on which data, how well it did, and what it cost."""

import argparse
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from reviews import ReviewFile
from sources import Sources, file_facts
from training import TrainingRun, accuracy, macro_f1

# These fields differ from run to run; the others do not.
COSTS = ("seconds", "base_seconds", "reviews_per_second", "peak_memory_mib")


def make_report(
    options: argparse.Namespace,
    sources: Sources,
    base: dict,
    base_confusion: Tensor,
    run: TrainingRun | None,
    confusion: Tensor,
    parameters: dict,
    seconds: float,
) -> dict:
    """Return the report as plain Python for JSON.

    Args:
        base: the base_facts of the base.
        run: None if nothing was adapted.
        parameters: the rk.trainable_parameters of the adapted model.
        seconds: the time of the whole process. A base that was found under runs/ was not trained in it.
    """
    return {
        "adapter": options.adapter,
        "base_accuracy": accuracy(base_confusion),
        "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion),
        "confusion_matrix": confusion.tolist(),
        "test_reviews": int(confusion.sum()),
        "validation_accuracy": run.validation_accuracy if run else base["validation_accuracy"],
        "best_epoch": run.best_epoch if run else base["best_epoch"],
        "graphed_steps": run.graphed_steps if run else base["graphed_steps"],
        "trainable_parameters": parameters["trainable"],
        "total_parameters": parameters["total"],
        "seconds": seconds,
        "base_seconds": base["seconds"],
        "reviews_per_second": run.reviews_per_second if run else base["reviews_per_second"],
        "peak_memory_mib": peak_memory_mib(),
        "seed": options.seed,
        "threads": options.threads,
        "options": {name: _plain(value) for name, value in vars(options).items() if name not in ("out", "runs")},
        "versions": versions(),
        "data": base["data"] + [file_facts(file) for file in read_since(sources)],
    }


def read_since(sources: Sources) -> list[ReviewFile]:
    """Return the files that were read after the base was made. Without an adapter, no validation file is among them."""
    base_paths = {file.path for file in sources.base_files()}
    return [file for file in sources.files() if file.path not in base_paths and file.records]


def versions() -> dict[str, str]:
    packages = ("torch", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def peak_memory_mib() -> float:
    """Return the most memory that this process had resident, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _plain(value):
    return str(value) if isinstance(value, (Path, torch.device)) else value
