"""What the cost model knows of a GPU: rates from data sheets, or those that `python -m rosa_kernels.tune` measured on it."""

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Rates:
    """What large calls reach: FLOP/s of library GEMMs by operand, bytes/s, and the cost of one more kernel."""

    flops_16_bit: float
    flops_tf32: float
    flops_fp32: float
    bandwidth: float
    l2_bandwidth: float
    kernel_efficiency: float = 0.8
    """FLOP/s of our own GEMM loop over the library's."""
    launch_seconds: float = 4e-6


# Dense peaks of the data sheets (A100 80 GB, H100 SXM, B200, MI300X) times 0.7 for the FLOP/s and 0.9 for the bytes/s that large
# library calls reach; L2 as measured by Chips and Cheese (A100, H100), scaled with the memory for the others. None seen by us.
RATES = {
    "sm_80": Rates(218e12, 109e12, 14e12, 1.8e12, 4.4e12),
    "sm_90": Rates(692e12, 346e12, 47e12, 3.0e12, 5.5e12),
    "sm_100": Rates(1570e12, 780e12, 56e12, 7.2e12, 11e12),
    "gfx942": Rates(915e12, 457e12, 114e12, 4.8e12, 8e12),
    "other": Rates(100e12, 50e12, 15e12, 0.8e12, 2e12),
    "interpreter": Rates(692e12, 346e12, 47e12, 3.0e12, 5.5e12),
}


def table_file(device_name: str) -> Path:
    """Where a GPU's measured table lives: under ROSA_KERNELS_TUNED if that is set, else the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get("ROSA_KERNELS_TUNED") or Path(cache) / "rosa_kernels")
    return directory / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


@functools.cache
def measured(device: torch.device) -> dict:
    """{"rates": {field: number}, "configs": {key: position}} as tune wrote it for this GPU; {} where it did not.

    Raises:
        ValueError: for a file that is not such a table.
    """
    if device.type != "cuda":
        return {}
    path = table_file(torch.cuda.get_device_name(device))
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or not table.keys() >= {"rates", "configs"}:
        raise ValueError(f"{path}: expected a table with rates and configs; delete it or run python -m rosa_kernels.tune")
    return table


@functools.cache
def rates(device: torch.device, target: str) -> Rates:
    known = RATES[target]
    return Rates(**(vars(known) | measured(device).get("rates", {})))


def config_key(kernel: str, element_size: int, bucket: int) -> str:
    return f"{kernel}/{element_size}/{bucket}"


def tuned_position(device: torch.device, kernel: str, element_size: int, bucket: int, listed: int) -> int:
    """Position in the list of configurations; the first where nothing was tuned or the list has changed since."""
    position = measured(device).get("configs", {}).get(config_key(kernel, element_size, bucket), 0)
    return position if 0 <= position < listed else 0
