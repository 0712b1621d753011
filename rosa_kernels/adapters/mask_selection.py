"""select_masks: score the entries of the base weights, and give the sparse parts the places of the best."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa_kernels.adapters.inject import adapted_root, adapter_layers, wrapped_for_data_parallel
from rosa_kernels.config import LoRAConfig, RoSAConfig
from rosa_kernels.nn import AdapterLayer, RoSAEmbedding
from rosa_kernels.pattern import CSRPattern

Layers = dict[str, AdapterLayer]
LossFunction = Callable[[nn.Module, object], Tensor]

_NEEDS_BATCHES = ("gradient", "fisher", "snip")


def select_masks(
    model: nn.Module,
    batches: Iterable | None = None,
    loss_fn: LossFunction | None = None,
    *,
    config: RoSAConfig | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, CSRPattern]:
    """Choose where each sparse part has its entries, in mid-training too. It acts from the next forward on.

    The scores come from the gradient of the loss with respect to each whole base weight, summed in float32 over the
    batches (see RoSAConfig.mask). Each layer takes exactly as many entries, rows, columns or blocks as its density
    allows, those with the highest scores and the first ones among equals. No ``.grad`` changes, and base weights stay
    frozen. The values are the same Parameters as before, at zero, so an optimiser that was built before goes on.

    The forward passes run in the model's current mode. They cannot be under reentrant checkpointing, which
    torch.autograd.grad cannot enter. The memory for one gradient and one float32 sum of each adapted weight is needed.

    Under torch.distributed every rank calls it, and all choose the same from the sum of their scores. Before that
    DistributedDataParallel needs find_unused_parameters=True, as the values take no part yet.

    Args:
        model: a model with adapters, none of them merged or sharded by FSDP.
        batches: what loss_fn understands; the first config.mask_batches are read. The masks "magnitude" and "random"
            need none.
        loss_fn: loss_fn(model, batch) returns a scalar loss tensor.
        config: a RoSAConfig in place of the one that add_adapters was given. Without either it is RoSAConfig().
        generator: a CPU generator for the mask "random", in place of PyTorch's default one.

    Returns:
        {layer's full name: its pattern} of the layers that got one. Layers that had a pattern keep it.

    Raises:
        ValueError: there is nothing to choose, there are no batches, the loss does not depend on an adapted layer,
            scores are not finite, or the values cannot be resized any more. No layer is then changed.
        TypeError: config is no RoSAConfig.
    """
    root, record = adapted_root(model)
    layers = _layers_to_select(root)
    selection: LoRAConfig = config or (record.config if record else RoSAConfig())
    if not isinstance(selection, RoSAConfig):
        raise TypeError(f"config: expected a RoSAConfig, got {type(selection).__name__}")
    if selection.mask in _NEEDS_BATCHES:
        if batches is None or loss_fn is None:
            raise ValueError(f"batches and loss_fn: the mask {selection.mask!r} needs both")
        statistics = _gradient_statistics(model, layers, selection, batches, loss_fn)
    elif selection.mask == "magnitude":
        statistics = {name: layer.weight.detach().float() for name, layer in layers.items()}
    else:
        statistics = {name: torch.rand(layer.weight_shape, generator=generator) for name, layer in layers.items()}
    scores = {name: _scores(layers[name], statistic) for name, statistic in statistics.items()}
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{name}: its scores are not finite; the loss or a gradient overflowed or is NaN")
    patterns = _best(layers, scores, selection.mask_scope)
    _check_resizable(model, layers, patterns)
    for name, pattern in patterns.items():
        layers[name].place_pattern(pattern)
    return patterns


def _layers_to_select(model: nn.Module) -> Layers:
    sparse = {name: layer for name, layer in adapter_layers(model).items() if layer.has_sparse}
    layers = {name: layer for name, layer in sparse.items() if not layer.masks_selected}
    if not layers:
        reason = "every mask is chosen already" if sparse else "no layer has a sparse part"
        raise ValueError(f"model: nothing to choose, {reason}")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: is merged; unmerge_adapters first")
        if not layer.has_standard_base or tuple(layer.weight.shape) != layer.weight_shape:
            raise ValueError(
                f"{name}: expected a plain floating-point base weight to score, got {type(layer.base_layer).__name__} "
                f"with {type(layer.weight).__name__} of {layer.weight.dtype}; give this layer a pattern by hand"
            )
    return layers


def _gradient_statistics(
    model: nn.Module, layers: Layers, config: RoSAConfig, batches: Iterable, loss_fn: LossFunction
) -> dict[str, Tensor]:
    """{name: (out_features, in_features) float32}: the sum of gradients, of their squares, or sum · weight."""
    sums = {name: torch.zeros(layer.weight_shape, device=layer.weight.device) for name, layer in layers.items()}
    reached = set()
    count = 0
    for batch in itertools.islice(batches, config.mask_batches):
        for name, gradient in _base_gradients(model, layers, batch, loss_fn).items():
            sums[name] += gradient.float().square() if config.mask == "fisher" else gradient
            reached.add(name)
        count += 1
    if count == 0:
        raise ValueError("batches: expected at least one batch, got none")
    unreached = [name for name in layers if name not in reached]
    if unreached:
        raise ValueError(f"loss_fn: the loss does not depend on {', '.join(unreached)}, so no mask can be scored there")
    if config.mask == "snip":
        for name, layer in layers.items():
            sums[name] *= layer.weight.detach().float()
    return sums


def _base_gradients(model: nn.Module, layers: Layers, batch: object, loss_fn: LossFunction) -> dict[str, Tensor]:
    """{name: d loss / d base weight} of the layers that the loss depends on."""
    with torch.enable_grad(), _weights_as_leaves(layers) as leaves:
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: expected a scalar tensor, got {shape}")
        if not loss.requires_grad:
            raise ValueError("loss_fn: expected a loss that depends on the model's adapted layers, got a constant")
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {name: gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    return {name: gradient.to_dense() if gradient.is_sparse else gradient for name, gradient in found.items()}


@contextlib.contextmanager
def _weights_as_leaves(layers: Layers) -> Iterator[dict[str, nn.Parameter]]:
    """Each base weight stands in as a Parameter of its own that requires gradients and shares the weight's memory.

    So the frozen Parameters are never touched, and a weight that two modules share is scored for each on its own.
    """
    originals = {name: layer.base_layer.weight for name, layer in layers.items()}
    leaves = {name: nn.Parameter(weight.detach()) for name, weight in originals.items()}
    try:
        for name, layer in layers.items():
            layer.base_layer.weight = leaves[name]
        yield leaves
    finally:
        for name, layer in layers.items():
            layer.base_layer.weight = originals[name]


def _scores(layer: AdapterLayer, statistic: Tensor) -> Tensor:
    """(down, across) of layer.unit_grid: the sum of |statistic| over each entry, row, column or block."""
    statistic = _sum_over_ranks(statistic.to(layer.weight.device)).abs_()
    if layer.structure == "row":
        return statistic.sum(1, keepdim=True)
    if layer.structure == "column":
        return statistic.sum(0, keepdim=True)
    if layer.structure == "block":
        (down, across), size = layer.unit_grid, layer.block_size
        out_features, in_features = layer.weight_shape
        padded = F.pad(statistic, (0, across * size - in_features, 0, down * size - out_features))
        return padded.view(down, size, across, size).sum((1, 3))
    return statistic


def _sum_over_ranks(statistic: Tensor) -> Tensor:
    """A tensor that may be written to: the sum over all ranks of torch.distributed, the same bits on each."""
    statistic = statistic.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(statistic)
    return statistic


def _best(layers: Layers, scores: dict[str, Tensor], scope: str) -> dict[str, CSRPattern]:
    patterns = {}
    competing = {name: layer for name, layer in layers.items() if layer.structure == "unstructured"}
    if scope == "global" and competing:
        budget = sum(layer.unit_budget for layer in competing.values())
        device = scores[next(iter(competing))].device
        chosen = top_k(torch.cat([scores[name].flatten().to(device) for name in competing]), budget)
        parts = chosen.split([scores[name].numel() for name in competing])
        for name, part in zip(competing, parts, strict=True):
            patterns[name] = _pattern(layers[name], part.view_as(scores[name]).to(scores[name].device))
    for name, layer in layers.items():
        if name not in patterns:
            patterns[name] = _pattern(layer, _top_units(layer, scores[name]))
    return patterns


def _top_units(layer: AdapterLayer, score: Tensor) -> Tensor:
    """(down, across) bools; an embedding's padding row has no gradient and is no candidate."""
    flat = score.flatten()
    if isinstance(layer, RoSAEmbedding) and layer.padding_idx is not None:
        flat[layer.padding_idx] = -1.0
        return top_k(flat, min(layer.unit_budget, flat.shape[0] - 1)).view_as(score)
    return top_k(flat, layer.unit_budget).view_as(score)


def top_k(scores: Tensor, k: int) -> Tensor:
    """(n,) bools, true at exactly k of the highest of n scores; among equal ones the first are taken."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.topk(k, sorted=False).values.min()
    chosen = scores > threshold
    ties = (scores == threshold).nonzero()[:, 0]
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen


def _pattern(layer: AdapterLayer, units: Tensor) -> CSRPattern:
    """units: (down, across) bools over layer.unit_grid."""
    if layer.structure == "row":
        return CSRPattern.from_rows(units.flatten().nonzero()[:, 0], layer.weight_shape)
    if layer.structure == "column":
        return CSRPattern.from_columns(units.flatten().nonzero()[:, 0], layer.weight_shape)
    if layer.structure == "block":
        return CSRPattern.from_blocks(units, layer.block_size, layer.weight_shape)
    return CSRPattern.from_mask(units)


def _check_resizable(model: nn.Module, layers: Layers, patterns: dict[str, CSRPattern]) -> None:
    """Values change their number under the global scope, and where blocks are cut at an edge."""
    resized = [name for name, layer in layers.items() if layer.sparse_values.shape[0] != patterns[name].nnz]
    if not resized:
        return
    if wrapped_for_data_parallel(model):
        raise ValueError(
            f"model: is wrapped in DDP or FSDP, and the values of {', '.join(resized)} would change their number; "
            "choose masks before wrapping, or use mask_scope='layer' (and a block_size that divides the weights)"
        )
    with_gradients = [name for name in resized if layers[name].sparse_values.grad is not None]
    if with_gradients:
        raise ValueError(f"model: values of {', '.join(with_gradients)} have a gradient and cannot be resized")
