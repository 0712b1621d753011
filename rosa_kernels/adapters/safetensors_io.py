"""adapter_config.json and adapter_model.safetensors: no crash leaves half a file, and a damaged one is an error."""

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
MODEL_FILE = "adapter_model.safetensors"


def write_pair(
    directory: str | os.PathLike, config: dict, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write both files, each whole or not at all: first the model, then the config.

    A run that is killed leaves the old pair, or the new model beside the old config, never a part of a file under its
    final name.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        MODEL_FILE: safetensors.torch.save(tensors, metadata),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    temporaries = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, content in contents.items():
            _write_durably(temporaries[name], content)
        for name in contents:
            os.replace(temporaries[name], folder / name)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_config(directory: str | os.PathLike) -> dict:
    """The object in adapter_config.json. Raises FileNotFoundError, or ValueError where it is no JSON object."""
    path = Path(directory) / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, brackets without end
        raise ValueError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(directory: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of adapter_model.safetensors, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or otherwise no safetensors file.
    """
    path = Path(directory) / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: is damaged or no safetensors file: {error}") from error
