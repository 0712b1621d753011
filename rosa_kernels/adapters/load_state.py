"""Adapters from tensors. Everything is checked against the model before the first of its bits changes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rosa_kernels.adapters.inject import AdapterRecord, adapter_layers, adapter_record, add_adapters, uncompiled
from rosa_kernels.adapters.target_modules import TargetModule, find_target_modules, saved_module_tensors, saved_modules
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
    """Fill the config's adapters and the modules to save; the adapters are added where the model has none.

    Args:
        model: without adapters, or with those of the same config and name.
        tensors: ``<layer>.<factor name>``, ``<layer>.values``, and the states of the modules to save, nothing else.
        patterns: for each layer with a sparse part what makes the pattern from the weight's shape, or raises ValueError
            where it does not fit; None where no mask is chosen.
        last_check: is called when all other checks have passed, and raises ValueError to stop.

    Raises:
        ValueError: something is missing, superfluous, or does not fit. It is named, and the model is as it was.
    """
    root = uncompiled(model)
    present = bool(adapter_layers(root))
    if present:
        root, record = adapter_record(root)
        targets = _target_modules_of_adapters(root, record, config, adapter_name)
    else:
        targets = find_target_modules(root, config)
    made = _made_patterns(targets, patterns)
    saved = saved_module_tensors(root, saved_modules(root, config))
    _check_tensors(tensors, _adapter_shapes(targets, made), saved)
    last_check()
    if not present:
        add_adapters(root, config, adapter_name)
        root, record = adapter_record(root)
    for name, layer in record.layers(root).items():
        _fill(layer, name, tensors, made.get(name))
    with torch.no_grad():
        for key, tensor in saved.items():
            tensor.copy_(tensors[key])
    return model


def _target_modules_of_adapters(
    root: nn.Module, record: AdapterRecord, config: LoRAConfig, adapter_name: str
) -> list[TargetModule]:
    """The targets of the adapters that the model carries, if they are those of the config."""
    if (record.config, record.adapter_name) != (config, adapter_name):
        raise ValueError(
            f"model: carries adapter {record.adapter_name!r} of {record.config}, not {adapter_name!r} of {config}"
        )
    targets = []
    for name, layer in record.layers(root).items():
        if layer.merged:
            raise ValueError(f"{name}: is merged; unmerge_adapters first")
        if any(is_dtensor(p) for p in layer.parameters()):
            raise ValueError(f"{name}: is sharded over ranks; load adapters before fully_shard")
        density = layer.density if layer.has_sparse else 0.0
        targets.append(TargetModule(name, layer.base_layer, layer.r, layer.lora_alpha, density))
    return targets


def _weight_shape(target: TargetModule) -> tuple[int, int]:
    module = target.module
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _made_patterns(targets: list[TargetModule], patterns: dict[str, PatternMaker | None]) -> dict[str, CSRPattern]:
    sparse = {target.name for target in targets if target.density}
    if sparse != set(patterns):
        raise ValueError(
            f"patterns: the model has none to fill for {sorted(set(patterns) - sparse)}, and none came for "
            f"{sorted(sparse - set(patterns))}"
        )
    made: dict[str, CSRPattern] = {}
    for target in targets:
        maker = patterns.get(target.name)
        if maker is None:
            continue
        try:
            made[target.name] = maker(_weight_shape(target))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{target.name}: {error}") from error
    return made


def _adapter_shapes(targets: list[TargetModule], made: dict[str, CSRPattern]) -> dict[str, tuple[int, ...]]:
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
    if (factors := layer.low_rank_factors()) is not None:
        for factor_name, parameter in zip(layer.factor_names, factors, strict=True):
            parameter.data = tensors[f"{name}.{factor_name}"].to(device, copy=True)
    if pattern is not None:
        layer.place_pattern(pattern)
        layer.sparse_values.data = tensors[f"{name}.values"].to(device, copy=True)
    elif layer.has_sparse:
        layer.clear_pattern()
