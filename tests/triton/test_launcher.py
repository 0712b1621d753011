"""Direct launches of compiled kernels: what Triton's own launch would have called, with the same arguments.

No GPU: a driver that stands for one compiles for sm_90, and each launch is written down in place of being made.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not launched", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from rosa_kernels.backends.triton import launcher, transpose
from rosa_kernels.backends.triton.configs import Config

BF16, FP32 = torch.bfloat16, torch.float32
BLOCKS = Config({"BLOCK_T": 64, "BLOCK_F": 64}, num_warps=4, num_stages=1)


class Driver:
    """As much of a CUDA driver as a launch asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """[(compiled kernel, grid, arguments)], in the order of the launches."""
    made = []

    def run(compiled):
        return lambda x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments: made.append(
            (compiled, (x, y, z), arguments)
        )

    before = driver._active
    driver.set_active(Driver())
    monkeypatch.setattr(CompiledKernel, "run", property(run))
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)
    monkeypatch.setattr(launcher, "_compiled", {})
    transpose.transpose_kernel.device_caches.clear()
    yield made
    transpose.transpose_kernel.device_caches.clear()
    driver._active = before


def launch_transpose(x, features=None, config=BLOCKS):
    T, features = x.shape[0], features or x.shape[1]
    out = torch.empty(features, 128, dtype=x.dtype)
    grid = (2 * -(-features // 64),)
    launcher.launch(transpose.transpose_kernel, grid, out, x, T, 128, features, *x.stride(), config=config)


CALLS = {  # each of another kind for Triton, or of the same with other numbers
    "aligned": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16)),
    "the same at another place": lambda: launch_transpose(torch.ones(80, 64, dtype=BF16)),
    "more tokens": lambda: launch_transpose(torch.zeros(81, 64, dtype=BF16)),
    "not at 16 bytes": lambda: launch_transpose(torch.zeros(80 * 64 + 1, dtype=BF16)[1:].view(80, 64)),
    "odd features": lambda: launch_transpose(torch.zeros(80, 63, dtype=BF16)),
    "one feature": lambda: launch_transpose(torch.zeros(80, 1, dtype=BF16)),
    "fp32": lambda: launch_transpose(torch.zeros(80, 64)),
    "transposed": lambda: launch_transpose(torch.zeros(64, 80, dtype=BF16).T),
    "other blocks": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16), config=BLOCKS.with_blocks(BLOCK_F=32)),
    "more warps": lambda: launch_transpose(torch.zeros(80, 64, dtype=BF16), config=Config(BLOCKS.blocks, 8, 1)),
}


def comparable(launch):
    compiled, grid, arguments = launch
    return compiled, grid, [a for a in arguments if not isinstance(a, torch.Tensor)]


def test_direct_launches_are_those_that_triton_would_make(launches, monkeypatch):
    for call in CALLS.values():
        call()
    first = list(map(comparable, launches))
    assert len(launcher._compiled) == len(CALLS) - 1  # of two the kind is the same
    assert len({id(compiled) for compiled, _, _ in first}) >= 8
    launches.clear()
    with monkeypatch.context() as patch:  # Triton's own way is out of reach
        patch.setattr(type(transpose.transpose_kernel), "run", None)
        for call in CALLS.values():
            call()
    assert list(map(comparable, launches)) == first


def test_a_direct_launch_takes_the_tensors_of_its_call(launches):
    tensors = [torch.zeros(80, 64, dtype=BF16) for _ in range(3)]
    for x in tensors:
        launch_transpose(x)
    assert [arguments[1] is x for (_, _, arguments), x in zip(launches, tensors)] == [True] * 3


def test_kinds_are_forgotten_before_they_fill_memory(launches, monkeypatch):
    monkeypatch.setattr(launcher, "_MOST_KINDS", 3)
    for tokens in range(60, 70):
        launch_transpose(torch.zeros(tokens, 64, dtype=BF16))
        assert len(launcher._compiled) <= 3
    assert len(launches) == 10
