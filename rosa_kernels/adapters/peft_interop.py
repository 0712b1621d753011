"""LoRA adapters in the files of Hugging Face PEFT, github.com/huggingface/peft, read and written without it."""

import os
import re

from torch import Tensor, nn

from rosa_kernels.adapters.checkpoint import detached, low_rank_tensors
from rosa_kernels.adapters.inject import adapter_record, uncompiled
from rosa_kernels.adapters.load_state import restore_adapters
from rosa_kernels.adapters.safetensors_io import CONFIG_FILE, MODEL_FILE, read_config, read_tensors, write_pair
from rosa_kernels.adapters.target_modules import module_names, saved_module_tensors
from rosa_kernels.config import LoRAConfig, matches_end
from rosa_kernels.nn import AdapterLayer, RoSAEmbedding

_PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]))")
_READ_FIELDS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "modules_to_save", "use_rslora", "rank_pattern", "alpha_pattern",
    "bias", "init_lora_weights",
}  # fmt: skip
_FIELDS_WITHOUT_EFFECT_ON_WEIGHTS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def from_peft(directory: str | os.PathLike, model: nn.Module) -> nn.Module:
    """Give the model the LoRA adapter that PEFT saved; outputs and gradients are then PEFT's, up to rounding.

    The names of the saved weights say which modules are adapted, the saved config says rank and alpha.

    Args:
        directory: a folder with PEFT's adapter_config.json and adapter_model.safetensors.
        model: the base model, as it was before get_peft_model.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit the model, or the adapter is of a kind that this package does not
            compute (DoRA, biases, fan_in_fan_out, ...); the message says which. The model is then as it was.
    """
    source = os.path.join(directory, CONFIG_FILE)
    fields = read_config(directory)
    _refuse_unsupported(fields, source)
    tensors = _renamed(read_tensors(directory)[0], os.path.join(directory, MODEL_FILE))
    try:
        config = _config(fields, tensors, uncompiled(model))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: is not a complete LoRA config: {error!r}") from error
    return restore_adapters(model, config, "default", tensors, {})


def to_peft(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the model's LoRA adapter as PEFT does: PeftModel.from_pretrained(base, directory) reads it.

    Args:
        model: a model that add_adapters or from_peft has given LoRA adapters. The modules of config.modules_to_save are
            written too.
        directory: a folder, which is made where it is missing.

    Raises:
        ValueError: the model has no adapters, or sparse ones, for which PEFT's format has no place.
    """
    root, record = adapter_record(model)
    layers = record.layers(root)
    sparse = [name for name, layer in layers.items() if layer.has_sparse]
    if sparse:
        raise ValueError(f"model: PEFT's files cannot hold the sparse parts of {', '.join(sparse)}; use save_adapters")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        ending = "" if isinstance(layer, RoSAEmbedding) else ".weight"
        for key, tensor in low_rank_tensors(layer).items():
            tensors[f"{_PREFIX}{name}.{key}{ending}"] = tensor
    for key, tensor in saved_module_tensors(root, record.saved_module_names).items():
        tensors[_PREFIX + key] = tensor
    config = record.config
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(root, "name_or_path", None) or None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(layers),
        "modules_to_save": list(record.saved_module_names) or None,
        "use_rslora": config.use_rslora,
        "rank_pattern": _deviations(layers, "r", config.r),
        "alpha_pattern": _deviations(layers, "lora_alpha", config.lora_alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
    }
    write_pair(directory, fields, detached(tensors), {"format": "pt"})


def _deviations(layers: dict[str, AdapterLayer], attribute: str, default: float) -> dict[str, int | float]:
    """{expression that matches one layer's full name and no other: its number, where that is not the default}."""
    numbers = {name: getattr(layer, attribute) for name, layer in layers.items()}
    return {"^" + re.escape(name): number for name, number in numbers.items() if number != default}


def _refuse_unsupported(fields: dict, source: str) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{source}: expected peft_type 'LORA', got {fields.get('peft_type')!r}")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{source}: bias={fields['bias']!r} trains the base's biases; only 'none' is supported")
    initialisation = fields.get("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise ValueError(f"{source}: init_lora_weights={initialisation!r} changes base weights; PEFT can convert it")
    for field, value in fields.items():
        if value and field not in _READ_FIELDS and field not in _FIELDS_WITHOUT_EFFECT_ON_WEIGHTS:
            raise ValueError(f"{source}: {field}={value!r} is not supported; only plain LoRA is")


def _renamed(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under this package's names: ``<layer>.lora_A`` for ``base_model.model.<layer>.lora_A.weight``."""
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{source}: expected names that begin with {_PREFIX!r}, got {key!r}")
        name = key.removeprefix(_PREFIX)
        factor = _FACTOR_KEY.fullmatch(name)
        renamed[f"{factor[1]}.{factor[2] or factor[3]}" if factor else name] = tensor
    return renamed


def _config(fields: dict, tensors: dict[str, Tensor], root: nn.Module) -> LoRAConfig:
    factor = re.compile(r"(.+)\.lora_(?:embedding_)?[AB]")
    layers = dict.fromkeys(match[1] for match in map(factor.fullmatch, tensors) if match)
    names = module_names(root)
    unknown = [name for name in layers if name not in names]
    if unknown:
        raise ValueError(f"model: has no module {', '.join(unknown)}, which the adapter was made for")
    wanted = tuple(fields.get("modules_to_save") or ())  # PEFT lists names that a task's head may have; not all exist
    saved = tuple(end for end in wanted if any(name == end or name.endswith("." + end) for name in names))
    return LoRAConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        lora_dropout=fields.get("lora_dropout", 0.0),
        target_modules="|".join(map(re.escape, layers)),
        modules_to_save=saved,
        use_rslora=fields.get("use_rslora", False),
        rank_pattern=_used(fields.get("rank_pattern"), layers),
        alpha_pattern=_used(fields.get("alpha_pattern"), layers),
    )


def _used(pattern: dict | None, layers: dict[str, None]) -> dict | None:
    """The entries that match an adapted module; PEFT ignores the others."""
    entries = {key: value for key, value in (pattern or {}).items() if any(matches_end(key, name) for name in layers)}
    return entries or None
