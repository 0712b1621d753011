"""save_adapters and load_adapters: an adapter on disk, compact, validated and safe from a crash.

adapter_model.safetensors holds, for each adapted layer, ``<layer>.lora_A`` and ``.lora_B`` (``.lora_embedding_A`` and
``_B``), and where a mask is chosen ``.values`` with ``.rows``, ``.columns`` or ``.crow_indices`` and ``.col_indices``
(int32); further the state of every module in modules_to_save. Its metadata holds the config too, so that this one file
is a whole checkpoint at every moment. adapter_config.json is the same config to read and edit; it counts where its
digest is the model file's, and not where a crash between the two files left an older one.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rosa_kernels.adapters.inject import adapter_record
from rosa_kernels.adapters.load_state import PatternMaker, restore_adapters
from rosa_kernels.adapters.safetensors_io import CONFIG_FILE, MODEL_FILE, read_config, read_tensors, write_pair
from rosa_kernels.adapters.target_modules import saved_module_tensors
from rosa_kernels.config import LoRAConfig, config_from_dict
from rosa_kernels.nn import AdapterLayer
from rosa_kernels.nn.layer import is_dtensor
from rosa_kernels.pattern import COLUMN, ROW, CSRPattern

_FORMAT_VERSION = 1
_FORMAT = f"rosa_kernels {_FORMAT_VERSION}"
_METADATA_KEY = "rosa_kernels"
_UNSELECTED = "unselected"


def save_adapters(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapters and the modules of config.modules_to_save, and nothing of the frozen base layers.

    The files are adapter_config.json and adapter_model.safetensors. Equal adapters give equal bytes. Merged adapters
    are written as they are unmerged. Where select_masks has not been called yet, the file says so.

    Args:
        model: a model that add_adapters has adapted, also inside a wrapper; not sharded by FSDP.
        directory: a folder, which is made where it is missing. An adapter in it is replaced, or kept whole if this
            fails.

    Raises:
        ValueError: the model has no adapters, or a parameter is sharded over ranks.
    """
    root, record = adapter_record(model)
    tensors: dict[str, Tensor] = {}
    patterns: dict[str, str] = {}
    for name, layer in record.layers(root).items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in low_rank_tensors(layer).items()}
        if layer.has_sparse:
            patterns[name], sparse = _encoded(layer)
            tensors |= {f"{name}.{key}": tensor for key, tensor in sparse.items()}
    tensors |= saved_module_tensors(root, record.saved_module_names)
    tensors = detached(tensors)
    description = {
        "format": _FORMAT,
        "adapter_name": record.adapter_name,
        "config": record.config.to_dict(),
        "patterns": patterns,
    }
    description["digest"] = _digest(description, tensors)
    metadata = {_METADATA_KEY: json.dumps(description)}
    write_pair(directory, description, tensors, metadata)


def load_adapters(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Give the model the adapters that save_adapters wrote; its outputs are then those of the saved one, bit for bit.

    Args:
        model: the base model without adapters, which are added as add_adapters adds them; or a model with adapters of
            the same config, whose Parameters are then filled in place.
        directory: a folder with adapter_config.json and adapter_model.safetensors. An edited config takes effect.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, was written by a newer rosa_kernels, or does not belong to this model; the
            message names the file, layer or shape. The model is then as it was.
    """
    tensors, metadata = read_tensors(directory)
    model_path = os.path.join(directory, MODEL_FILE)
    written = _parsed(metadata.get(_METADATA_KEY), model_path)
    readable = _described(read_config(directory), os.path.join(directory, CONFIG_FILE))
    config = readable.config if readable.digest == written.digest else written.config
    encoded = dict(tensors)
    patterns = {name: _take_pattern(encoded, name, kind) for name, kind in written.patterns.items()}

    def check_digest():
        if _digest(written.as_hashed, tensors) != written.digest:
            raise ValueError(f"{model_path}: is damaged: its digest is not that of its contents")

    return restore_adapters(model, config, written.adapter_name, encoded, patterns, last_check=check_digest)


def low_rank_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    """The low-rank factors under the names of their ParameterDicts; empty where r is 0."""
    factors = layer.low_rank_factors()
    return {} if factors is None else dict(zip(layer.factor_names, factors, strict=True))


def detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory."""
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise ValueError(f"{name}: is sharded over ranks; gather the model before saving its adapters")
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _encoded(layer: AdapterLayer) -> tuple[str, dict[str, Tensor]]:
    """How a layer's pattern is written, and the tensors that say it, with the values."""
    pattern = layer.sparse_pattern()
    if pattern is None:
        return _UNSELECTED, {}
    values = {"values": layer.sparse_values}
    if pattern.structure == ROW:
        return "rows", {"rows": pattern.crow_indices.diff().nonzero()[:, 0].to(torch.int32), **values}
    if pattern.structure == COLUMN:
        width = pattern.nnz // pattern.shape[0]
        return "columns", {"columns": pattern.col_indices[:width], **values}
    return "csr", {"crow_indices": pattern.crow_indices, "col_indices": pattern.col_indices, **values}


_INDEX_NAMES = {
    "rows": ("rows",),
    "columns": ("columns",),
    "csr": ("crow_indices", "col_indices"),
    _UNSELECTED: (),
}
_MAKERS: dict[str, Callable[..., CSRPattern]] = {
    "rows": CSRPattern.from_rows,
    "columns": CSRPattern.from_columns,
    "csr": CSRPattern,
}


def _take_pattern(tensors: dict[str, Tensor], layer: str, kind: str) -> PatternMaker | None:
    """Take a layer's indices out of tensors; what comes back makes its validated pattern from a shape, or None."""
    keys = [f"{layer}.{name}" for name in _INDEX_NAMES[kind]]
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise ValueError(f"{MODEL_FILE}: expected the tensors {', '.join(missing)}, which are missing")
    indices = [tensors.pop(key) for key in keys]
    if kind == _UNSELECTED:
        return None
    return lambda shape: _MAKERS[kind](*indices, shape)


@dataclass(frozen=True)
class _Description:
    adapter_name: str
    config: LoRAConfig
    patterns: dict[str, str]
    digest: str
    as_hashed: dict


def _parsed(text: str | None, source: str) -> _Description:
    if text is None:
        raise ValueError(f"{source}: carries no {_METADATA_KEY} metadata; was it written by save_adapters?")
    try:
        return _described(json.loads(text), source)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: its metadata is not valid JSON: {error}") from error


def _described(raw: object, source: str) -> _Description:
    """The description in its checked form. Raises ValueError naming the source and the field."""
    if not isinstance(raw, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(raw).__name__}")
    _check_format(raw, source)
    kinds = {"adapter_name": str, "config": dict, "patterns": dict, "digest": str}
    for field, kind in kinds.items():
        if not isinstance(raw.get(field), kind):
            raise ValueError(f"{source}: expected {field} to be a {kind.__name__}, got {raw.get(field)!r}")
    unknown = [kind for kind in raw["patterns"].values() if not isinstance(kind, str) or kind not in _INDEX_NAMES]
    if unknown:
        raise ValueError(f"{source}: expected patterns of {', '.join(_INDEX_NAMES)}, got {unknown[0]!r}")
    try:
        config = config_from_dict(raw["config"])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    as_hashed = {key: value for key, value in raw.items() if key != "digest"}
    return _Description(raw["adapter_name"], config, raw["patterns"], raw["digest"], as_hashed)


def _check_format(description: dict, source: str) -> None:
    found = description.get("format")
    if found == _FORMAT:
        return
    version = re.fullmatch(r"rosa_kernels ([1-9]\d{0,8})", found) if isinstance(found, str) else None
    if version and int(version[1]) > _FORMAT_VERSION:
        raise ValueError(
            f"{source}: was written by a newer rosa_kernels, in format {found!r}; this one reads {_FORMAT!r}: upgrade "
            f"rosa_kernels to load it"
        )
    hint = "; from_peft reads it" if "peft_type" in description else ""
    raise ValueError(f"{source}: expected format {_FORMAT!r}, got {found!r}{hint}")


def _digest(description: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the description and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
