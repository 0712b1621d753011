"""What the cost model knows of a GPU: its architecture's rates, scaled by what the device says of itself, or the rates
that `python -m rosa_kernels.tune` measured."""

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
    shared_memory: int = hardware.shared_memory(torch.device("cpu"))
    """Bytes that a block may have: the device's own, see hardware.shared_memory. The default is an H100's."""


class DataSheet(NamedTuple):
    """Of the device that an architecture's rates are for: its highest clock in Hz and its memory's bytes/s."""

    device: str
    clock_rate: float
    bandwidth: float


# sm_90 was measured on an H100 SXM (bench/results), but for the launch, which an eager call pays in full. We have seen
# no other. Their rates are the dense peaks of the data sheets below, times 0.7 for the FLOP/s and 0.9 for the bytes/s
# that large library calls reach. tf32 stands where fp32 does on an AMD GPU that has none. The L2 of sm_80 is as Chips
# and Cheese measured it, that of sm_100, sm_103 and gfx942 is scaled with the memory. That of the others is scaled with
# multiprocessors and clock, on CUDA from the H100 and on ROCm from gfx942.
RATES = {
    "sm_80": Rates(218e12, 109e12, 14e12, 1.8e12, 4.4e12, 108),
    "sm_86": Rates(108e12, 54e12, 27e12, 0.69e12, 1.6e12, 84),
    "sm_89": Rates(253e12, 128e12, 64e12, 0.78e12, 3.8e12, 142),
    "sm_90": Rates(724e12, 393e12, 51e12, 2.4e12, 2.75e12, 132, kernel_efficiency=0.73),
    "sm_100": Rates(1570e12, 780e12, 56e12, 7.2e12, 11e12, 148),
    "sm_103": Rates(1570e12, 780e12, 53e12, 7.2e12, 11e12, 148),
    "sm_120": Rates(352e12, 176e12, 88e12, 1.6e12, 5.2e12, 188),
    "gfx90a": Rates(134e12, 33e12, 33e12, 1.47e12, 2.3e12, 110),
    "gfx942": Rates(915e12, 457e12, 114e12, 4.8e12, 8e12, 304),
    "gfx950": Rates(1760e12, 110e12, 110e12, 7.2e12, 7.7e12, 256),
    "other": Rates(100e12, 50e12, 15e12, 0.8e12, 2e12, 60),
    "interpreter": Rates(724e12, 393e12, 51e12, 2.4e12, 2.75e12, 132, kernel_efficiency=0.73),
}
DATA_SHEETS = {
    "sm_80": DataSheet("A100 80 GB SXM", 1.41e9, 2.039e12),
    "sm_86": DataSheet("RTX A6000", 1.8e9, 0.768e12),
    "sm_89": DataSheet("L40S", 2.52e9, 0.864e12),
    "sm_90": DataSheet("H100 SXM", 1.98e9, 3.35232e12),  # 2 x 2619 MHz x 5120 bits
    "sm_100": DataSheet("B200", 1.965e9, 8e12),
    "sm_103": DataSheet("B300", 1.92e9, 8e12),
    "sm_120": DataSheet("RTX PRO 6000 Blackwell", 2.617e9, 1.792e12),
    "gfx90a": DataSheet("MI250X, each of its two halves", 1.7e9, 1.638e12),
    "gfx942": DataSheet("MI300X", 2.1e9, 5.3e12),
    "gfx950": DataSheet("MI355X", 2.4e9, 8e12),
    "other": DataSheet("no device: a guess", 2.4e9, 0.9e12),
}
_GEFORCE_TENSOR_CORES = 0.5
"""What a GeForce card's tensor cores do of a professional card's work where they sum in fp32 (NVIDIA's white papers of
GA102, AD102 and GB202)."""


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


def _scaled(device: torch.device, architecture: str) -> Rates:
    """The architecture's rates on this device: FLOP/s and L2 go with multiprocessors and clock, bytes/s with memory.

    A device that does not tell its clock runs at its architecture's. Where its memory is unknown too, each
    multiprocessor gets as much of it as on the architecture's own device.
    """
    rates, sheet = RATES[architecture], DATA_SHEETS[architecture]
    multiprocessors = hardware.multiprocessors(device)
    share = multiprocessors / rates.multiprocessors
    speed = share * ((hardware.clock_rate(device) or sheet.clock_rate) / sheet.clock_rate)
    geforce = "GeForce" in torch.cuda.get_device_name(device)
    on_tensor_cores = speed * (_GEFORCE_TENSOR_CORES if geforce else 1.0)
    memory = (hardware.memory_bandwidth(device) or share * sheet.bandwidth) / sheet.bandwidth
    return rates._replace(
        flops_16_bit=rates.flops_16_bit * on_tensor_cores,
        flops_tf32=rates.flops_tf32 * on_tensor_cores,
        flops_fp32=rates.flops_fp32 * speed,
        bandwidth=rates.bandwidth * memory,
        l2_bandwidth=rates.l2_bandwidth * speed,
        multiprocessors=multiprocessors,
    )


@forgotten_with_tables
@functools.cache
def rates(device: torch.device, architecture: str) -> Rates:
    """Those of RATES for a device that is no GPU; emulated kernels count as on an H100."""
    by_data_sheet = _scaled(device, architecture) if device.type == "cuda" else RATES[architecture]
    own = {"shared_memory": hardware.shared_memory(device)} | _table(device)["rates"]
    return by_data_sheet._replace(**own)


def config_key(kernel: str, element_size: int, bucket: int) -> str:
    return f"{kernel}/{element_size}/{bucket}"


@forgotten_with_tables
@functools.cache
def tuned_label(device: torch.device, kernel: str, element_size: int, bucket: int) -> str | None:
    """The label of the configuration that was the fastest on this GPU; None where it was not tuned."""
    return _table(device)["configs"].get(config_key(kernel, element_size, bucket))
