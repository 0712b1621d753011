"""A fuzz case: one call of the package, drawn from one integer, and its tensors."""

import math
import random
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from cases import BF16, FP16, FP32, FP64, LAYOUTS, LinearCase, laid_out
from rosa_kernels import CSRPattern

LINEAR_NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "values")
CALLS = {
    "rosa_linear": (6, LINEAR_NAMES),
    "lora_linear": (4, ("x", "weight", "bias", "lora_A", "lora_B")),
    "sparse_linear": (4, ("x", "weight", "bias", "values")),
    "rosa_delta": (4, ("x", "lora_A", "lora_B", "values")),
    "spmm": (2, ("x", "values")),
    "sddmm": (2, ("dy", "x")),
    "csr_add": (1, ("weight", "values")),
    "LoRALinear": (1, ("x", "lora_A", "lora_B")),
    "RoSALinear": (2, ("x", "lora_A", "lora_B", "values")),
    "RoSAEmbedding": (2, ("lora_A", "lora_B", "values")),
}
"""call -> (how often it is drawn, the tensors that may need a gradient)."""

FEW = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17)
SOME = (23, 31, 32, 33, 37, 47, 48, 49, 61, 63, 64, 65, 67, 79, 96, 97, 127, 128, 129, 131)
MANY = (191, 193, 255, 256, 257)
HUGE = (4095, 4096, 4097)
RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65)
MOST_PRODUCTS = 1_500_000
"""tokens x in_features x out_features; the second derivatives take a tenth."""

X_LAYOUTS = (*LAYOUTS, "flipped", "every_third", "one_feature", "one_number")
REPEATING = ("expanded", "one_feature", "one_number")  # several elements lie at one address


@dataclass(frozen=True)
class Structure:
    """What S consists of. size: the side of a block."""

    kind: str
    density: float = 0.0
    size: int = 1

    def pattern(self, shape: tuple[int, int], generator: torch.Generator) -> CSRPattern:
        if self.kind == "blocks":
            grid = tuple(-(-features // self.size) for features in shape)
            return CSRPattern.from_blocks(torch.rand(grid, generator=generator) < self.density, self.size, shape)
        if self.kind in ("rows", "columns"):
            features = shape[self.kind == "columns"]
            chosen = (torch.rand(features, generator=generator) < self.density).nonzero()[:, 0].flip(0)
            return (CSRPattern.from_rows if self.kind == "rows" else CSRPattern.from_columns)(chosen, shape)
        chances = torch.full(shape, self.density)
        if self.kind == "clustered":  # as gradients choose entries: a few rows and columns hold most of them
            weights = [torch.randn(features, generator=generator).mul(1.5).exp() for features in shape]
            chances = (self.density * torch.outer(*weights)).clamp(max=0.95)
        return CSRPattern.from_mask(torch.rand(shape, generator=generator) < chances)


@dataclass(frozen=True)
class FuzzCase:
    """linear has the sizes, and which parts there are; of RoSAEmbedding in_features are the tokens it knows."""

    seed: int
    call: str
    linear: LinearCase
    dtype: torch.dtype
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of lora_A, lora_B and values
    structure: Structure | None
    needs: tuple[str, ...]
    threads: tuple[int, int]
    training: bool = True
    backend: str = "auto"
    algorithm: str = ""  # of the CPU's, forced where it is legal
    small_pieces: bool = False
    slow_bfloat16: bool = False  # as if the library had no instructions for it
    library_gemm: bool = False  # as if the library's dense products were the faster ones
    special: float | None = None  # what one element of x is
    twice: bool = False  # compare second derivatives
    padding_idx: int | None = None

    @property
    def dropout_p(self) -> float:
        """What acts on this call."""
        return self.linear.dropout_p if self.training and self.linear.r else 0.0

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if name not in ("seed", "linear")}
        parts = [f"{name}={value}" for name, value in shown.items() if value not in (None, "", False)]
        return f"seed {self.seed}: {self.linear.id}; {', '.join(parts)}".replace("torch.", "")


def draw(seed: int) -> FuzzCase:
    d = random.Random(seed)
    call = d.choices(list(CALLS), [often for often, _ in CALLS.values()])[0]
    names = CALLS[call][1]
    sides = _sizes(d, call)
    low_rank, sparse = "lora_A" in names, "values" in names or call == "sddmm"
    if call in ("rosa_delta", "RoSALinear", "RoSAEmbedding") and d.random() < 0.4:
        low_rank, sparse = d.choice([(True, False), (False, True)])
    dtype = d.choices((FP32, BF16, FP16, FP64), (38, 38, 10, 14))[0]
    layouts = [d.choice(X_LAYOUTS) if d.random() < 0.5 else "contiguous" for _ in range(4)]
    linear = LinearCase(
        _leading(d, sides[0]),
        sides[1],
        sides[2],
        r=d.choice(RANKS) if low_rank else 0,
        pattern=None,
        base=call not in ("rosa_delta", "spmm", "sddmm"),
        bias=d.random() < 0.5,
        scaling=d.choice((0.75, 1.0, -2.0, 16.0, 1e-3, 0.0)),
        dropout_p=d.choice((0.1, 0.5, 0.9, 1.0)) if call != "RoSAEmbedding" and d.random() < 0.3 else 0.0,
        **dict(zip(("x_layout", "dy_layout", "weight_layout", "adapter_layout"), layouts)),
    )
    products = math.prod(sides)
    dtypes = tuple(d.choice((FP32, BF16, FP16, FP64)) if d.random() < 0.35 else dtype for _ in range(3))
    if call in ("LoRALinear", "RoSALinear", "RoSAEmbedding"):  # as the layers make them
        dtypes = (dtype if dtype == FP64 else FP32,) * 3
    present = [n for n in names if not (n.startswith("lora") and not low_rank or n == "values" and not sparse)]
    present = [n for n in present if n != "bias" or linear.bias]
    special = call not in ("csr_add", "RoSAEmbedding") and layouts[0] not in REPEATING and d.random() < 0.1
    twice = not special and products <= MOST_PRODUCTS // 10 and d.random() < 0.2
    if call == "RoSAEmbedding" and sides[0] == 0:
        twice = False  # PyTorch's own embedding of no tokens cannot be differentiated twice
    return FuzzCase(
        seed=seed,
        call=call,
        linear=linear,
        dtype=dtype,
        dtypes=dtypes,
        structure=_structure(d, call) if sparse else None,
        needs=tuple(n for n in present if twice or d.random() < 0.6),
        threads=tuple(d.sample((1, 2, 3, 5), 2)),
        training=d.random() < 0.9,
        backend="auto" if d.random() < 0.85 else "reference",
        algorithm=d.choice(("MERGED", "GEMMS", "KERNELS", "FUSED", "DECODE")) if d.random() < 0.5 else "",
        small_pieces=d.random() < 0.3,
        slow_bfloat16=d.random() < 0.2,
        special=d.choice((nan, math.inf, -math.inf)) if special else None,
        twice=twice,
        padding_idx=d.randrange(sides[1]) if call == "RoSAEmbedding" and d.random() < 0.4 else None,
        library_gemm=d.random() < 0.3,
    )


def _sizes(d: random.Random, call: str) -> list[int]:
    """tokens, in_features and out_features. One in thirty cases has a side of some 4097, the others then are small."""
    if d.random() < 1 / 30:
        sides = [d.choice(FEW[:9]), d.choice(FEW[:9]), d.choice(HUGE)]
        d.shuffle(sides)
        return sides
    while True:
        sides = [d.choice(d.choices((FEW, SOME, MANY), (5, 4, 1))[0]) if d.random() > 0.03 else 0 for _ in range(3)]
        if call == "RoSAEmbedding" and sides[1] == 0:
            continue  # there is no token to look up
        if math.prod(sides) <= MOST_PRODUCTS:
            return sides


def _leading(d: random.Random, tokens: int) -> tuple[int, ...]:
    """Up to three sizes whose product is the number of tokens."""
    if tokens == 1 and d.random() < 0.3:
        return ()
    leading = [tokens]
    while len(leading) < 3 and d.random() < 0.35:
        divisor = d.choice([n for n in range(1, max(1, leading[-1]) + 1) if leading[-1] % n == 0])
        leading[-1:] = [divisor, leading[-1] // divisor]
    return tuple(leading)


def _structure(d: random.Random, call: str) -> Structure:
    if call == "RoSAEmbedding":
        return Structure("rows", d.choice((0.0, 0.1, 0.5, 1.0)))
    kind = d.choices(("uniform", "clustered", "rows", "columns", "blocks", "empty", "full"), (4, 4, 3, 3, 5, 1, 1))[0]
    if kind in ("empty", "full"):
        return Structure("uniform", float(kind == "full"))
    density = d.choice((0.01, 0.05, 0.2, 0.5)) if kind in ("uniform", "clustered") else d.choice((0.1, 0.4, 0.8))
    return Structure(kind, density, d.choice((1, 2, 3, 4, 8, 15, 16, 17, 32, 48)) if kind == "blocks" else 1)


@dataclass
class FuzzInputs:
    """Tensors by name, "dy" among them, which is the gradient of the result: of sddmm it has values' place and name."""

    tensors: dict[str, Tensor]
    pattern: CSRPattern | None
    ids: Tensor | None = None  # of RoSAEmbedding

    def __getattr__(self, name: str) -> Tensor | None:
        """None for a part that the case leaves out, as oracle.py reads them."""
        if name in (*LINEAR_NAMES, "dy"):
            return self.tensors.get(name)
        raise AttributeError(name)


def make_inputs(case: FuzzCase) -> FuzzInputs:
    """Each part of y is of order one, so that an error in any part shows."""
    generator = torch.Generator().manual_seed(case.seed)
    c = case.linear
    inputs, outputs, r = c.in_features, c.out_features, c.r
    fan_in = max(1, inputs) ** -0.5

    def normal(*shape, scale=1.0, dtype=case.dtype, layout="contiguous"):
        drawn = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return placed(drawn.to(dtype), layout)

    tensors = {"x": normal(*c.leading, inputs, layout=c.x_layout)}
    if c.base:
        tensors["weight"] = normal(outputs, inputs, scale=fan_in, layout=c.weight_layout)
    if c.base and c.bias and case.call not in ("csr_add", "RoSAEmbedding"):
        tensors["bias"] = normal(outputs, layout=_of_a_vector(c.weight_layout))
    if r:
        tensors["lora_A"] = normal(r, inputs, scale=fan_in, dtype=case.dtypes[0], layout=c.adapter_layout)
        tensors["lora_B"] = normal(outputs, r, scale=r**-0.5, dtype=case.dtypes[1], layout=c.adapter_layout)
    pattern = None
    if case.structure is not None:
        pattern = case.structure.pattern((outputs, inputs), generator)
        if case.call == "RoSAEmbedding":
            rows = torch.rand(inputs, generator=generator) < case.structure.density
            if case.padding_idx is not None:
                rows[case.padding_idx] = False
            pattern = CSRPattern.from_rows(rows.nonzero()[:, 0], (inputs, outputs))
        scale = max(1.0, pattern.density * inputs) ** -0.5
        dtype = case.dtype if case.call == "sddmm" else case.dtypes[2]
        tensors["values"] = normal(pattern.nnz, scale=scale, dtype=dtype, layout=_of_a_vector(c.adapter_layout))
    of_result = (outputs, inputs) if case.call == "csr_add" else (*c.leading, outputs)
    tensors["dy"] = normal(*of_result, layout=c.dy_layout)
    ids = None
    if case.call == "RoSAEmbedding":
        ids = torch.randint(inputs, c.leading, generator=generator)
        tensors["weight"] = tensors["weight"].T
        del tensors["x"]
    return FuzzInputs(tensors, pattern, ids)


def _of_a_vector(layout: str) -> str:
    return "strided" if layout in ("transposed", "padded") else layout


def placed(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a memory layout: those of cases.py, and more. What lies between its elements is NaN."""
    if layout in LAYOUTS:
        return laid_out(tensor, layout)
    if layout == "flipped":  # torch has no negative strides: a flipped copy of what lay the other way round
        return tensor.flip(0).clone().flip(0) if tensor.dim() else tensor
    if layout == "every_third":
        return tensor.new_full((3 * tensor.shape[0], *tensor.shape[1:]), nan)[2::3].copy_(tensor)
    if tensor.numel() == 0:
        return tensor
    if layout == "one_feature":
        return tensor[..., :1].expand(tensor.shape)
    return tensor.flatten()[0].expand(tensor.shape)  # "one_number", as y.sum().backward() hands over
