"""What the cost model knows of a GPU: rates of data sheets, or those that `python -m rosa_kernels.tune` measured."""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rosa_kernels.backends.gpu import hardware


class Rates(NamedTuple):
    """What large calls reach: FLOP/s of library GEMMs by operand, bytes/s, and the cost of one more call."""

    flops_16_bit: float
    flops_tf32: float
    flops_fp32: float
    bandwidth: float
    l2_bandwidth: float
    multiprocessors: int
    kernel_efficiency: float = 0.65
    """FLOP/s of our own GEMM loop over the library's. It is low where unmeasured, so that doubt favours the library."""
    launch_seconds: float = 4e-6
    """What one more library call costs."""
    kernel_launch_seconds: float = 10e-6
    """What one more kernel of ours costs, which Python launches: 3 to 5 times a library call on the H100's host.

    In a CUDA graph both cost 1 us, but few calls are close enough for that to matter there.
    """
    shared_memory: int = hardware.SHARED_MEMORY_OF_AN_H100
    """Bytes that a block may have: the device's own, see hardware.shared_memory."""


# sm_90 was measured on an H100 SXM (bench/results), but for the launch, which an eager call pays in full. The others
# are the dense peaks of data sheets (A100 80 GB, B200, MI300X), times 0.7 for the FLOP/s and 0.9 for the bytes/s that
# large library calls reach. Their L2 is as Chips and Cheese measured it (A100), or scaled with the memory. We have seen
# none.
RATES = {
    "sm_80": Rates(218e12, 109e12, 14e12, 1.8e12, 4.4e12, 108),
    "sm_90": Rates(724e12, 393e12, 51e12, 2.4e12, 2.75e12, 132, kernel_efficiency=0.73),
    "sm_100": Rates(1570e12, 780e12, 56e12, 7.2e12, 11e12, 148),
    "gfx942": Rates(915e12, 457e12, 114e12, 4.8e12, 8e12, 304),
    "other": Rates(100e12, 50e12, 15e12, 0.8e12, 2e12, 60),
    "interpreter": Rates(724e12, 393e12, 51e12, 2.4e12, 2.75e12, 132, kernel_efficiency=0.73),
}


def table_file(device_name: str) -> Path:
    """Where a GPU's measured table lives: under ROSA_KERNELS_TUNED if that is set, else the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(os.environ.get("ROSA_KERNELS_TUNED") or Path(cache) / "rosa_kernels")
    return directory / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read_table(path: Path) -> dict:
    """{"rates": {field of Rates: number > 0}, "configs": {config_key: label}}. Other keys are left alone.

    Raises:
        ValueError: for a file that is not such a table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        fields = Rates._fields
        sound = all(name in fields and number > 0 for name, number in table["rates"].items())
        sound = sound and all(isinstance(label, str) for label in table["configs"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is not a table of python -m rosa_kernels.tune ({error!r}); delete it") from error
    if not sound:
        raise ValueError(f"{path}: holds an unknown rate, one out of range, or no label of a configuration; delete it")
    return table


def write_table(path: Path, table: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


_tables: dict[torch.device, dict] = {}
_caches: list = []


def forgotten_with_tables(cached: Callable) -> Callable:
    """A function with a cache, of which nothing holds any more when use_table has changed the rates."""
    _caches.append(cached)
    return cached


def use_table(device: torch.device, table: dict) -> None:
    """Count with the given table for this device from now on."""
    _tables[device] = table
    for cached in _caches:
        cached.cache_clear()


def _table(device: torch.device) -> dict:
    if device not in _tables:
        path = table_file(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        _tables[device] = read_table(path) if path is not None and path.exists() else {"rates": {}, "configs": {}}
    return _tables[device]


@forgotten_with_tables
@functools.cache
def rates(device: torch.device, architecture: str) -> Rates:
    own = {"shared_memory": hardware.shared_memory(device)} | _table(device)["rates"]
    return RATES[architecture]._replace(**own)


def config_key(kernel: str, element_size: int, bucket: int) -> str:
    return f"{kernel}/{element_size}/{bucket}"


@forgotten_with_tables
@functools.cache
def tuned_label(device: torch.device, kernel: str, element_size: int, bucket: int) -> str | None:
    """The label of the configuration that was the fastest on this GPU; None where it was not tuned."""
    return _table(device)["configs"].get(config_key(kernel, element_size, bucket))
