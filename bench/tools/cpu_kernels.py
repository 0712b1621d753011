"""Each CPU kernel by itself: a call into tensors made beforehand, and the FLOPs and bytes that it cannot do without.

A kernel of S also names the plain GEMM of the same FLOPs. T is the number of tokens, O is out_features, I is
in_features, r the rank and n the nnz of S. A FLOP is a multiplication or an addition. The bytes count each operand once
from memory: x, y, dy, dx and W in x's dtype, all else in fp32 or int32. Of x, y, dy and dx they count only the cache
lines of features that the kernel needs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import rosa_kernels as rk
from layers import DENSITY, RANK, SCALING, Shape
from rosa_kernels.backends import cpu
from rosa_kernels.backends.cpu.binary import INDICES_CHECKED

_ops = torch.ops.rosa_kernels_cpu
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STRUCTURES = ("unstructured", "row", "column", "block16")
NO_DROPOUT = (None, 0, 1.0)
WORD, LINE = 4, 64  # bytes


@dataclass(frozen=True)
class Kernel:
    name: str
    run: Callable[[], object]
    flops: int
    bytes: int
    gathered: int = 0
    """The bytes of x or dy that single entries of S load from cache. An unstructured S reuses none in registers."""
    plain: Callable[[], object] | None = None
    plain_flops: int = 0


def pattern_of(structure: str, shape: Shape) -> rk.CSRPattern:
    O, I = shape.out_features, shape.in_features
    generator = torch.Generator().manual_seed(0)

    def some_of(size):
        return torch.randperm(size, generator=generator)[: max(1, round(DENSITY * size))]

    if structure == "row":
        return rk.CSRPattern.from_rows(some_of(O), (O, I))
    if structure == "column":
        return rk.CSRPattern.from_columns(some_of(I), (O, I))
    if structure == "block16":
        blocks = torch.zeros(-(-O // 16), -(-I // 16), dtype=torch.bool)
        blocks.view(-1)[some_of(blocks.numel())] = True
        return rk.CSRPattern.from_blocks(blocks, 16, (O, I))
    return rk.CSRPattern.random((O, I), DENSITY, seed=0)


class Tensors:
    """The tensors of one shape and dtype. Every kernel reads and writes these."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        self.T, self.O, self.I = T, O, I = shape.tokens, shape.out_features, shape.in_features
        self.size = dtype.itemsize
        self.x, self.dy, self.weight = (torch.randn(*s).to(dtype) for s in ((T, I), (T, O), (O, I)))
        self.y, self.dx, self.merged = (torch.zeros_like(t) for t in (self.dy, self.x, self.weight))
        self.A, self.B = torch.randn(RANK, I) / I, torch.randn(O, RANK) / O
        self.dA, self.dB = torch.empty_like(self.A), torch.empty_like(self.B)
        self.low_rank = self.A, self.B, SCALING
        self.x_bytes, self.y_bytes, self.weight_bytes = (self.size * elements for elements in (T * I, T * O, O * I))
        self.factor_bytes = WORD * RANK * (I + O)
        self.rank_flops = 2 * T * RANK * I, 2 * T * RANK * O  # of the tokens' product with A, and with B


def bytes_of_lines(features: torch.Tensor, size: int) -> int:
    """The bytes of one token's cache lines that hold these features."""
    return LINE * (features.long() * size // LINE).unique().numel()


class Sparse:
    """An S of one structure for those tensors, and the plain GEMMs of as many FLOPs."""

    def __init__(self, t: Tensors, shape: Shape, structure: str):
        self.pattern = pattern_of(structure, shape)
        self.n = self.pattern.nnz
        self.values = torch.randn(self.n) / t.I
        self.dvalues = torch.empty_like(self.values)
        self.csr = self.values, self.pattern.crow_indices, self.pattern.col_indices
        self.csc = self.pattern.transpose()
        self.structure = self.pattern.structure
        self.bytes = WORD * (2 * self.n + t.O)
        self.flops = 2 * t.T * self.n
        self.gathered = WORD * t.T * self.n if structure == "unstructured" else 0
        self.x_bytes = t.T * bytes_of_lines(self.pattern.col_indices, t.size)
        self.y_bytes = t.T * bytes_of_lines(self.pattern.row_of_entry(), t.size)
        self._plain_gemms(t, rows=structure == "row")

    def _plain_gemms(self, t: Tensors, rows: bool):
        """The plain GEMMs are fp32 for every dtype: T x k x O, or T x I x k for rows of S.

        The k features of x (for rows of S, of dy) already lie side by side. The GEMMs add to y and dx where the kernels
        do. Those for the ops make their results, as the ops do.
        """
        k = max(1, round(self.n / (t.I if rows else t.O)))
        long, short = torch.randn(t.T, t.I if rows else t.O), torch.randn(t.T, k)
        matrix, sums, added = torch.randn(k, long.shape[1]), torch.empty(k, long.shape[1]), torch.zeros_like(long)
        narrow = torch.empty(t.T, k)

        def widen():
            added.addmm_(short, matrix)

        def shrink():
            torch.mm(long, matrix.T, out=narrow)

        self.plain_y, self.plain_dx = (shrink, widen) if rows else (widen, shrink)
        self.plain_dS = lambda: torch.mm(short.T, long, out=sums)
        self.plain_spmm = lambda: (torch.zeros(t.T, t.O), shrink()) if rows else short @ matrix
        self.plain_sddmm = lambda: short.T @ long
        self.plain_flops = 2 * t.T * k * long.shape[1]


NO_S = (None, None, None)


def forward(t: Tensors, low_rank=(None, None, 0.0), s: Sparse | None = None, weight=None):
    indices = (*(s.csr if s else NO_S), s.structure if s else 0)
    _ops.forward(t.y, t.x, weight, None, *low_rank, *indices, *NO_DROPOUT, False, False, INDICES_CHECKED)


def backward(t: Tensors, wanted: str, low_rank=(None, None, 0.0), s: Sparse | None = None, weight=None):
    """wanted names some of dx, dA, dB and dS."""
    outputs = {"dx": t.dx, "dA": t.dA, "dB": t.dB, "dS": s.dvalues if s else None}
    outputs = [tensor if name in wanted.split() else None for name, tensor in outputs.items()]
    indices = (*s.csr, *s.csc, s.structure) if s else (*NO_S, *NO_S, 0)
    _ops.backward(*outputs, t.dy, t.x, weight, *low_rank, *indices, *NO_DROPOUT, False, INDICES_CHECKED)


def merge(t: Tensors, low_rank=(None, None, 0.0), s: Sparse | None = None):
    _ops.merge(t.merged, t.weight, *low_rank, *(s.csr if s else NO_S), 0, 0, INDICES_CHECKED)


def low_rank_kernels(t: Tensors) -> Iterator[Kernel]:
    with_A, with_B = t.rank_flops
    yield Kernel(
        "forward, low-rank", lambda: forward(t, t.low_rank), with_A + with_B, t.x_bytes + 2 * t.y_bytes + t.factor_bytes
    )
    yield Kernel(  # H and dB, dH and dA
        "backward, dA dB",
        lambda: backward(t, "dA dB", t.low_rank),
        2 * (with_A + with_B),
        t.x_bytes + t.y_bytes + 2 * t.factor_bytes,
    )
    yield Kernel(  # dH and its product with A
        "backward, dx low-rank",
        lambda: backward(t, "dx", t.low_rank),
        with_A + with_B,
        t.y_bytes + 2 * t.x_bytes + t.factor_bytes,
    )
    if t.size == WORD:
        yield Kernel(
            "merge, low-rank",
            lambda: merge(t, t.low_rank),
            2 * RANK * t.O * t.I,
            2 * t.weight_bytes + t.factor_bytes,
        )


def sparse_kernels(t: Tensors, s: Sparse, structure: str) -> Iterator[Kernel]:
    """The kernels that write into tensors made beforehand, and then the ops, which make their results."""
    gather, x, y, both = s.gathered, s.x_bytes, s.y_bytes, s.x_bytes + s.y_bytes + s.bytes
    spmm, sddmm = (t.x, *s.csr, s.structure), (t.dy, t.x, *s.csr[1:], s.structure)
    for name, run, flops, moved, gathered, plain in (
        ("forward", lambda: forward(t, s=s), s.flops, both + y, gather, s.plain_y),
        ("backward, dS", lambda: backward(t, "dS", s=s), s.flops, both, gather, s.plain_dS),
        ("backward, dx", lambda: backward(t, "dx", s=s), s.flops, both + x + WORD * s.n, gather, s.plain_dx),
        ("spmm", lambda: cpu.spmm(*spmm), s.flops, both - y + t.y_bytes, gather, s.plain_spmm),
        ("sddmm", lambda: cpu.sddmm(*sddmm), s.flops, both, gather, s.plain_sddmm),
        ("csr_add", lambda: cpu.csr_add(t.weight, *s.csr), s.n, 2 * t.weight_bytes + s.bytes, 0, None),
    ):
        yield Kernel(f"{name}, {structure}", run, flops, moved, gathered, plain, s.plain_flops)


def joint_kernels(t: Tensors, s: Sparse) -> Iterator[Kernel]:
    """The low-rank part and S in one call."""
    with_A, with_B = t.rank_flops
    x, y = t.x_bytes, t.y_bytes
    adapter = t.factor_bytes + s.bytes
    yield Kernel(
        "forward, both", lambda: forward(t, t.low_rank, s), with_A + with_B + s.flops, x + 2 * y + adapter, s.gathered
    )
    yield Kernel(
        "backward, dA dB dS",
        lambda: backward(t, "dA dB dS", t.low_rank, s),
        2 * (with_A + with_B) + s.flops,
        x + y + adapter + t.factor_bytes,
        s.gathered,
    )
    yield Kernel(  # H, dA and dx's part with A; dB and dH with B; dS and dx's part with S
        "backward, all",
        lambda: backward(t, "dx dA dB dS", t.low_rank, s),
        3 * with_A + 2 * with_B + 2 * s.flops,
        3 * x + y + adapter + t.factor_bytes + 2 * WORD * s.n,
        2 * s.gathered,
    )
    if t.size == WORD:
        yield Kernel(
            "merge, both",
            lambda: merge(t, t.low_rank, s),
            2 * RANK * t.O * t.I + s.n,
            2 * t.weight_bytes + adapter,
        )


def whole_kernels(t: Tensors, s: Sparse) -> Iterator[Kernel]:
    """y and dx of the whole layer, where our kernels multiply by W too.

    In fp32 they multiply by the merged weight, in bf16 they multiply by W in the adapter's pass.
    """
    if not cpu.uses_our_gemm(t.x.dtype):
        return
    dense, (with_A, with_B) = 2 * t.T * t.O * t.I, t.rank_flops
    moved = t.x_bytes + t.y_bytes + t.weight_bytes + t.factor_bytes + s.bytes
    if t.size == WORD:
        adapter, gathered = 2 * RANK * t.O * t.I + s.n, 0
        delta = (*t.low_rank, *s.csr)
        runs = (
            ("y", lambda: _ops.gemm(t.y, t.x, t.weight, None, *delta, 0, False, INDICES_CHECKED)),
            ("dx", lambda: _ops.gemm(t.dx, t.dy, t.weight, None, *delta, 0, True, INDICES_CHECKED)),
        )
    else:
        adapter, gathered = with_A + with_B + s.flops, s.gathered
        runs = (
            ("y", lambda: forward(t, t.low_rank, s, t.weight)),
            ("dx", lambda: backward(t, "dx", t.low_rank, s, t.weight)),
        )
    for name, run in runs:
        yield Kernel(f"{name}, whole layer", run, dense + adapter, moved, gathered)


def kernels_of(shape: Shape, dtype: torch.dtype) -> list[Kernel]:
    t = Tensors(shape, dtype)
    sparse = {structure: Sparse(t, shape, structure) for structure in STRUCTURES}
    unstructured = sparse["unstructured"]
    kernels = [*low_rank_kernels(t), *joint_kernels(t, unstructured), *whole_kernels(t, unstructured)]
    for structure, s in sparse.items():
        kernels += sparse_kernels(t, s, structure)
    return kernels
