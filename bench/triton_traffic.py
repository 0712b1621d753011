"""python bench/triton_traffic.py: what the Triton backend would cost on an H100, by counting; no GPU, nothing timed.

Prints bench/results/h100-roofline-estimate.md: the backend's ops, the frozen layer and what naive.py writes instead,
run on meta tensors, with the floors of the design beside them.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from layers import RANK, SCALING, Shape
from naive import Dense, DenseApart, HandWritten, NoSparse, Rows, forward_by_hand
from traffic_cost import MULTIPROCESSORS, RATES, Cost, CostCounter

from rosa_kernels.backends import triton as backend
from rosa_kernels.pattern import ROW, UNSTRUCTURED
from rosa_kernels.plan import gpu

# By name: the package's functions of the same names hide these modules.
linear_module = importlib.import_module("rosa_kernels.backends.triton.linear")
sddmm_module = importlib.import_module("rosa_kernels.backends.triton.sddmm")

DTYPE, SIZE, INDEX_SIZE = torch.bfloat16, 2, 4
SHAPES = [Shape(768, 768, 4096), Shape(3072, 768, 4096), Shape(4096, 4096, 2048), Shape(4096, 4096, 8192)]
SHAPES += [Shape(4096, 4096, tokens) for tokens in (1, 16, 64)]
NEEDS = [True, False, False, True, True, True]
"""dx, dA, dB, dvalues of a step; weight and bias are frozen."""

HEAD = f"""# The Triton kernels on an H100: a roofline estimate

**These are estimates by counting, not measurements** (those: nvidia-h100-*.json). `python bench/triton_traffic.py` prints this
page: bf16, rank {RANK}. FLOPs, bytes of memory and bytes that the SMs ask of L2 are counted from grids, tiles and loops
by `bench/kernel_traffic.py`, whose formulas `tests/test_triton_traffic.py` holds to what the kernels do under Triton's
interpreter.

A library call takes {RATES.launch_seconds * 1e6:.0f} us, a kernel of ours {RATES.kernel_launch_seconds * 1e6:.0f} us, + the largest of

- FLOPs of dots / {RATES.flops_16_bit / 1e12:.0f} TFLOP/s, times {RATES.kernel_efficiency} in the kernels' own loops,
- memory / {RATES.bandwidth / 1e12:.1f} TB/s: each operand's distinct bytes once, in whole sectors of 32;
  nothing is in L2 from the launch before,
- L2 / {RATES.l2_bandwidth / 1e12:.1f} TB/s: what the SMs ask for, as if L1 kept nothing;
  of the kernels alone, because library calls reach their rate with their L2 in it.

The rates are those of plan/gpu_table.py. FLOPs and L2 slow down where the last wave of programs leaves some of the
{MULTIPROCESSORS} multiprocessors idle. "us" is the cautious estimate; "bold us", the plan's own view, counts the L2 of
gathers and scatters alone: programs that ask for the same tile at the same time may be served faster than one by one.
Calls that move no data (views, allocations) are free.

Floors in elements (T tokens, O outputs, I inputs, S's n non-zeros; 2 bytes an element, indices 4):

| op | floor |
|---|---|
| LoRA forward | TO + 2TI + OI |
| LoRA step | TO + 2TI + OI forward, 2TO + 2TI + OI backward |
| RoSA step | LoRA step; S in both directions: 2n values, 3n indices; dS: TO + TI, n values, n indices |
| row step | LoRA step; S in both directions: 2n values; dS: T rows + TI, n values |
| spmm, sddmm | TO + TI, n values, n indices |
| csr_add | 2OI, n values, n indices |

Columns: the way that the plan chose (base+H+S of y; of dx; way of dS); launches and library calls; dots; memory, its
floor and their ratio; L2; the estimates, and what bounds most of the first; the frozen layer's own GEMMs; and what
naive.py writes: addmm_ for the low-rank part, S scattered into zeros and multiplied on its own, or three small GEMMs
for whole rows.
"""

COLUMNS = [
    *("op", "way", "launches", "GFLOP", "memory MB", "floor MB", "ratio", "L2 MB"),
    *("us", "bold us", "bound by", "frozen us", "addmm us"),
]
DEARER_COLUMNS = [
    *("outputs x inputs x tokens", "op", "part"),
    *("plan's way", "us", "bold us", "cheapest by us", "us", "bold us"),
]


def empty(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


class Tensors:
    """Of a layer with an S of nnz entries, or none at all."""

    def __init__(self, shape: Shape, structure: int = UNSTRUCTURED, density: float = 0.0):
        T, O, I = shape.tokens, shape.out_features, shape.in_features
        self.sizes, self.structure = (T, O, I), structure
        self.rows = round(density * O)
        self.nnz = self.rows * I if structure == ROW else round(density * O * I)
        self.x, self.dy, self.weight, self.bias = empty(T, I), empty(T, O), empty(O, I), empty(O)
        self.A, self.B = empty(RANK, I), empty(O, RANK)
        self.values = empty(self.nnz) if self.nnz else None
        self.crow, self.ccol = empty(O + 1, dtype=torch.int32), empty(I + 1, dtype=torch.int32)
        self.col, self.row, self.permutation = (empty(self.nnz, dtype=torch.int32) for _ in range(3))

    def naive_S(self) -> NoSparse:
        if not self.nnz:
            return NoSparse()
        _, O, I = self.sizes
        if self.structure == ROW:
            return Rows(empty(self.rows, dtype=torch.int64), I)
        apart = DenseApart.__new__(DenseApart)  # its constructor reads a pattern's indices
        apart.flat, apart.shape = empty(self.nnz, dtype=torch.int64), (O, I)
        return apart


def forward(t: Tensors) -> None:
    backend.rosa_linear(t.x, t.weight, t.bias, t.A, t.B, SCALING, t.values, t.crow, t.col, t.structure, 0.0, None)


def step(t: Tensors) -> None:
    forward(t)
    indices, needs = (t.crow, t.col, t.ccol, t.row, t.permutation), [*NEEDS[:5], t.nnz > 0]
    backend.rosa_linear_backward(
        t.dy, t.x, t.weight, t.A, t.B, SCALING, t.values, *indices, t.structure, 0.0, None, needs
    )  # fmt: skip


def frozen_forward(t: Tensors) -> None:
    F.linear(t.x, t.weight, t.bias)


def frozen_step(t: Tensors) -> None:
    frozen_forward(t)
    t.dy @ t.weight


def naive_forward(t: Tensors):
    return forward_by_hand(t.x, t.weight, t.bias, t.A, t.B, SCALING, t.values, t.naive_S())


def naive_step(t: Tensors) -> None:
    _, merged, H = naive_forward(t)
    saved, dtypes = (t.x, merged, t.A, t.B, t.values, H), 4 * [t.x.dtype]
    context = SimpleNamespace(saved_tensors=saved, dtypes=dtypes, scaling=SCALING, sparse=t.naive_S())
    HandWritten.backward(context, t.dy)


def forward_floor(t: Tensors) -> int:
    T, O, I = t.sizes
    return SIZE * (T * O + 2 * T * I + O * I)


def step_floor(t: Tensors) -> int:
    T, O, I = t.sizes
    lora = forward_floor(t) + SIZE * (2 * T * O + 2 * T * I + O * I)
    if not t.nnz:
        return lora
    if t.structure == ROW:
        return lora + SIZE * (3 * t.nnz + T * t.rows + T * I)
    return lora + SIZE * (3 * t.nnz + T * O + T * I) + INDEX_SIZE * 4 * t.nnz


def product_floor(t: Tensors) -> int:
    T, O, I = t.sizes
    return SIZE * (T * O + T * I) + (SIZE + INDEX_SIZE) * t.nnz


def csr_add_floor(t: Tensors) -> int:
    return 2 * SIZE * t.weight.numel() + (SIZE + INDEX_SIZE) * t.nnz


@dataclass(frozen=True)
class Op:
    name: str
    structure: int
    density: float
    ours: Callable[[Tensors], object]
    frozen: Callable[[Tensors], object]
    naive: Callable[[Tensors], object]
    floor: Callable[[Tensors], int]
    depends_on_tokens: bool = True


def spmm(t: Tensors) -> None:
    backend.spmm(t.x, t.values, t.crow, t.col, t.structure)


def naive_spmm(t: Tensors) -> None:
    t.naive_S().add_to_y(empty(*t.dy.shape), t.x, t.values)


def sddmm(t: Tensors) -> None:
    backend.sddmm(t.dy, t.x, t.crow, t.col, t.structure)


def naive_sddmm(t: Tensors) -> None:
    t.naive_S().gradient(t.dy, t.x)


def csr_add(t: Tensors) -> None:
    backend.csr_add(t.weight, t.values, t.crow, t.col)


def frozen_csr_add(t: Tensors) -> None:
    t.weight.clone()


def naive_csr_add(t: Tensors) -> None:
    Dense.weight(t.naive_S(), t.weight, t.values)


OPS = [
    Op("LoRA forward", UNSTRUCTURED, 0.0, forward, frozen_forward, naive_forward, forward_floor),
    Op("LoRA step", UNSTRUCTURED, 0.0, step, frozen_step, naive_step, step_floor),
    Op("RoSA 1 % step", UNSTRUCTURED, 0.01, step, frozen_step, naive_step, step_floor),
    Op("RoSA 0.1 % step", UNSTRUCTURED, 0.001, step, frozen_step, naive_step, step_floor),
    Op("row 1 % step", ROW, 0.01, step, frozen_step, naive_step, step_floor),
    Op("spmm 1 %", UNSTRUCTURED, 0.01, spmm, frozen_forward, naive_spmm, product_floor),
    Op("sddmm 1 %", UNSTRUCTURED, 0.01, sddmm, frozen_forward, naive_sddmm, product_floor),
    Op("csr_add 1 %", UNSTRUCTURED, 0.01, csr_add, frozen_csr_add, naive_csr_add, csr_add_floor, False),
]


@dataclass(frozen=True)
class Choice:
    """A way that the plan took, and how to take any."""

    part: str
    way: str
    costs_by_way: dict[str, list[Cost]]


def costs_of(run: Callable[[], object]) -> list[Cost]:
    with CostCounter() as counter:
        run()
    return counter.costs


def name_of(way: gpu.LinearWay) -> str:
    return "+".join(filter(None, (way.base, way.H, way.S))) or "zeros"


def choices_of(run: Callable[[], object]) -> list[Choice]:
    """Of every call of linear and sddmm that run() makes, with the costs of all legal ways."""
    choices = []
    take_linear, take_sddmm = linear_module.take, sddmm_module.take

    def linear(problem, way):
        part = "dx" if choices else "y"
        ways = gpu.linear_ways(problem.call())
        costs = {name_of(other): costs_of(lambda other=other: take_linear(problem, other)) for other in ways}
        choices.append(Choice(part, name_of(way), costs))
        return take_linear(problem, way)

    def sddmm(way, dy, x, crow, col, structure, dtype, rows):
        call = gpu.SDDMMCall(*dy.shape, x.shape[1], col.shape[0], structure, x.element_size())
        ways = gpu.sddmm_ways(call)
        arguments = (dy, x, crow, col, structure, dtype, rows)
        costs = {other: costs_of(lambda other=other: take_sddmm(other, *arguments)) for other in ways}
        choices.append(Choice("dS", way, costs))
        return take_sddmm(way, *arguments)

    with mock.patch.object(linear_module, "take", linear), mock.patch.object(sddmm_module, "take", sddmm):
        costs_of(run)
    return choices


def microseconds(costs: list[Cost], l2_of_tiles: bool = True) -> float:
    return 1e6 * sum(cost.seconds(l2_of_tiles) for cost in costs)


def estimates(costs: list[Cost]) -> list[str]:
    """The cautious and the bold one."""
    return [f"{microseconds(costs, l2_of_tiles):.0f}" for l2_of_tiles in (True, False)]


def row(op: Op, t: Tensors) -> list[str]:
    ours = costs_of(lambda: op.ours(t))
    memory, floor = sum(cost.memory_bytes for cost in ours), op.floor(t)
    bound = Counter()
    for cost in ours:
        bound[cost.bound] += cost.seconds()
    ways = "; ".join(choice.way for choice in choices_of(lambda: op.ours(t)))
    gigaflops, l2 = sum(cost.flops for cost in ours) / 1e9, sum(cost.l2_bytes for cost in ours)
    moved = [
        *(f"{figure:.1f}" for figure in (gigaflops, memory / 1e6, floor / 1e6)),
        f"{memory / floor:.2f}",
        f"{l2 / 1e6:.0f}",
    ]
    others = [f"{microseconds(costs_of(lambda run=run: run(t))):.0f}" for run in (op.frozen, op.naive)]
    return [op.name, ways or "-", str(len(ours)), *moved, *estimates(ours), bound.most_common(1)[0][0], *others]


def dearer_choices(op: Op, t: Tensors, shape: Shape) -> list[list[str]]:
    """The plan's choices that the count finds over a twentieth dearer than the cheapest."""
    rows = []
    for choice in choices_of(lambda: op.ours(t)):
        costs = choice.costs_by_way
        cheapest = min(costs, key=lambda way: microseconds(costs[way]))
        if microseconds(costs[choice.way]) > 1.05 * microseconds(costs[cheapest]):
            pair = [[way, *estimates(costs[way])] for way in (choice.way, cheapest)]
            rows.append([str(shape), op.name, choice.part, *pair[0], *pair[1]])
    return rows


def table(columns, rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)) + "\n"


def main() -> None:
    """Prints the page."""
    print(HEAD)
    dearer = []
    for position, shape in enumerate(SHAPES):
        seen = {(s.out_features, s.in_features) for s in SHAPES[:position]}
        new_weight = (shape.out_features, shape.in_features) not in seen
        cases = [(op, Tensors(shape, op.structure, op.density)) for op in OPS if op.depends_on_tokens or new_weight]
        print(f"## {shape.out_features} outputs x {shape.in_features} inputs, tokens: {shape.tokens}\n")
        print(table(COLUMNS, [row(op, t) for op, t in cases]))
        dearer += [line for op, t in cases for line in dearer_choices(op, t, shape)]
    print("## Where the count finds a way over 5 % cheaper than the plan's\n")
    print(table(DEARER_COLUMNS, dearer), end="")


if __name__ == "__main__":
    main()
