"""Block sizes, warps and stages: a short list for each architecture, kernel and bucket of tokens, the default first.

`python -m rosa_kernels.tune` times a list on the GPU at hand and remembers the winner. Nothing is tuned during a call,
so that the same inputs give the same bits in every process, and a CUDA graph can be captured after one warm call.
"""

import dataclasses
import functools
from dataclasses import dataclass, field

import torch

from rosa_kernels.backends.gpu import device_rates, hardware

LINEAR, SHRINK, LORA_GRAD = "linear", "shrink", "outer"
SDDMM_TILED, SDDMM_BLOCKS = "sddmm_tiled", "sddmm_blocks"
"""The kernels' names in the files of tune, where lora_grad is "outer"."""
TOKEN_BUCKETS = (16, 32, 64, 512, 2**31)
"""The largest number of tokens of each bucket."""


@dataclass(frozen=True)
class Config:
    blocks: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int

    @functools.cached_property
    def label(self) -> str:
        blocks = ",".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{blocks},warps={self.num_warps},stages={self.num_stages}"

    def with_blocks(self, **blocks: int) -> "Config":
        return dataclasses.replace(self, blocks=self.blocks | blocks)

    def __getitem__(self, name: str) -> int:
        return self.blocks[name]


def token_bucket(tokens: int) -> int:
    return next(index for index, largest in enumerate(TOKEN_BUCKETS) if tokens <= largest)


def _matmul(m, n, k, warps, stages):
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


def _room(architecture: str) -> int:
    """KiB of shared memory for the tiles of one program."""
    return hardware.SHARED_MEMORY[architecture] // 1024


def dots_read_registers(architecture: str) -> bool:
    """Whether operands of a dot fill registers beside its result, of which a thread has 255 at most.

    The tensor cores of sm_90 and sm_100 read shared memory, and a thread of AMD's CDNA has 512 registers.
    """
    return architecture in ("sm_80", "sm_86", "sm_89", "sm_120", "other")


def _stages(architecture: str) -> int:
    """Tiles of a loop that are on their way at once. On AMD one waits in registers while another is multiplied."""
    if architecture.startswith("gfx") or _room(architecture) < 99:
        return 2
    return 4 if _room(architecture) > 200 else 3


def _linear(architecture: str, element_size: int, bucket: int) -> list[Config]:
    if architecture == "interpreter":
        return [_matmul(16 if bucket < 2 else 32, 32, 32, 4, 1)]
    block_m = (16, 32, 64, 64, 128)[bucket]
    if element_size == 4:
        return [_matmul(min(block_m, 64), 64, 16, 4, 2), _matmul(min(block_m, 32), 64, 32, 4, 2)]
    room, stages = _room(architecture), _stages(architecture)
    roomy = room > 100
    if block_m < 64:
        return [_matmul(block_m, 32, 128 if roomy else 64, 4, stages), _matmul(block_m, 64, 64, 4, stages)]
    if bucket < 4:
        return [_matmul(64, 64, 64, 4, stages), _matmul(64, 32, 64, 4, stages)]
    small = [_matmul(128, 64, 32, 4, 2), _matmul(64, 64, 32, 4, 2)]
    if not roomy:
        return [_matmul(128, 128, 32, 8, 3), *small] if room > 64 else small
    if architecture.startswith("gfx"):
        return [_matmul(128, 128, 64, 8, 2), *small]
    wide = [_matmul(128, 256, 64, 8, 3)] if room > 200 else []
    return [_matmul(128, 128, 64, 8, 3), _matmul(128, 64, 64, 4, 3), *wide]


def _shrink(architecture: str, element_size: int, bucket: int) -> list[Config]:
    if architecture == "interpreter":
        return [Config({"BLOCK_M": 16 if bucket < 2 else 32, "BLOCK_K": 32}, 4, 1)]
    block_m = (16, 32, 64, 64, 64)[bucket]
    block_k = 64 if element_size == 2 else 32
    return [
        Config({"BLOCK_M": block_m, "BLOCK_K": block_k}, 4, 3 if element_size == 2 else 2),
        Config({"BLOCK_M": min(32, block_m), "BLOCK_K": 2 * block_k}, 4, 2),
    ]


def _lora_grad(architecture: str, element_size: int, bucket: int) -> list[Config]:
    if architecture == "interpreter":
        return [Config({"BLOCK_T": 16, "BLOCK_F": 32}, 4, 1)]
    block_t = 16 if bucket == 0 else 32
    if element_size == 4:
        return [Config({"BLOCK_T": 32, "BLOCK_F": 64}, 4, 2)]
    return [
        Config({"BLOCK_T": block_t, "BLOCK_F": 128}, 4, 3),
        Config({"BLOCK_T": 2 * block_t, "BLOCK_F": 128}, 4, 2),
        Config({"BLOCK_T": 2 * block_t, "BLOCK_F": 64}, 4, 3),
    ]


def _sddmm_tiled(architecture: str, element_size: int, bucket: int) -> list[Config]:
    if architecture == "interpreter":
        return [Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_T": 16}, 4, 1)]
    if element_size == 4:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": 16}, 4, 2)]
    block_t = (16, 32, 64, 64, 64)[bucket]
    if _room(architecture) < 100:
        return [Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_T": min(32, block_t)}, 4, 2)]
    return [
        Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": block_t}, 8, 3),
        Config({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_T": block_t}, 4, 3),
    ]


def _sddmm_blocks(architecture: str, element_size: int, bucket: int) -> list[Config]:
    """For a row of 16 x 16 blocks. Gathered columns take a pointer for each element, so the tiles are small."""
    if architecture == "interpreter":
        return [Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_T": 16}, 4, 1)]
    block_t = 16 if element_size == 4 or bucket == 0 else 32
    return [
        Config({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_T": block_t}, 4, 2),
        Config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_T": block_t}, 4, 2),
    ]


_LISTS = {LINEAR: _linear, SHRINK: _shrink, LORA_GRAD: _lora_grad}
_LISTS |= {SDDMM_TILED: _sddmm_tiled, SDDMM_BLOCKS: _sddmm_blocks}


@functools.cache
def configs(kernel: str, architecture: str, element_size: int, bucket: int) -> tuple[Config, ...]:
    """The list to choose from. element_size is that of x, in bytes."""
    return tuple(_LISTS[kernel](architecture, element_size, bucket))


def choose(kernel: str, device: torch.device, dtype: torch.dtype, tokens: int) -> Config:
    """The configuration that was the fastest on this GPU where it was tuned, else the first of the list."""
    bucket = token_bucket(tokens)
    listed = configs(kernel, hardware.architecture(device), dtype.itemsize, bucket)
    label = device_rates.tuned_label(device, kernel, dtype.itemsize, bucket)
    return next((config for config in listed if config.label == label), listed[0])
