"""The one place that launches Triton kernels."""

import os

import torch

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
