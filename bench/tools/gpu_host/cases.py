"""The calls whose host time is measured, and the algorithm of each: the one that an H100 would take at real sizes.

The tensors are tiny, so that the CPU's arithmetic takes no time. The heuristics are asked about the call at its real
size. A case may also name the algorithm of y and dx, or of dS, so that each algorithm is measured.
"""

from dataclasses import dataclass

import torch

from layers import DTYPES
from rosa_kernels import CSRPattern
from rosa_kernels.backends.cuda.heuristics import LinearAlgorithm as CudaLinear
from rosa_kernels.backends.triton.heuristics import LinearAlgorithm as TritonLinear

TOKENS, RANK = 2, 16
"""Of the tiny tensors."""
MANY, FEW = 8192, 64
FEATURES = 4096


@dataclass(frozen=True)
class Case:
    op: str
    """lora, rosa, or rows; rosa_delta is a rosa without its base layer."""
    dtypes: str
    """As in layers.DTYPES."""
    backend: str
    algorithm: str = ""
    """A word for the table."""
    tokens: int = MANY
    density: float = 0.01
    structure: str = "unstructured"
    y: tuple | None = None
    """The algorithm of y, or None for the cheapest on an H100. So for dx, and for dS by its name."""
    dx: tuple | None = None
    dvalues: str | None = None
    dropout_p: float = 0.0
    has_base: bool = True
    has_module: bool = True
    has_step: bool = True
    """False where the algorithm of y keeps no H for a backward."""

    @property
    def name(self) -> str:
        few = "few tokens" if self.tokens == FEW else ""
        return " ".join(filter(None, (self.op, self.algorithm, few, self.dtypes, self.backend)))

    @property
    def has_sparse(self) -> bool:
        return self.op != "lora"

    @property
    def in_features(self) -> int:
        """Of the tiny layer: few, so that B A takes no time, and more where blocks must not be whole rows."""
        return 32 if self.structure == "block" else 8

    @property
    def out_features(self) -> int:
        """Another number, so that it tells y from dx."""
        return 48 if self.structure == "block" else 16

    @property
    def nnz(self) -> int:
        """Of the real layer."""
        return round(self.density * FEATURES) * FEATURES if self.has_sparse else 0


def tiny_pattern(case: Case) -> CSRPattern:
    shape, structure = (case.out_features, case.in_features), case.structure
    if structure == "row":
        return CSRPattern.from_rows(torch.tensor([1, 7, 12]), shape)
    if structure == "column":
        return CSRPattern.from_columns(torch.tensor([3, 4, 7]), shape)
    if structure == "block":
        return CSRPattern.from_blocks(torch.eye(3, 2, dtype=torch.bool), 16, shape)
    return CSRPattern.random(shape, 0.05, seed=0)


class TinyLayer:
    """The tensors of a case."""

    def __init__(self, case: Case):
        dtype, adapter_dtype = DTYPES[case.dtypes]
        in_features, out_features = case.in_features, case.out_features
        generator = torch.Generator().manual_seed(0)

        def normal(*size, dtype=dtype):
            return torch.randn(size, generator=generator).to(dtype)

        self.x = normal(TOKENS, in_features).requires_grad_()
        self.dy = normal(TOKENS, out_features)
        self.weight = normal(out_features, in_features) if case.has_base else None
        self.bias = normal(out_features) if case.has_base else None
        self.lora_A = normal(RANK, in_features, dtype=adapter_dtype).requires_grad_()
        self.lora_B = normal(out_features, RANK, dtype=adapter_dtype).requires_grad_()
        self.pattern = tiny_pattern(case) if case.has_sparse else None
        self.values = normal(self.pattern.nnz, dtype=adapter_dtype).requires_grad_() if case.has_sparse else None

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [self.x, self.lora_A, self.lora_B, *([] if self.values is None else [self.values])]


def _triton_cases() -> list[Case]:
    by_kernel, by_library = TritonLinear("kernel", "before"), TritonLinear("library", "library")
    inside = TritonLinear("kernel", "inside")
    cases = [
        Case("lora", "bf16", "triton", y=by_library, dx=by_library),
        Case("lora", "bf16-fp32", "triton"),
        Case("lora", "fp32", "triton"),
        Case("lora", "bf16", "triton", "dropout", dropout_p=0.1),
        Case("lora", "bf16", "triton", tokens=FEW),
        Case("lora", "bf16", "triton", "H in the kernel", tokens=FEW, y=inside, has_step=False),
        Case("lora", "bf16", "triton", "base in the kernel", tokens=FEW, y=TritonLinear("kernel", "before"),
             dx=TritonLinear("kernel", "known")),
        Case("lora", "bf16", "triton", "H by its kernel", y=by_kernel, dx=TritonLinear("library", "known")),
        Case("rosa", "bf16", "triton"),
        Case("rosa", "bf16-fp32", "triton"),
        Case("rosa", "fp32", "triton"),
        Case("rosa", "bf16", "triton", "0.1 %", density=0.001),
        Case("rosa", "bf16-fp32", "triton", "0.1 %", density=0.001),
    ]  # fmt: skip
    for sparse, dvalues, tokens in (
        ("gather", "entries", FEW),
        ("gather", "tiled", FEW),
        ("gather_transposed", "entries_transposed", MANY),
        ("dense", "library", MANY),
    ):
        y, dx = TritonLinear("library", "before", sparse), TritonLinear("library", "known", sparse)
        cases.append(Case("rosa", "bf16", "triton", f"{sparse} {dvalues}", tokens=tokens, y=y, dx=dx, dvalues=dvalues))
    cases += [
        Case("rosa", "bf16", "triton", "delta alone", has_base=False, has_module=False),
        Case("rosa", "bf16", "triton", "columns", structure="column"),
        Case("rosa", "bf16", "triton", "blocks", structure="block"),
        Case("rows", "bf16", "triton", structure="row"),
        Case("rows", "bf16-fp32", "triton", structure="row"),
    ]
    return cases


def _cuda_cases() -> list[Case]:
    library, kernel = CudaLinear("library", "library"), CudaLinear("library", "kernel")
    from_shared, from_global = CudaLinear("library", "kernel", "shared"), CudaLinear("library", "kernel", "global")
    return [
        Case("lora", "bf16", "cuda", y=library, dx=library),
        Case("lora", "bf16-fp32", "cuda"),
        Case("lora", "fp32", "cuda"),
        Case("lora", "bf16", "cuda", "dropout", dropout_p=0.1),
        Case("lora", "bf16", "cuda", tokens=FEW),
        Case("lora", "bf16", "cuda", "by kernels", y=kernel, dx=kernel),
        Case("rosa", "bf16", "cuda"),
        Case("rosa", "bf16-fp32", "cuda"),
        Case("rosa", "fp32", "cuda"),
        Case("rosa", "bf16", "cuda", "0.1 %", density=0.001),
        Case("rosa", "bf16-fp32", "cuda", "0.1 %", density=0.001),
        Case("rosa", "bf16", "cuda", "shared", y=from_shared, dx=from_shared, dvalues="entries_transposed"),
        Case("rosa", "fp32", "cuda", "global", y=from_global, dx=from_global, dvalues="library"),
        Case("rosa", "bf16", "cuda", "delta alone", has_base=False, has_module=False),
        Case("rosa", "bf16", "cuda", "columns", structure="column"),
        Case("rows", "bf16", "cuda", structure="row"),
        Case("rows", "bf16-fp32", "cuda", structure="row"),
    ]


CASES = [*_triton_cases(), *_cuda_cases()]
