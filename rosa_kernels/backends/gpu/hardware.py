"""What the GPU backends ask about the device of a call. Emulated on CPU tensors, some answers are those of an H100."""

import functools

import torch
from torch import Tensor

from rosa_kernels.backends.shapes import cdiv

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the GPU kernels compute."""
_OLDEST = (8, 0)
_KiB = 1024
_OTHER = "other"
SHARED_MEMORY = {
    "sm_80": 163 * _KiB,
    "sm_86": 99 * _KiB,
    "sm_89": 99 * _KiB,
    "sm_90": 227 * _KiB,
    "sm_100": 227 * _KiB,
    "sm_103": 227 * _KiB,
    "sm_120": 99 * _KiB,
    "gfx90a": 64 * _KiB,
    "gfx942": 64 * _KiB,
    "gfx950": 160 * _KiB,
    _OTHER: 64 * _KiB,
    "interpreter": 227 * _KiB,
}
"""The architectures that have figures and lists of their own, with the bytes of shared memory that a block may have.

They are those of the CUDA programming guide's table of compute capabilities, and of AMD's CDNA 2, 3 and 4.
"""
_RESERVED = 1 * _KiB
"""What a block leaves to the shared memory that a kernel declares itself."""
_BANDWIDTHS = {
    "A100-SXM4-40GB": 1.555e12,
    "A100-PCIE-40GB": 1.555e12,
    "H100 PCIe": 2.04e12,
    "H100 NVL": 3.94e12,
    "H200": 4.8e12,
    "GB10": 0.273e12,
    "MI300A": 5.3e12,
    "MI325X": 6e12,
}
"""Bytes/s of data sheets, by a part of the device's name, where PyTorch does not tell the memory's clock.

Devices whose multiprocessors get as much each as on their architecture's own device need no line here.
"""


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
    """The architecture of SHARED_MEMORY whose figures and lists of configurations stand for the device.

    That is its own where it has some. A newer NVIDIA GPU goes by a known one that asks for no more shared memory, the
    newest of those with most. An AMD GPU without figures is "other", and the CPU is the "interpreter".
    """
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in SHARED_MEMORY else _OTHER
    number = 10 * properties.major + properties.minor
    if f"sm_{number}" in SHARED_MEMORY:
        return f"sm_{number}"
    numbers = (int(name[3:]) for name in SHARED_MEMORY if name.startswith("sm_"))
    room = properties.shared_memory_per_block_optin
    fitting = [(SHARED_MEMORY[f"sm_{n}"], n) for n in numbers if n < number and SHARED_MEMORY[f"sm_{n}"] <= room]
    return f"sm_{max(fitting)[1]}" if fitting else _OTHER


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least. The interpreter says 8, so that small tests split their sums too."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for. 1 KiB is kept for what a kernel declares itself."""
    if device.type != "cuda":
        return SHARED_MEMORY["interpreter"] - _RESERVED
    properties = torch.cuda.get_device_properties(device)
    if not torch.version.hip:
        return properties.shared_memory_per_block_optin - _RESERVED
    # Not every PyTorch tells it on ROCm, where no CUDA kernel asks.
    return getattr(properties, "shared_memory_per_block", 0) or SHARED_MEMORY[architecture(device)]


def clock_rate(device: torch.device) -> float:
    """The multiprocessors' highest clock rate in Hz; 0 where PyTorch does not tell it."""
    return 1e3 * getattr(torch.cuda.get_device_properties(device), "clock_rate", 0)


def memory_bandwidth(device: torch.device) -> float:
    """What the data sheet says of the device's memory, in bytes/s; 0 where neither PyTorch nor _BANDWIDTHS tells it.

    The memory sends two bits a pin and clock, as CUDA counts its clock. HIP counts so for the HBM2 of gfx90a; for other
    memory it tells the clock of the controller, which is lower.
    """
    properties = torch.cuda.get_device_properties(device)
    if not torch.version.hip or architecture(device) == "gfx90a":
        clock, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
        if clock and bits:
            return 2e3 * clock * bits / 8
    return next((rate for name, rate in _BANDWIDTHS.items() if name in properties.name), 0.0)


def splits_of(length: int, block: int, tiles: int, device: torch.device, at_most: int) -> tuple[int, int]:
    """(splits, blocks a split) of a length in elements: at least one, at best two programs for each multiprocessor."""
    wanted = cdiv(2 * multiprocessors(device), max(1, tiles))
    blocks = max(1, cdiv(length, block))
    blocks_a_split = cdiv(blocks, max(1, min(wanted, at_most, blocks)))
    return cdiv(blocks, blocks_a_split), blocks_a_split
