"""The one place that launches kernels and asks what device they run on."""

import functools
import os

import torch
from torch import Tensor

EMULATED = os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel, grid: tuple[int, ...], *args, config, **constants) -> None:
    """kernel[grid](*args, **constants) on the current stream of the tensors' device; an empty grid does nothing."""
    if 0 in grid:
        return
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if EMULATED:
        options = {}
    index = args[0].device.index
    if index is None or index == torch.cuda.current_device():
        kernel[grid](*args, **constants, **config.blocks, **options)
    else:
        with torch.cuda.device(index):
            kernel[grid](*args, **constants, **config.blocks, **options)


def precision(x: Tensor) -> str:
    """How x is multiplied: "tf32" for fp32 where PyTorch's switch for matmuls says so and the GPU can, else "ieee"."""
    if x.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "ieee" if torch.version.hip and target(x.device) != "gfx942" else "tf32"


def cdiv(length: int, block: int) -> int:
    return -(-length // block)


@functools.cache
def target(device: torch.device) -> str:
    """Whose list of configurations serves the device: sm_80, sm_90, sm_100, gfx942, else "other", or "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942" if properties.gcnArchName.startswith("gfx942") else "other"
    name = f"sm_{properties.major}{properties.minor}"
    return name if name in ("sm_80", "sm_90", "sm_100") else "other"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at once at the least; 8 under the interpreter, so that small tests split their sums too."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(length: int, block: int, tiles: int, device: torch.device, at_most: int) -> tuple[int, int]:
    """(splits, blocks a split): at least one, at best two programs a multiprocessor; length counts elements."""
    wanted = cdiv(2 * multiprocessors(device), max(1, tiles))
    blocks = max(1, cdiv(length, block))
    blocks_a_split = cdiv(blocks, max(1, min(wanted, at_most, blocks)))
    return cdiv(blocks, blocks_a_split), blocks_a_split
