"""nn.Linear with a low-rank adapter, a sparse one, or both."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rosa_kernels.config import check_integer
from rosa_kernels.functional import lora_linear, rosa_delta, rosa_linear, sparse_linear
from rosa_kernels.nn.layer import AdapterLayer
from rosa_kernels.pattern import CSRPattern


class _AdaptedLinear(AdapterLayer):
    """base_layer(x) + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ.

    Over a plain nn.Linear one op computes all of it. Any other base layer (quantised, with hooks, of a tensor subclass)
    computes base_layer(x) itself, and rosa_delta the rest.
    """

    factor_names = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, **settings: Any):
        if not isinstance(base_layer, nn.Module) or not hasattr(base_layer, "in_features"):
            raise TypeError(f"base_layer: expected an nn.Linear or a module like it, got {type(base_layer).__name__}")
        super().__init__(base_layer, **settings)

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
        lora_A, lora_B = self._factors()
        return lora_B.to(dtype) @ lora_A.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        base = self.base_layer
        if self.merged or not self.adapter_enabled:
            return base(input)
        pattern = self.sparse_pattern()
        if not self.r and pattern is None:
            return base(input)
        dropout: dict[str, Any] = {"dropout_p": self.lora_dropout, "training": self.training}
        if not self.has_standard_base:
            y = base(input)
            lora_A, lora_B = self.low_rank_factors() or (None, None)
            values = None if pattern is None else self.sparse_values
            return y + rosa_delta(input, lora_A, lora_B, self.scaling, values, pattern, **dropout).to(y.dtype)
        if pattern is None:
            return lora_linear(input, base.weight, base.bias, *self._factors(), self.scaling, **dropout)
        if not self.r:
            return sparse_linear(input, base.weight, base.bias, self.sparse_values, pattern)
        lora_A, lora_B = self._factors()
        return rosa_linear(
            input, base.weight, base.bias, lora_A, lora_B, self.scaling, self.sparse_values, pattern, **dropout
        )


class LoRALinear(_AdaptedLinear):
    """An nn.Linear with a low-rank adapter (LoRA, arXiv 2106.09685); W and b are frozen.

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ.

    Args:
        base_layer: an nn.Linear, or a module with its attributes. Its parameters stop requiring gradients.
        r: the rank, at least 1. The parameter ``lora_A.default`` is (r, in_features), initialised as the weight of an
            nn.Linear; ``lora_B.default`` is (out_features, r), zero at first.
        lora_alpha: the numerator of scaling, which is lora_alpha / r.
        lora_dropout: the chance in [0, 1] that an element of x is zeroed on its way to A, in training.
        use_rslora: scaling is lora_alpha / sqrt(r) (arXiv 2312.03732).
        adapter_name: the last part of the parameters' names, in place of "default".

    Raises:
        ValueError: a number is out of its range, or the weight is a DTensor or uninitialised.
        TypeError: an argument has the wrong Python type, or base_layer carries an adapter already.
    """

    def __init__(
        self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, *,
        use_rslora: bool = False, adapter_name: str = "default",
    ):  # fmt: skip
        check_integer("r", r, 1)
        super().__init__(
            base_layer,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            adapter_name=adapter_name,
        )


class RoSALinear(_AdaptedLinear):
    """An nn.Linear with a low-rank and a sparse adapter (RoSA, arXiv 2401.04679); W and b are frozen.

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ.

    Args:
        base_layer, lora_alpha, lora_dropout, use_rslora, adapter_name: as in LoRALinear.
        r: the rank, at least 0; with 0 the adapter is sparse alone.
        density: the share in [0, 1] of S's entries that may be non-zero. The parameter ``values.default`` holds them,
            (round(density · out_features · in_features),) and zero at first. They take part once select_masks or
            place_pattern says where they sit.
        pattern: a CSRPattern that says so from the start, in place of a density.
        structure: what select_masks picks: single entries ("unstructured"), "row", "column" or "block".
        block_size: the side of a block.

    Raises:
        ValueError, TypeError: as LoRALinear. ValueError too: r and density are both 0, or the pattern does not fit.
    """

    def __init__(
        self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, density: float = 0.01,
        pattern: CSRPattern | None = None, *, structure: str = "unstructured", block_size: int = 16,
        use_rslora: bool = False, adapter_name: str = "default",
    ):  # fmt: skip
        super().__init__(
            base_layer,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            density=density,
            pattern=pattern,
            structure=structure,
            block_size=block_size,
            use_rslora=use_rslora,
            adapter_name=adapter_name,
        )
