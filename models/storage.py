"""A trained classifier in a directory: config.json, tokenizer.json, model.safetensors and adapter/ if it was adapted.

report.json is written last and removed first, so a directory with a report is complete.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
from tokenizers import Tokenizer

import rosa_kernels as rk
from transformer import ClassifierConfig, ReviewClassifier

CONFIG, TOKENIZER, MODEL, ADAPTER, REPORT = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "adapter",
    "report.json",
)


def save_classifier(
    directory: Path, model: ReviewClassifier, tokenizer: Tokenizer, weights: Path | None = None
) -> None:
    """Write the model without adapters and its tokenizer.

    weights: the model.safetensors of the base. A model with adapters gets a copy of it, not its own parameters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG, model.config.to_dict())
    write_atomically(directory / TOKENIZER, tokenizer.to_str().encode())
    content = safetensors.torch.save(model.state_dict()) if weights is None else weights.read_bytes()
    write_atomically(directory / MODEL, content)


def load_classifier(directory: Path) -> tuple[ReviewClassifier, Tokenizer]:
    """Load the model without adapters, in evaluation mode.

    Raises:
        FileNotFoundError: save_classifier did not write the directory.
    """
    config = ClassifierConfig(**json.loads((directory / CONFIG).read_text()))
    model = ReviewClassifier(config)
    model.load_state_dict(safetensors.torch.load_file(directory / MODEL))
    return model.eval(), Tokenizer.from_file(str(directory / TOKENIZER))


def save_run(
    directory: Path, model: ReviewClassifier, tokenizer: Tokenizer, report: dict, base: Path, adapted: bool
) -> None:
    """Write a finished run: the frozen base and the adapter, or the whole trained model; and the report at last."""
    (directory / REPORT).unlink(missing_ok=True)
    shutil.rmtree(directory / ADAPTER, ignore_errors=True)
    save_classifier(directory, model, tokenizer, weights=base / MODEL if adapted else None)
    if adapted:
        rk.save_adapters(model, directory / ADAPTER)
    write_json(directory / REPORT, report)


def load_run(directory: Path) -> tuple[ReviewClassifier, Tokenizer]:
    """Load the trained classifier with its adapter, in evaluation mode.

    Raises:
        FileNotFoundError: the directory holds no finished run.
    """
    if not (directory / REPORT).is_file():
        raise FileNotFoundError(f"{directory}: holds no finished run ({REPORT} is missing)")
    model, tokenizer = load_classifier(directory)
    if (directory / ADAPTER).is_dir():
        rk.load_adapters(model, directory / ADAPTER)
    return model.eval(), tokenizer


def write_json(path: Path, value: dict) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write the file so that it is there whole or not at all, whenever the process ends."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
