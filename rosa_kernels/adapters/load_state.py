"""Adapters from tensors: everything is checked against the model before the first of its bits changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rosa_kernels.adapters.inject import adapter_layers, adapter_record, add_adapters, uncompiled
from rosa_kernels.adapters.target_modules import Target, find_targets, saved_modules
from rosa_kernels.config import LoRAConfig
from rosa_kernels.nn import AdapterLayer
from rosa_kernels.nn.layer import is_dtensor
from rosa_kernels.pattern import CSRPattern

_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

PatternMaker = Callable[[tuple[int, int]], CSRPattern]


def restore_adapters(
    model: nn.Module,
    config: LoRAConfig,
    adapter_name: str,
    tensors: dict[str, Tensor],
    patterns: dict[str, PatternMaker | None],
    last_check: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Add the config's adapters, or take those that are there, and fill them and the modules to save.

    Args:
        model: without adapters, or with those of the same config and name.
        tensors: ``<layer>.<factor name>``, ``<layer>.values``, and the states of the modules to save, nothing else.
        patterns: for each layer with a sparse part what makes its pattern from the weight's shape, raising ValueError
            where it does not fit; None where no mask is chosen.
        last_check: raises ValueError to stop everything; called when all other checks have passed.

    Raises:
        ValueError: something is missing, too much, or does not fit; it is named, and the model is as it was.
    """
    root = uncompiled(model)
    present = bool(adapter_layers(root))
    targets = _present_targets(root, config, adapter_name) if present else find_targets(root, config)
    made = _made_patterns(targets, patterns)
    saved_names = saved_modules(root, config)
    saved = {f"{name}.{key}": t for name in saved_names for key, t in root.get_submodule(name).state_dict().items()}
    _check_tensors(tensors, _adapter_shapes(targets, made), saved)
    last_check()
    if not present:
        add_adapters(root, config, adapter_name)
    for target in targets:
        _fill(adapter_record(root)[0].get_submodule(target.name), target.name, tensors, made.get(target.name))
    with torch.no_grad():
        for key, tensor in saved.items():
            tensor.copy_(tensors[key])
    return model


def _present_targets(root: nn.Module, config: LoRAConfig, adapter_name: str) -> list[Target]:
    """The targets of the adapters that the model carries, if they are those of the config."""
    record = adapter_record(root)[1]
    if (record.config, record.adapter_name) != (config, adapter_name):
        raise ValueError(
            f"model: carries adapter {record.adapter_name!r} of {record.config}, not {adapter_name!r} of {config}"
        )
    targets = []
    for name in record.layer_names:
        layer = root.get_submodule(name)
        if layer.merged:
            raise ValueError(f"{name}: is merged; unmerge_adapters first")
        if any(is_dtensor(p) for p in layer.parameters()):
            raise ValueError(f"{name}: is sharded over ranks; load adapters before fully_shard")
        density = layer.density if layer.has_sparse else 0.0
        targets.append(Target(name, layer.base_layer, layer.r, layer.lora_alpha, density))
    return targets


def _weight_shape(target: Target) -> tuple[int, int]:
    module = target.module
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _made_patterns(targets: list[Target], patterns: dict[str, PatternMaker | None]) -> dict[str, CSRPattern | None]:
    sparse = {target.name for target in targets if target.density}
    if sparse != set(patterns):
        raise ValueError(
            f"patterns: the model has none to fill for {sorted(set(patterns) - sparse)}, and none came for "
            f"{sorted(sparse - set(patterns))}"
        )
    made: dict[str, CSRPattern | None] = {}
    for target in targets:
        maker = patterns.get(target.name)
        if maker is None:
            continue
        try:
            made[target.name] = maker(_weight_shape(target))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{target.name}: {error}") from error
    return made


def _adapter_shapes(targets: list[Target], made: dict[str, CSRPattern | None]) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of what fills the adapters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        name, (out_features, in_features) = target.name, _weight_shape(target)
        if target.r and isinstance(target.module, nn.Embedding):
            shapes[f"{name}.lora_embedding_A"] = (target.r, out_features)
            shapes[f"{name}.lora_embedding_B"] = (in_features, target.r)
        elif target.r:
            shapes[f"{name}.lora_A"] = (target.r, in_features)
            shapes[f"{name}.lora_B"] = (out_features, target.r)
        if name in made:
            shapes[f"{name}.values"] = (made[name].nnz,)
    return shapes


def _check_tensors(tensors: dict[str, Tensor], adapter: dict[str, tuple], saved: dict[str, Tensor]) -> None:
    expected = adapter | {key: tuple(tensor.shape) for key, tensor in saved.items()}
    missing = sorted(set(expected) - set(tensors))
    unknown = sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise ValueError(f"tensors: missing for this model {missing}, without a place in it {unknown}")
    for key, shape in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{key}: expected shape {shape} for this model, got {tuple(tensors[key].shape)}")
    for key in adapter:
        if tensors[key].dtype not in _ADAPTER_DTYPES:
            raise ValueError(f"{key}: expected one of {_ADAPTER_DTYPES}, got {tensors[key].dtype}")
    for key, tensor in saved.items():
        if tensors[key].dtype != tensor.dtype:
            raise ValueError(f"{key}: expected {tensor.dtype} as in this model, got {tensors[key].dtype}")


def _fill(layer: AdapterLayer, name: str, tensors: dict[str, Tensor], pattern: CSRPattern | None) -> None:
    """Give the layer's Parameters, which stay the same objects, the tensors' bits and dtype."""
    device = layer.weight.device
    if layer.r:
        for factor_name, parameter in zip(layer.factor_names, layer.low_rank_factors(), strict=True):
            parameter.data = tensors[f"{name}.{factor_name}"].to(device, copy=True)
    if pattern is not None:
        layer.place_pattern(pattern)
        layer.sparse_values.data = tensors[f"{name}.values"].to(device, copy=True)
    elif layer.has_sparse:
        layer.clear_pattern()
