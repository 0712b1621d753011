"""Adapters on whole models: put in, select masks, save, load, merge, take out."""

from rosa_kernels.adapters.checkpoint import load_adapters, save_adapters
from rosa_kernels.adapters.inject import (
    AdapterRecord,
    add_adapters,
    disable_adapters,
    merge_adapters,
    merge_and_unload,
    print_trainable_parameters,
    trainable_parameters,
    unmerge_adapters,
)
from rosa_kernels.adapters.mask_selection import select_masks
from rosa_kernels.adapters.peft_interop import from_peft, to_peft

__all__ = [
    "AdapterRecord",
    "add_adapters",
    "disable_adapters",
    "from_peft",
    "load_adapters",
    "merge_adapters",
    "merge_and_unload",
    "print_trainable_parameters",
    "save_adapters",
    "select_masks",
    "to_peft",
    "trainable_parameters",
    "unmerge_adapters",
]
