"""Adapters on a whole model: put them in, count them, merge them, switch them off, take them out."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from rosa_kernels.adapters.target_modules import TargetModule, find_target_modules, module_names, saved_modules
from rosa_kernels.config import LoRAConfig, RoSAConfig
from rosa_kernels.nn import AdapterLayer, LoRALinear, RoSAEmbedding, RoSALinear
from rosa_kernels.nn.layer import check_adapter_name, loaded_types

_RECORD = "rosa_adapters"


@dataclass(frozen=True)
class AdapterRecord:
    """What add_adapters did to a model; kept on it as ``model.rosa_adapters``."""

    config: LoRAConfig
    adapter_name: str
    layer_names: tuple[str, ...]
    saved_module_names: tuple[str, ...]

    def layers(self, root: nn.Module) -> dict[str, AdapterLayer]:
        """{full name: layer} in the model that carries this record."""
        return {name: cast(AdapterLayer, root.get_submodule(name)) for name in self.layer_names}


AdapterRecord.__module__ = "rosa_kernels.adapters"  # whole models that torch.save wrote name it there, since 0.1.0


def add_adapters(model: nn.Module, config: LoRAConfig, adapter_name: str = "default") -> nn.Module:
    """Put an adapter beside every module that the config names, in place, and freeze the rest.

    Afterwards exactly the adapters and the modules of config.modules_to_save require gradients. The latter train where
    they are, without a copy: disable_adapters does not bring their first state back, and a weight that they share with
    another module trains there too. A module with several names gets one adapter, which acts under every name. Of two
    modules that share a weight each gets its own adapter.

    Args:
        model: any nn.Module that contains the modules to adapt; not yet wrapped in DDP or FSDP, nor of DTensors.
        config: a LoRAConfig; or a RoSAConfig, whose sparse part takes part after select_masks.
        adapter_name: the last part of the names of the adapters' parameters. A model carries one adapter.

    Returns:
        The same model.

    Raises:
        ValueError: a name matches nothing, a module cannot be adapted, or the model has adapters already. The model is
            then as it was.
        TypeError: config is no LoRAConfig.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config: expected a LoRAConfig or RoSAConfig, got {type(config).__name__}")
    root = uncompiled(model)
    check_adapter_name(adapter_name)
    _check_model(root)
    targets = find_target_modules(root, config)
    saved = tuple(saved_modules(root, config))
    trainable_before = [p for p in root.parameters() if p.requires_grad]
    try:
        layers = {id(target.module): _adapted(target, config, adapter_name) for target in targets}
    except ValueError:
        for parameter in trainable_before:
            parameter.requires_grad_(True)
        raise
    root.requires_grad_(False)
    for name, module in module_names(root).items():
        if id(module) in layers:
            _replace(root, name, layers[id(module)])
    for name in saved:
        for parameter in root.get_submodule(name).parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    setattr(root, _RECORD, AdapterRecord(config, adapter_name, tuple(t.name for t in targets), saved))
    return model


def _adapted(target: TargetModule, config: LoRAConfig, adapter_name: str) -> AdapterLayer:
    common: dict[str, Any] = {"use_rslora": config.use_rslora, "adapter_name": adapter_name}
    module, r, alpha = target.module, target.r, target.lora_alpha
    try:
        if isinstance(module, nn.Embedding):
            return RoSAEmbedding(module, r, alpha, target.density, **common)
        if not isinstance(config, RoSAConfig):
            return LoRALinear(module, r, alpha, config.lora_dropout, **common)
        return RoSALinear(
            module, r, alpha, config.lora_dropout, target.density,
            structure=config.structure, block_size=config.block_size, **common,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ValueError(f"{target.name}: {error}") from error


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def wrapped_for_data_parallel(model: nn.Module) -> bool:
    """Whether DistributedDataParallel or FullyShardedDataParallel has taken hold of any part of the model."""
    kinds = loaded_types("torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel")
    kinds += (nn.parallel.DistributedDataParallel,)
    return any(isinstance(module, kinds) for module in model.modules())


def _check_model(model: nn.Module) -> None:
    if isinstance(model, (nn.Linear, nn.Embedding)):
        raise ValueError("model: is itself a layer and cannot be replaced in place; wrap it by rosa_kernels.nn instead")
    if adapter_layers(model):
        raise ValueError("model: already carries adapters; merge_and_unload them first, one adapter fits a model")
    if wrapped_for_data_parallel(model):
        raise ValueError("model: is wrapped in DDP or FSDP; add adapters before wrapping")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """{full name: layer} of every layer with an adapter, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def adapted_root(model: nn.Module) -> tuple[nn.Module, AdapterRecord | None]:
    """The module that add_adapters was given, found again inside any wrapper, and what was done to it.

    Where add_adapters has not put them in, the model itself and None.
    """
    for module in model.modules():
        record = module.__dict__.get(_RECORD)
        if record is not None:
            return module, record
    return uncompiled(model), None


def adapter_record(model: nn.Module) -> tuple[nn.Module, AdapterRecord]:
    """As adapted_root. Raises ValueError where add_adapters has not put the adapters in."""
    root, record = adapted_root(model)
    if record is None:
        raise ValueError("model: has no adapters; call add_adapters first")
    return root, record


def _layers(model: nn.Module) -> list[AdapterLayer]:
    layers = list(adapter_layers(model).values())
    if not layers:
        raise ValueError("model: has no adapters; call add_adapters first")
    return layers


def trainable_parameters(model: nn.Module) -> dict:
    """{"trainable": number of entries that require gradients, "total": of all, "percent": 100 · their ratio}.

    The entries of the adapters are in the total.
    """
    set_aside = {id(layer.unmerged_weight) for layer in adapter_layers(model).values() if layer.merged}
    parameters = [p for p in model.parameters() if id(p) not in set_aside]
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {"trainable": trainable, "total": total, "percent": 100 * trainable / max(1, total)}


def print_trainable_parameters(model: nn.Module) -> None:
    """Print what trainable_parameters counts, in one line."""
    counts = trainable_parameters(model)
    print(f"trainable parameters: {counts['trainable']:,} of {counts['total']:,} ({counts['percent']:.4f} %)")


def merge_adapters(model: nn.Module) -> None:
    """Put weight + scaling · B A + S, rounded once, in each base weight's place, for inference; see AdapterLayer.merge.

    Layers that are merged already stay so.

    Raises:
        ValueError: the model has no adapters.
        RuntimeError: a base weight is quantised or otherwise no ordinary tensor.
    """
    for layer in _layers(model):
        if not layer.merged:
            layer.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Put the original weight of every merged layer back, bit for bit.

    Raises:
        ValueError: the model has no adapters.
    """
    for layer in _layers(model):
        if layer.merged:
            layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge every adapter and put the plain base layers back in place: the model's outputs stay, its adapters are gone.

    Parameters stay frozen. A weight that an adapted layer shared with another module is no longer shared: only the
    adapted layer's has changed.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapters.
        RuntimeError: a base weight is quantised or otherwise no ordinary tensor.
    """
    root = uncompiled(model)
    merge_adapters(root)
    for name, module in module_names(root).items():
        if isinstance(module, AdapterLayer):
            _replace(root, name, module.base_layer)
    if _RECORD in root.__dict__:
        delattr(root, _RECORD)
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the ``with`` every adapted layer computes what its base layer does, and the ``with`` yields the model.

    Merged layers are unmerged inside and merged again afterwards. Modules of modules_to_save were trained in place and
    stay as they are.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = _layers(model)
    before = [(layer, layer.adapter_enabled, layer.merged) for layer in layers]
    try:
        for layer in layers:
            layer.adapter_enabled = False
            if layer.merged:
                layer.unmerge()
        yield model
    finally:
        for layer, enabled, merged in before:
            layer.adapter_enabled = enabled
            if merged and not layer.merged:
                layer.merge()
