"""What the GPU backends ask about the device of a call. Emulated on CPU tensors, some answers are those of an H100."""

import functools

import torch
from torch import Tensor

from rosa_kernels.backends.shapes import cdiv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the GPU kernels compute."""
_OLDEST = (8, 0)
SHARED_MEMORY_OF_AN_H100 = 226 * 1024


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of a GPU backend do not compute this dtype on this device, if so."""
    if dtype not in DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < _OLDEST:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs a GPU of compute capability 8.0 (Ampere) or newer, this one has {capability}"
    return None


def precision(x: Tensor) -> str:
    """How x is multiplied: "tf32" for fp32 where PyTorch's switch for matmuls asks for it and the GPU can, else
    "ieee"."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "ieee" if torch.version.hip and architecture(x.device) != "gfx942" else "tf32"


@functools.cache
def architecture(device: torch.device) -> str:
    """sm_80, sm_90, sm_100, gfx942 or "other"; "interpreter" for the CPU. Lists of configurations have these names."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942" if properties.gcnArchName.startswith("gfx942") else "other"
    name = f"sm_{properties.major}{properties.minor}"
    return name if name in ("sm_80", "sm_90", "sm_100") else "other"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least. The interpreter says 8, so that small tests split their sums too."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for. 1 KiB is kept for what a kernel declares itself."""
    if device.type != "cuda" or torch.version.hip:  # PyTorch does not tell it on ROCm, where no CUDA kernel asks
        return SHARED_MEMORY_OF_AN_H100
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - 1024


def splits_of(length: int, block: int, tiles: int, device: torch.device, at_most: int) -> tuple[int, int]:
    """(splits, blocks a split) of a length in elements: at least one, at best two programs for each multiprocessor."""
    wanted = cdiv(2 * multiprocessors(device), max(1, tiles))
    blocks = max(1, cdiv(length, block))
    blocks_a_split = cdiv(blocks, max(1, min(wanted, at_most, blocks)))
    return cdiv(blocks, blocks_a_split), blocks_a_split
