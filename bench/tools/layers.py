"""The shapes of a layer that the races share, and a layer's tensors."""

import functools
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

import torch

import rosa_kernels as rk
from hand_written import frozen_step

RANK, DENSITY, SCALING = 16, 0.01, 2.0


@dataclass(frozen=True)
class Shape:
    out_features: int
    in_features: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}x{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The shape that a command's argument names."""
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
        if not sizes:
            raise ArgumentTypeError(f"expected out_features x in_features x tokens as in 768x768x4096, got {text}")
        return cls(*map(int, sizes.groups()))


STEP_SHAPES = [Shape(768, 768, 4096), Shape(3072, 768, 4096), Shape(4096, 4096, 2048)]

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
"""Each name stands for the dtype of x and the weight, and the dtype of the adapters."""


@functools.lru_cache(maxsize=16)
def _random_pattern(shape: tuple[int, int], density: float, device: str) -> rk.CSRPattern:
    """The pattern is kept, because many races share it and choosing among 16 million places takes seconds."""
    return rk.CSRPattern.random(shape, density, seed=0).to(device)


class Layer:
    """A frozen linear layer with LoRA and a sparse S. Its x, lora_A, lora_B and values want gradients."""

    def __init__(
        self, shape: Shape, dtypes: str, structure: str = "unstructured", density: float = DENSITY, device: str = "cpu"
    ):
        self.dtype, adapter_dtype = DTYPES[dtypes]
        generator = torch.Generator(device).manual_seed(0)
        out_features, in_features, tokens = shape.out_features, shape.in_features, shape.tokens

        def normal(*size, dtype=self.dtype, scale=1.0):
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        shuffled = torch.randperm(out_features, generator=generator, device=device)
        self.rows = shuffled[: max(1, round(density * out_features))].sort().values
        if structure == "row":
            self.pattern = rk.CSRPattern.from_rows(self.rows, (out_features, in_features))
        else:
            self.pattern = _random_pattern((out_features, in_features), density, device)
        self.x = normal(tokens, in_features).requires_grad_()
        self.dy = normal(tokens, out_features)
        self.weight = normal(out_features, in_features, scale=in_features**-0.5)
        self.bias = normal(out_features)
        self.lora_A = normal(RANK, in_features, dtype=adapter_dtype, scale=in_features**-0.5).requires_grad_()
        self.lora_B = normal(out_features, RANK, dtype=adapter_dtype, scale=RANK**-0.5).requires_grad_()
        self.values = normal(self.pattern.nnz, dtype=adapter_dtype, scale=in_features**-0.5).requires_grad_()

    @property
    def linear(self):
        return self.x, self.weight, self.bias

    @property
    def lora(self):
        return self.lora_A, self.lora_B, SCALING

    def frozen_step(self):
        """The layer's own two GEMMs, forward and dx, on tensors that want no gradients."""
        x = self.x.detach()
        return lambda: frozen_step(x, self.weight, self.bias, self.dy)
