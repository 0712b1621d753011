"""Kernels for low-rank and sparse adapters: y = x Wᵀ + b + scaling · x Aᵀ Bᵀ + x Sᵀ."""

import rosa_kernels.flop_counts  # noqa: F401 (FlopCounterMode then knows the ops)
from rosa_kernels import nn
from rosa_kernels.adapters import (
    add_adapters,
    disable_adapters,
    from_peft,
    load_adapters,
    merge_adapters,
    merge_and_unload,
    print_trainable_parameters,
    save_adapters,
    select_masks,
    to_peft,
    trainable_parameters,
    unmerge_adapters,
)
from rosa_kernels.config import LoRAConfig, RoSAConfig
from rosa_kernels.dispatch import available_backends, use_backend
from rosa_kernels.functional import csr_add, lora_linear, rosa_delta, rosa_linear, sddmm, sparse_linear, spmm
from rosa_kernels.graphs import graphed
from rosa_kernels.pattern import CSRPattern
from rosa_kernels.version import __version__

__all__ = [
    "CSRPattern",
    "LoRAConfig",
    "RoSAConfig",
    "__version__",
    "add_adapters",
    "available_backends",
    "csr_add",
    "disable_adapters",
    "from_peft",
    "graphed",
    "load_adapters",
    "lora_linear",
    "merge_adapters",
    "merge_and_unload",
    "nn",
    "print_trainable_parameters",
    "rosa_delta",
    "rosa_linear",
    "save_adapters",
    "sddmm",
    "select_masks",
    "sparse_linear",
    "spmm",
    "to_peft",
    "trainable_parameters",
    "unmerge_adapters",
    "use_backend",
]
