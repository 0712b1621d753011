"""Kernels for low-rank and sparse adapters: y = x Wᵀ + b + scaling · x Aᵀ Bᵀ + x Sᵀ."""

from rosa_kernels import ops  # noqa: F401  registers torch.ops.rosa_kernels first
from rosa_kernels import nn
from rosa_kernels.adapters import (
    add_adapters,
    disable_adapters,
    merge_adapters,
    merge_and_unload,
    print_trainable_parameters,
    trainable_parameters,
    unmerge_adapters,
)
from rosa_kernels.checkpoint import load_adapters, save_adapters
from rosa_kernels.config import LoRAConfig, RoSAConfig
from rosa_kernels.dispatch import available_backends, use_backend
from rosa_kernels.functional import csr_add, lora_linear, rosa_delta, rosa_linear, sddmm, sparse_linear, spmm
from rosa_kernels.masks import select_masks
from rosa_kernels.pattern import CSRPattern
from rosa_kernels.peft import from_peft, to_peft
from rosa_kernels.version import __version__

__all__ = [
    "CSRPattern",
    "LoRAConfig",
    "RoSAConfig",
    "add_adapters",
    "available_backends",
    "csr_add",
    "disable_adapters",
    "from_peft",
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
