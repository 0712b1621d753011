"""AdapterLayer: what every layer with an adapter does, whatever its base layer computes."""

import math
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rosa_kernels.config import check_choice, check_fraction, check_integer, check_number
from rosa_kernels.functional import csr_add
from rosa_kernels.nn.pattern_buffers import PatternBuffers
from rosa_kernels.pattern import STRUCTURES, CSRPattern

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)


class AdapterLayer(nn.Module):
    """A frozen ``base_layer``, and beside it a low-rank adapter scaling · B A, a sparse one S, or both.

    The adapters' parameters carry the adapter's name: ``lora_A.<name>`` and ``lora_B.<name>`` where r > 0, and
    ``values.<name>`` (nnz,) where there is an S. The values exist from the start, so that an optimiser holds them, but
    they take no part before a pattern is placed. Adapters have the base weight's dtype, or float32 where that is
    narrower. A new adapter adds exactly zero.

    LoRALinear, RoSALinear and RoSAEmbedding are such layers; isinstance(module, AdapterLayer) finds them in a model.

    Attributes: ``r``, ``lora_alpha``, ``lora_dropout``, ``scaling``, ``density``, ``structure`` and ``block_size``, the
    settings; ``merged``, whether merge() has been called; ``adapter_enabled``, which rk.disable_adapters sets.
    """

    base_layer: Any  # an nn.Linear, an nn.Embedding, or a module with the same attributes
    unmerged_weight: Any  # the base layer's own weight while merged, else None

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        density: float = 0.0,
        pattern: CSRPattern | None = None,
        structure: str = "unstructured",
        block_size: int = 1,
        use_rslora: bool = False,
        adapter_name: str = "default",
    ):
        super().__init__()
        check_integer("r", r, 0)
        check_number("lora_alpha", lora_alpha)
        check_fraction("lora_dropout", lora_dropout)
        check_fraction("density", density)
        check_choice("structure", structure, STRUCTURES)
        check_integer("block_size", block_size, 1)
        check_adapter_name(adapter_name)
        _check_base(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.adapter_name = adapter_name
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        self.density = density if pattern is None else pattern.density
        self.structure = structure
        self.block_size = block_size
        self.merged = False
        self.adapter_enabled = True
        self.register_parameter("unmerged_weight", None)
        self._add_sparse(pattern)
        if r:
            self._add_low_rank()
        elif not self.has_sparse:
            raise ValueError("r and density: both are 0, so that there would be no adapter")
        self.register_state_dict_post_hook(_with_unmerged_weight)

    factor_names: tuple[str, str]
    """The names of the ParameterDicts that hold A and B."""

    def _new_factors(self, factory: dict) -> tuple[Tensor, Tensor]:
        """A and B of the given dtype and device; their product is zero."""
        raise NotImplementedError

    def _add_low_rank(self) -> None:
        factors = self._new_factors({"dtype": self._adapter_dtype(), "device": self.base_layer.weight.device})
        for name, factor in zip(self.factor_names, factors, strict=True):
            setattr(self, name, nn.ParameterDict({self.adapter_name: nn.Parameter(factor)}))

    def low_rank_factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """A and B, or None where r is 0."""
        return self._factors() if self.r else None

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of a layer whose r is not 0."""
        modules, (name_A, name_B) = self._modules, self.factor_names  # every forward: no detour by __getattr__
        return getattr(modules[name_A], self.adapter_name), getattr(modules[name_B], self.adapter_name)

    def _add_sparse(self, pattern: CSRPattern | None) -> None:
        self.values = nn.ParameterDict()
        self.patterns = nn.ModuleDict()
        self.has_sparse = pattern is not None or self.density > 0
        if not self.has_sparse:
            return
        entries = self.unit_budget * self.entries_per_unit if pattern is None else pattern.nnz
        device = self.base_layer.weight.device
        block_size = self.block_size if self.structure == "block" else None
        self.patterns[self.adapter_name] = PatternBuffers(self.weight_shape, block_size, device)
        self.values[self.adapter_name] = nn.Parameter(torch.zeros(entries, dtype=self._adapter_dtype(), device=device))
        if pattern is not None:
            self.place_pattern(pattern)

    def _adapter_dtype(self) -> torch.dtype:
        dtype = self.base_layer.weight.dtype
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    # The base layer

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out_features, in_features), the shape of S."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, or while merged the merged one."""
        return self.base_layer.weight

    @property
    def has_standard_base(self) -> bool:
        """Whether the base layer is exactly an nn.Linear or nn.Embedding, without hooks and with an ordinary weight."""
        base = self.base_layer
        weight = base.weight
        hooks = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        stock = type(base) is nn.Linear or type(base) is nn.Embedding
        return stock and not hooks and type(weight) in _PLAIN_TENSORS and weight.layout is torch.strided

    # The sparse part

    @property
    def masks_selected(self) -> bool:
        """Whether S has a pattern yet."""
        return self.has_sparse and self._pattern_buffers.selected

    @property
    def _pattern_buffers(self) -> PatternBuffers:
        modules: Any = self._modules  # every forward: no detour by __getattr__
        try:
            return modules["patterns"]._modules[self.adapter_name]
        except KeyError:  # hasattr and inspect.getmembers expect an AttributeError of a property
            raise AttributeError("_pattern_buffers: the layer has no sparse part") from None

    @property
    def sparse_values(self) -> nn.Parameter:
        """(nnz,): the values of S."""
        return getattr(self._modules["values"], self.adapter_name)

    @property
    def entries_per_unit(self) -> int:
        """How many entries a unit of S has: a row, a column, a block, or where unstructured an entry."""
        out_features, in_features = self.weight_shape
        return {"unstructured": 1, "row": in_features, "column": out_features, "block": self.block_size**2}[
            self.structure
        ]

    @property
    def unit_grid(self) -> tuple[int, int]:
        """How many units the whole weight has, down and across."""
        out_features, in_features = self.weight_shape
        size = self.block_size
        blocks = (-(-out_features // size), -(-in_features // size))
        return {
            "unstructured": (out_features, in_features),
            "row": (out_features, 1),
            "column": (1, in_features),
            "block": blocks,
        }[self.structure]

    @property
    def unit_budget(self) -> int:
        """How many units the density allows: at least one row, column or block."""
        down, across = self.unit_grid
        budget = round(self.density * down * across)
        return max(1, budget) if self.structure != "unstructured" and self.density else budget

    def sparse_pattern(self) -> CSRPattern | None:
        """The pattern of S, or None where none is placed."""
        return self._pattern_buffers.pattern() if self.has_sparse else None

    def place_pattern(self, pattern: CSRPattern) -> None:
        """Give S this pattern and values of zero. Their Parameter stays the same and is resized where nnz differs.

        Raises:
            ValueError: the layer has no sparse part, or the pattern has another shape than the weight.
        """
        if not self.has_sparse:
            raise ValueError("pattern: expected a layer with a density above 0")
        self._pattern_buffers.place(pattern)
        self._reset_values(pattern.nnz)

    def clear_pattern(self) -> None:
        """Take the pattern of S away, as before select_masks; the values are zero."""
        self._pattern_buffers.clear()
        self._reset_values(self.unit_budget * self.entries_per_unit)

    def _reset_values(self, entries: int) -> None:
        values = self.sparse_values
        if values.shape[0] == entries:
            values.data.zero_()
        else:
            values.data = values.data.new_zeros(entries)

    # Merging

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling · B A + S as a dense (out_features, in_features) tensor, float32, or float64 where the weight is."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        if self.r:
            low_rank = self.scaling * self._factor_product(dtype)
        else:
            low_rank = torch.zeros(self.weight_shape, dtype=dtype, device=self.weight.device)
        pattern = self.sparse_pattern()
        return low_rank if pattern is None else csr_add(low_rank, self.sparse_values.to(dtype), pattern)

    def _factor_product(self, dtype: torch.dtype) -> Tensor:
        """B A (out_features, in_features), computed in the given dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Put weight + delta_weight(), rounded once, in the base weight's place, for inference.

        The weight itself is set aside unchanged, and a module that shares it keeps it. While merged the layer computes
        its base layer alone, its adapter does not train, and state_dict() is that of the unmerged layer.

        Raises:
            RuntimeError: the base weight is quantised or otherwise no ordinary tensor.
        """
        if self.merged:
            warnings.warn("merge: already merged, nothing changes", stacklevel=3)
            return
        weight = self.weight
        if type(weight) not in _PLAIN_TENSORS or not weight.is_floating_point():
            raise RuntimeError(f"merge: expected an ordinary floating-point base weight, got {_kind(weight)}")
        delta = self.delta_weight()
        merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        self.unmerged_weight = weight
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged = True

    def unmerge(self) -> None:
        """Put the weight that merge() set aside back, bit for bit."""
        if not self.merged:
            warnings.warn("unmerge: not merged, nothing changes", stacklevel=2)
            return
        self.base_layer.weight = self.unmerged_weight
        self.unmerged_weight = None
        self.merged = False

    def train(self, mode: bool = True) -> "AdapterLayer":
        if mode and self.merged:
            warnings.warn("train: the adapter is merged and will not train; unmerge it first", stacklevel=2)
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        if self.merged:
            raise RuntimeError(f"load_state_dict: {prefix[:-1] or 'the layer'} is merged; unmerge it first")
        values = state_dict.get(f"{prefix}values.{self.adapter_name}")
        col = state_dict.get(f"{prefix}patterns.{self.adapter_name}.col_indices")
        if self.has_sparse and values is not None and col is not None and values.shape == col.shape:
            self._reset_values(values.shape[0])  # masks chosen over all layers together change the number
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parts = [f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}"]
        if self.has_sparse:
            parts.append(f"density={self.density:.4g}, structure={self.structure!r}")
        return ", ".join(parts + ["merged"] * self.merged)


def _with_unmerged_weight(layer: AdapterLayer, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """A hook of state_dict(): a merged layer writes the weight that merge() set aside."""
    if layer.merged:
        state_dict[prefix + "base_layer.weight"] = state_dict.pop(prefix + "unmerged_weight")


def loaded_types(module_name: str, *type_names: str) -> tuple[type, ...]:
    """A module's types for isinstance, or none where nobody has imported the module, as its import may be slow."""
    module = sys.modules.get(module_name)
    return () if module is None else tuple(getattr(module, name) for name in type_names)


def is_dtensor(tensor: Tensor) -> bool:
    return isinstance(tensor, loaded_types("torch.distributed.tensor", "DTensor"))


def check_adapter_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected a string, got {name!r}")
    if not name or "." in name or hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter_name: expected a name without dots that is no attribute of a module, got {name!r}")


def _check_base(base_layer: nn.Module) -> None:
    if isinstance(base_layer, AdapterLayer):
        raise TypeError(f"base_layer: expected a layer without an adapter, got {type(base_layer).__name__}")
    weight = base_layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"base_layer: expected a tensor as its weight, got {type(weight).__name__}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError("base_layer: expected an initialised weight; run the lazy module once before adding adapters")
    if is_dtensor(weight):
        raise ValueError(
            "base_layer: expected a whole weight, got a DTensor; add adapters before fully_shard or tensor parallelism"
        )


def _kind(tensor: Tensor) -> str:
    return f"{type(tensor).__name__} of {tensor.dtype}"
