"""The case lists, one an op, that serve every backend and dtype: sizes, ranks, patterns, layouts, mixes of dtypes."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rosa_kernels import CSRPattern


def _random(density):
    return lambda shape: CSRPattern.random(shape, density, seed=11)


def _from_mask(chosen):
    """A pattern of the true entries after `chosen(mask)` has edited a mask of falses."""

    def build(shape):
        mask = torch.zeros(shape, dtype=torch.bool)
        chosen(mask)
        return CSRPattern.from_mask(mask)

    return build


def _almost_full(mask):
    mask.fill_(True)
    mask[mask.shape[0] // 2, mask.shape[1] // 2] = False


def _last_entry(mask):
    mask[-1, -1] = True


def _empty_rows(mask):
    """Rows 0, 3, 4, 7, ... and the last one empty, the others of very different lengths."""
    generator = torch.Generator().manual_seed(5)
    for row in range(1, mask.shape[0] - 1):
        if row % 4 in (1, 2):
            mask[row] = torch.rand(mask.shape[1], generator=generator) < (0.9 if row % 8 == 1 else 0.1)


def _every_third(size):
    return torch.arange(0, size, 3).flip(0)


def _alternating(shape: tuple[int, int], size: int) -> Tensor:
    """A checkerboard of blocks, the same number in each row of blocks."""
    down, across = (torch.arange(-(-features // size)) for features in shape)
    return (down[:, None] % 2 == across % 2) & (across < shape[1] // (2 * size) * 2)


PATTERNS = {
    "none": _random(0.0),
    "sparse": _random(0.01),
    "random": _random(0.1),
    "half": _random(0.5),
    "full": _random(1.0),
    "almost_full": _from_mask(_almost_full),
    "last_entry": _from_mask(_last_entry),
    "empty_rows": _from_mask(_empty_rows),
    "rows": lambda shape: CSRPattern.from_rows(_every_third(shape[0]), shape),
    "columns": lambda shape: CSRPattern.from_columns(_every_third(shape[1]), shape),
    "blocks": lambda shape: CSRPattern.from_blocks(
        torch.rand(-(-shape[0] // 16), -(-shape[1] // 16), generator=torch.Generator().manual_seed(3)) < 0.4, 16, shape
    ),
    # neighbouring rows of equal length whose columns differ: kernels that take rows in groups must look at the columns
    "alternating_blocks": lambda shape: CSRPattern.from_blocks(_alternating(shape, 3), 3, shape),
}
"""name -> CSRPattern of a given (out_features, in_features)."""

LAYOUTS = ("contiguous", "transposed", "strided", "padded", "offset", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; what lies between them is NaN. "expanded" repeats the first entry."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    *outer, last = tensor.shape
    if layout == "strided":
        view = tensor.new_full((*outer, 2 * last), math.nan)[..., ::2]
    elif layout == "padded":
        view = tensor.new_full((*outer, last + 3), math.nan)[..., 1 : last + 1]
    elif layout == "offset":
        view = tensor.new_full((tensor.numel() + 1,), math.nan)[1:].view(tensor.shape)
    return view.copy_(tensor)


@dataclass(frozen=True)
class LinearCase:
    """One call of rosa_linear or of what it specialises to: r = 0 leaves out the low-rank part, pattern None S."""

    leading: tuple[int, ...] = (9,)
    in_features: int = 33
    out_features: int = 20
    r: int = 8
    pattern: str | None = "random"
    base: bool = True
    bias: bool = True
    scaling: float = 0.75
    dropout_p: float = 0.0
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    adapter_layout: str = "contiguous"
    lora_dtype: torch.dtype | None = None
    values_dtype: torch.dtype | None = None
    zero_values: str = ""

    @property
    def tokens(self) -> int:
        return math.prod(self.leading)

    @property
    def id(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("leading", "in_features", "out_features")
            and getattr(self, field.name) != field.default
        ]
        leading = "x".join(map(str, self.leading)) or "1-D"
        return ",".join([f"T{leading}-I{self.in_features}-O{self.out_features}", *changed]).replace("torch.", "")


@dataclass
class LinearInputs:
    """The tensors of a LinearCase; None where the case leaves them out."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    values: Tensor | None
    dy: Tensor
    pattern: CSRPattern | None

    DIFFERENTIABLE = ("x", "weight", "bias", "lora_A", "lora_B", "values")

    def tensors(self) -> dict[str, Tensor]:
        """Those that can have a gradient, by name."""
        named = {name: getattr(self, name) for name in self.DIFFERENTIABLE}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def leaves(self, needing: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
        """Copies of them, of which those named need a gradient."""
        return {name: t.detach().clone().requires_grad_(name in needing) for name, t in self.tensors().items()}


CPU = torch.device("cpu")


def make_inputs(case: LinearCase, dtype: torch.dtype, device: torch.device = CPU, seed: int = 0) -> LinearInputs:
    """Each part of y is of order one, so that an error in any part shows. The numbers are the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, to=dtype, layout="contiguous"):
        drawn = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return laid_out(drawn.to(to or dtype).to(device), layout)

    inputs, outputs, r = case.in_features, case.out_features, case.r
    fan_in = max(1, inputs) ** -0.5
    pattern = None if case.pattern is None else PATTERNS[case.pattern]((outputs, inputs)).to(device)
    values = None
    if pattern is not None:
        scale = max(1.0, pattern.density * inputs) ** -0.5
        values = normal(pattern.nnz, scale=scale, to=case.values_dtype, layout=_one_dimensional(case.adapter_layout))
        if case.zero_values:
            values[:: 1 if case.zero_values == "all" else 2] = 0
    adapter = {"to": case.lora_dtype, "layout": case.adapter_layout}
    return LinearInputs(
        x=normal(*case.leading, inputs, layout=case.x_layout),
        weight=normal(outputs, inputs, scale=fan_in, layout=case.weight_layout) if case.base else None,
        bias=normal(outputs, layout=_one_dimensional(case.weight_layout)) if case.base and case.bias else None,
        lora_A=normal(r, inputs, scale=fan_in, **adapter) if r else None,
        lora_B=normal(outputs, r, scale=r**-0.5, **adapter) if r else None,
        values=values,
        dy=normal(*case.leading, outputs, layout=case.dy_layout),
        pattern=pattern,
    )


def _one_dimensional(layout: str) -> str:
    return "strided" if layout in ("transposed", "padded") else layout


FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# Merging pays where tokens > I O / (I + O): 56 tokens at 130 x 100, 33 at 65 x 65, 130 at 300 x 230.
LINEAR_CASES = [
    LinearCase(),
    # tokens, around every multiple of a vector or tile
    *(LinearCase((t,), 130, 100, 16) for t in (0, 1, 2, 3, 5, 16, 31, 63, 64, 65, 127, 128, 129, 200)),
    LinearCase((40,), 300, 230, 16, "sparse"),
    LinearCase((260,), 300, 230, 16, "sparse"),
    # features that are a multiple of nothing
    *(
        LinearCase((t,), i, o, 3, "half")
        for t in (7, 70)
        for i, o in ((1, 1), (1, 17), (17, 1), (3, 65), (65, 3), (65, 65))
    ),
    LinearCase((5,), 0, 7, 2, "none"),
    LinearCase((5,), 7, 0, 2, "none"),
    # ranks
    *(LinearCase((t,), 65, 100, r) for t in (6, 66) for r in (1, 2, 3, 8, 16, 17, 33, 64, 100)),
    # patterns, below and above merging
    *(LinearCase((t,), 130, 100, 4, pattern) for t in (10, 90) for pattern in PATTERNS),
    *(LinearCase((t,), 130, 100, 4, zero_values=zeros) for t in (10, 90) for zeros in ("some", "all")),
    # parts left out
    *(
        LinearCase((t,), 65, 33, 0, pattern)
        for t in (6, 66)
        for pattern in ("none", "random", "rows", "columns", "blocks")
    ),
    *(LinearCase((t,), 65, 33, 5, None) for t in (6, 66)),
    *(LinearCase((t,), 65, 33, bias=False) for t in (6, 66)),
    *(LinearCase((t,), 65, 33, r, p, base=False) for t in (6, 66) for r, p in ((4, "random"), (4, None), (0, "rows"))),
    # scaling
    *(LinearCase((t,), scaling=s) for t in (6, 66) for s in (0.0, -2.0, 16.0)),
    # leading dimensions
    *(LinearCase(leading, 34, 21) for leading in ((), (1, 1), (2, 3), (5, 1, 13), (2, 3, 2, 7), (3, 0, 2), (4, 20))),
    # layouts
    *(LinearCase((t,), 66, 35, x_layout=layout) for t in (7, 70) for layout in LAYOUTS[1:]),
    *(LinearCase((t,), 66, 35, dy_layout=layout) for t in (7, 70) for layout in LAYOUTS[1:]),
    *(LinearCase((t,), 66, 35, weight_layout=layout) for t in (7, 70) for layout in LAYOUTS[1:]),
    *(LinearCase((t,), 66, 35, adapter_layout=layout) for t in (7, 70) for layout in LAYOUTS[1:]),
    *(
        LinearCase((3, 4, 9), 66, 35, x_layout=a, dy_layout=b)
        for a, b in (("transposed", "strided"), ("padded", "expanded"))
    ),
    *(
        LinearCase((70,), 66, 35, 0, "rows", x_layout=a, dy_layout=b)
        for a, b in (("transposed", "padded"), ("strided", "expanded"))
    ),
    # mixed dtypes
    *(LinearCase((t,), 130, 100, 16, lora_dtype=d, values_dtype=d) for t in (10, 90) for d in (FP32, BF16, FP16, FP64)),
    *(
        LinearCase((t,), 130, 100, 16, lora_dtype=a, values_dtype=v)
        for t in (10, 90)
        for a, v in ((FP32, BF16), (BF16, FP32))
    ),
    # dropout
    *(LinearCase((t,), 66, 35, dropout_p=p) for t in (7, 70) for p in (0.1, 0.5, 1.0)),
    LinearCase((2, 35), 67, 35, 5, None, dropout_p=0.3, x_layout="transposed"),
    LinearCase((70,), 67, 35, 16, "rows", dropout_p=0.3, lora_dtype=FP32, values_dtype=FP32),
]


@dataclass(frozen=True)
class SparseCase:
    """One call of spmm, sddmm or csr_add."""

    leading: tuple[int, ...] = (9,)
    in_features: int = 33
    out_features: int = 20
    pattern: str = "random"
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    values_dtype: torch.dtype | None = None

    id = LinearCase.id
    tokens = LinearCase.tokens

    def as_linear(self) -> LinearCase:
        """The same tensors as a linear case makes; its weight takes x's layout (csr_add)."""
        fields = dataclasses.asdict(self) | {"weight_layout": self.x_layout}
        return LinearCase(**fields, r=0, bias=False)


_SPARSE_SHARED = [
    SparseCase(),
    *(SparseCase((t,), 130, 100, pattern) for t in (3, 100) for pattern in PATTERNS),
    *(SparseCase((t,), i, o, "half") for t in (5, 65) for i, o in ((1, 1), (1, 17), (17, 1), (3, 65), (65, 3))),
    *(SparseCase((70,), 66, 35, x_layout=layout) for layout in LAYOUTS[1:]),
    *(SparseCase((70,), 66, 35, pattern, "transposed") for pattern in ("rows", "columns", "blocks")),
    *(SparseCase((t,), 66, 35, values_dtype=d) for t in (5, 70) for d in (FP32, BF16, FP16, FP64)),
]
_TOKENS = [
    *(SparseCase((t,), 130, 100, "sparse") for t in (0, 1, 2, 63, 64, 65, 129, 300)),
    *(SparseCase(leading, 34, 21) for leading in ((), (2, 3), (5, 1, 13), (2, 3, 2, 7), (3, 0, 2))),
]
SPMM_CASES = [*_SPARSE_SHARED, *_TOKENS]
SDDMM_CASES = [
    *_SPARSE_SHARED,
    *_TOKENS,
    *(SparseCase((70,), 66, 35, dy_layout=layout) for layout in LAYOUTS[1:]),
    *(
        SparseCase((3, 4, 9), 66, 35, x_layout=a, dy_layout=b)
        for a, b in (("transposed", "strided"), ("padded", "expanded"))
    ),
]
CSR_ADD_CASES = [case for case in _SPARSE_SHARED if case.leading != (100,)]
