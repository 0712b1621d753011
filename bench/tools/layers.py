"""The shapes that the design names and the tensors of a layer."""

import functools
from dataclasses import dataclass

import torch

import rosa_kernels as rk
from naive import frozen_step

RANK, DENSITY, SCALING = 16, 0.01, 2.0


@dataclass(frozen=True)
class Shape:
    out_features: int
    in_features: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}x{self.tokens}"


STEP_SHAPES = [Shape(768, 768, 4096), Shape(3072, 768, 4096), Shape(4096, 4096, 2048)]

DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
"""name -> dtype of x and weight, dtype of the adapters."""


@functools.lru_cache(maxsize=16)
def _random_pattern(shape: tuple[int, int], density: float, device: str) -> rk.CSRPattern:
    """Cached: choosing among 16 million places takes seconds, and many races share a pattern."""
    return rk.CSRPattern.random(shape, density, seed=0).to(device)


class Layer:
    """A frozen linear with a LoRA part and a CSR part; x, lora_A, lora_B and values want gradients."""

    def __init__(
        self, shape: Shape, dtypes: str, structure: str = "unstructured", density: float = DENSITY, device: str = "cpu"
    ):
        self.dtype, adapter_dtype = DTYPES[dtypes]
        generator = torch.Generator(device).manual_seed(0)
        outputs, inputs, tokens = shape.out_features, shape.in_features, shape.tokens

        def normal(*size, dtype=self.dtype, scale=1.0):
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        shuffled = torch.randperm(outputs, generator=generator, device=device)
        self.rows = shuffled[: max(1, round(density * outputs))].sort().values
        if structure == "row":
            self.pattern = rk.CSRPattern.from_rows(self.rows, (outputs, inputs))
        else:
            self.pattern = _random_pattern((outputs, inputs), density, device)
        self.x = normal(tokens, inputs).requires_grad_()
        self.dy = normal(tokens, outputs)
        self.weight = normal(outputs, inputs, scale=inputs**-0.5)
        self.bias = normal(outputs)
        self.lora_A = normal(RANK, inputs, dtype=adapter_dtype, scale=inputs**-0.5).requires_grad_()
        self.lora_B = normal(outputs, RANK, dtype=adapter_dtype, scale=RANK**-0.5).requires_grad_()
        self.values = normal(self.pattern.nnz, dtype=adapter_dtype, scale=inputs**-0.5).requires_grad_()

    @property
    def base(self):
        return self.x, self.weight, self.bias

    @property
    def lora(self):
        return self.lora_A, self.lora_B, SCALING

    def frozen_step(self):
        """The layer's own two GEMMs, forward and dx, on tensors that want no gradients."""
        x = self.x.detach()
        return lambda: frozen_step(x, self.weight, self.bias, self.dy)
