"""nn.Linear with a low-rank adapter, a sparse one, or both."""

import math

import torch
from torch import Tensor, nn

from rosa_kernels.config import check_integer
from rosa_kernels.functional import lora_linear, rosa_delta, rosa_linear, sparse_linear
from rosa_kernels.nn.layer import AdapterLayer
from rosa_kernels.pattern import CSRPattern


class _AdaptedLinear(AdapterLayer):
    """base_layer(x) + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ.

    A plain nn.Linear takes the fused ops. Any other base (quantised, tensor subclass, hooked) computes its own part.
    """

    factor_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, *settings):
        if not isinstance(base_layer, nn.Module) or not hasattr(base_layer, "in_features"):
            raise TypeError(f"base_layer: expected an nn.Linear or a module like it, got {type(base_layer).__name__}")
        super().__init__(base_layer, *settings)

    def _new_factors(self, factory: dict) -> tuple[Tensor, Tensor]:
        out_features, in_features = self.weight_shape
        lora_A = torch.empty(self.r, in_features, **factory)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))  # as nn.Linear initialises its weight
        return lora_A, torch.zeros(out_features, self.r, **factory)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.base_layer.out_features, self.base_layer.in_features

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features

    def _factor_product(self, dtype: torch.dtype) -> Tensor:
        lora_A, lora_B = self.low_rank_factors()
        return lora_B.to(dtype) @ lora_A.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        base = self.base_layer
        if self.merged or not self.adapter_enabled:
            return base(x)
        lora_A, lora_B = self.low_rank_factors() or (None, None)
        pattern = self.sparse_pattern()
        if lora_A is None and pattern is None:
            return base(x)
        values = None if pattern is None else self.sparse_values
        dropout = {"dropout_p": self.lora_dropout, "training": self.training}
        if not self.base_is_plain:
            y = base(x)
            return y + rosa_delta(x, lora_A, lora_B, self.scaling, values, pattern, **dropout).to(y.dtype)
        if pattern is None:
            return lora_linear(x, base.weight, base.bias, lora_A, lora_B, self.scaling, **dropout)
        if lora_A is None:
            return sparse_linear(x, base.weight, base.bias, values, pattern)
        return rosa_linear(x, base.weight, base.bias, lora_A, lora_B, self.scaling, values, pattern, **dropout)


class LoRALinear(_AdaptedLinear):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ (arXiv 2106.09685), W and b frozen.

    Args:
        base_layer: an nn.Linear (out_features, in_features); its parameters stop requiring gradients.
        r: rank, at least 1. ``lora_A.default`` is (r, in_features), ``lora_B.default`` (out_features, r) and zero at
            first.
        lora_alpha: scaling = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: chance in [0, 1] that an element of x is dropped on its way to A, in training.
        adapter_name: the name in place of "default".

    Raises:
        ValueError: a number out of range, a DTensor or uninitialised weight.
    """

    def __init__(
        self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, *,
        use_rslora: bool = False, adapter_name: str = "default",
    ):  # fmt: skip
        check_integer("r", r, 1)
        super().__init__(
            base_layer, r, lora_alpha, lora_dropout, 0.0, None, "unstructured", 1, use_rslora, adapter_name
        )


class RoSALinear(_AdaptedLinear):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ (arXiv 2401.04679), W and b frozen, S sparse.

    Args:
        base_layer, lora_alpha, lora_dropout, use_rslora, adapter_name: as in LoRALinear.
        r: rank, at least 0; 0 makes the adapter sparse only.
        density: share of S's entries in use. ``values.default`` holds them, (round(density · out_features ·
            in_features),) and zero at first; they take part once select_masks or place_pattern says where they sit.
        pattern: where they sit, known from the start, instead of a density.
        structure, block_size: what select_masks picks: single entries, or whole "row"s, "column"s or "block"s.
    """

    def __init__(
        self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, density: float = 0.01,
        pattern: CSRPattern | None = None, *, structure: str = "unstructured", block_size: int = 16,
        use_rslora: bool = False, adapter_name: str = "default",
    ):  # fmt: skip
        super().__init__(
            base_layer, r, lora_alpha, lora_dropout, density, pattern, structure, block_size, use_rslora, adapter_name
        )
