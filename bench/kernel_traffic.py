"""What a launch of each Triton kernel moves and multiplies, counted from its grid, its blocks and its loops.

A formula a kernel, with the kernel's own argument names. tests/test_triton_traffic.py holds every formula to what the
kernels do under Triton's interpreter: the same elements asked for, the same distinct ones, the same FLOPs of dots.
"""

from dataclasses import dataclass
from math import ceil, log2, prod
from typing import NamedTuple

import torch

SECTOR = 32
"""Bytes: the least that a GPU moves from L2 or memory."""


class Access(NamedTuple):
    """One operand's loads or stores in a launch, in elements."""

    tensor: str
    asked: float
    """By all active lanes of all programs."""
    distinct: float
    """Different elements among them that memory has to give or take."""
    lanes_a_sector: float | None = None
    """Of a gather or scatter, that one sector serves at once; None: of a tile, as many as a sector has elements."""


@dataclass(frozen=True)
class Work:
    flops: float
    """Of dots, padding included."""
    loads: list[Access]
    stores: list[Access]


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    arguments: dict

    @classmethod
    def of(cls, kernel, grid, args, config, constants) -> "Launch":
        """From what the backend hands to its launcher."""
        return cls(kernel.fn.__name__, grid, dict(zip(kernel.arg_names, args)) | constants | config.blocks)

    def work(self) -> Work:
        return FORMULAS[self.kernel](self.grid, **self.arguments)

    def l2_bytes(self, gathered_only: bool = False) -> float:
        """What the SMs ask of L2, in whole sectors, as if L1 kept nothing; of gathers and scatters alone if wished."""
        work = self.work()
        counted = [a for a in work.loads + work.stores if a.lanes_a_sector is not None or not gathered_only]
        return sum(self.sectors(access) * SECTOR for access in counted)

    def memory_bytes(self) -> float:
        """The least that memory moves: every distinct element once in and once out, in whole sectors."""
        work = self.work()
        return sum(self._memory_bytes(accesses) for accesses in (work.loads, work.stores))

    def sectors(self, access: Access) -> float:
        return access.asked / (access.lanes_a_sector or self._elements_a_sector(access))

    def _memory_bytes(self, accesses: list[Access]) -> float:
        largest = {}
        for access in accesses:
            tensor = self.arguments[access.tensor]
            alone = (
                access.distinct if access.lanes_a_sector is None else access.distinct * self._elements_a_sector(access)
            )
            moved = min(alone, tensor.numel()) * tensor.element_size()
            largest[access.tensor] = max(largest.get(access.tensor, 0), moved)
        return sum(largest.values())

    def _elements_a_sector(self, access: Access) -> int:
        return SECTOR // self.arguments[access.tensor].element_size()


def _padded(length: int, block: int) -> int:
    return ceil(length / block) * block


def _dots(a: torch.Tensor, b: torch.Tensor) -> int:
    """dot_mixed takes a second operand of another dtype in several dots, unless the first is fp32."""
    if b.dtype == a.dtype or a.dtype == torch.float32:
        return 1
    return 3 if a.dtype == torch.bfloat16 else 2


def linear_kernel(
    grid, *, x, weight, bias, H, A, B, S, values, permutation, T, N, K, R, PARTS, DROPOUT, SPARSE, ACCUMULATE,
    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, BLOCK_E, **_,
) -> Work:  # fmt: skip
    tiles_m, tiles_n = ceil(T / BLOCK_M), ceil(N / BLOCK_N)
    programs, tile, k_steps = tiles_m * tiles_n, BLOCK_M * BLOCK_N, ceil(K / BLOCK_K)
    flops, loads = 0, []
    if H is not None:
        flops += 2 * programs * tile * _padded(R, BLOCK_R) * _dots(x, B)
        loads.append(Access("H", PARTS * T * R * tiles_n, PARTS * T * R))
    if A is not None:
        flops += 2 * programs * BLOCK_M * BLOCK_R * k_steps * BLOCK_K * _dots(
            x, A
        ) + 2 * programs * tile * BLOCK_R * _dots(x, B)
        loads.append(Access("A", R * K * programs, R * K))
    if B is not None:
        loads.append(Access("B", N * R * tiles_m, N * R))
    if DROPOUT:
        loads.append(Access("seed", programs, 1))
    if weight is not None or S is not None or A is not None:
        loads.append(Access("x", T * K * tiles_n, T * K))
    for name, matrix in (("weight", weight), ("S", S)):
        if matrix is not None:
            flops += 2 * programs * tile * k_steps * BLOCK_K * _dots(x, matrix)
            loads.append(Access(name, N * K * tiles_m, N * K))
    if SPARSE == "gather":
        loads += [Access("x", T * values.shape[0], T * K, 1), *_entries(N, tiles_m, values, permutation, BLOCK_E)]
    if SPARSE == "gather_columns":  # of all tokens of a tile: there are no masks over them
        tokens = tiles_m * BLOCK_M
        loads += [
            Access("x_columns", tokens * values.shape[0], tokens * K, SECTOR / x.element_size()),
            *_entries(N, tiles_m, values, permutation, BLOCK_E),
        ]
    if SPARSE == "blocks":
        columns = values.shape[0] / N  # of each tile
        flops += 2 * programs * tile * _padded(columns, BLOCK_K) * _dots(x, values)
        loads += _blocks(T, N, columns, tiles_m, tiles_n, values, permutation)
    if bias is not None:
        loads.append(Access("bias", N * tiles_m, N))
    out = Access("out", T * N, T * N)
    return Work(flops, [*loads, out] if ACCUMULATE else loads, [out])


def _entries(N, tiles_m, values, permutation, BLOCK_E) -> list[Access]:
    """A gather's own loads, BLOCK_E neighbours of each row at a time; L1 may keep their sectors for the next ones."""
    nnz = values.shape[0]
    loads = [
        Access("crow", 2 * N * tiles_m, N + 1),
        Access("col", nnz * tiles_m, nnz, BLOCK_E),
        Access("values", nnz * tiles_m, nnz, BLOCK_E if permutation is None else 1),
    ]
    return loads if permutation is None else [*loads, Access("permutation", nnz * tiles_m, nnz, BLOCK_E)]


def _blocks(T, N, columns, tiles_m, tiles_n, values, permutation) -> list[Access]:
    """Each tile's columns of x; taken as scattered, which those of a block are not."""
    nnz = values.shape[0]
    loads = [
        Access("crow", tiles_m * (N + 2 * tiles_n), N + 1),
        Access("col", columns * tiles_m * tiles_n, columns * tiles_n),
        Access("values", nnz * tiles_m, nnz),
        Access("x", T * columns * tiles_n, T * columns, 1),
    ]
    return loads if permutation is None else [*loads, Access("permutation", nnz * tiles_m, nnz)]


def shrink_kernel(grid, *, x, A, seed, T, K, R, BLOCK_M, BLOCK_K, BLOCK_R, **_) -> Work:
    tiles_m, splits, tiles_r = grid
    k_steps = ceil(K / BLOCK_K)
    flops = 2 * tiles_m * BLOCK_M * tiles_r * BLOCK_R * k_steps * BLOCK_K * _dots(x, A)
    loads = [Access("x", T * K * tiles_r, T * K), Access("A", R * K * tiles_m, R * K)]
    if seed is not None:
        loads.append(Access("seed", prod(grid), 1))
    return Work(flops, loads, [Access("parts", splits * T * R, splits * T * R)])


def outer_kernel(grid, *, shrunk, z, P, Q, seed, T, F, R, P_PARTS, WIDE, BLOCK_T, BLOCK_F, BLOCK_R, **_) -> Work:
    tiles_f, splits, tiles_r = grid
    one_dot = 2 * tiles_f * BLOCK_F * tiles_r * BLOCK_R * _padded(T, BLOCK_T)
    loads = [Access("z", T * F * tiles_r, T * F), Access("P", P_PARTS * T * R * tiles_f, P_PARTS * T * R)]
    stores = [Access("out", splits * F * R, splits * F * R)]
    flops = one_dot * (_dots(z, P) if WIDE else 1)
    if shrunk is not None:
        flops += one_dot * _dots(z, Q)
        loads.append(Access("Q", F * R * splits, F * R))
        stores.append(Access("shrunk", tiles_f * T * R, tiles_f * T * R))
    if seed is not None:
        loads.append(Access("seed", prod(grid), 1))
    return Work(flops, loads, stores)


def sum_kernel(grid, *, size, PARTS, **_) -> Work:
    return Work(0, [Access("parts", PARTS * size, PARTS * size)], [Access("out", size, size)])


def scatter_kernel(grid, *, base, values, N, ZERO, **_) -> Work:
    (rows,), nnz = grid, values.shape[0]
    fresh = base is not None or ZERO  # then the entries' places were written a moment ago: L2 has them
    loads = [Access("crow", 2 * rows, rows + 1), Access("col", nnz, nnz), Access("values", nnz, nnz)]
    stores = [Access("out", nnz, 0 if fresh else nnz, 1)]
    if base is not None:
        loads.append(Access("base", rows * N, rows * N))
    if fresh:
        stores.append(Access("out", rows * N, rows * N))
    if not ZERO:
        loads.append(Access("out", nnz, 0 if fresh else nnz, 1))
    return Work(0, loads, stores)


def sddmm_tiled_kernel(grid, *, col, T, M, N, BLOCK_M, BLOCK_N, BLOCK_T, **_) -> Work:
    """Entries uniform at random: so many tiles hold none and are left out, and a search halves a mean row."""
    (tiles, splits), nnz = grid, col.shape[0]
    tiles_m, tiles_n = ceil(M / BLOCK_M), ceil(N / BLOCK_N)
    taken = 1 - (1 - nnz / (M * N)) ** (BLOCK_M * BLOCK_N)
    searches = 2 * M * tiles_n * splits * (log2(1 + nnz / M))
    loads = [
        Access("crow", 2 * M * tiles_n * splits, M + 1),
        Access("col", nnz * splits + searches, nnz),
        Access("dy", T * M * tiles_n * taken, T * M),
        Access("x", T * N * tiles_m * taken, T * N),
    ]
    flops = 2 * tiles * taken * BLOCK_M * BLOCK_N * _padded(T, BLOCK_T)
    return Work(flops, loads, [Access("out", nnz * splits, nnz * splits)])


def sddmm_blocks_kernel(grid, *, col, T, M, BLOCK_M, BLOCK_N, BLOCK_T, **_) -> Work:
    """Blocks spread evenly over the rows of blocks, each of as many columns."""
    (tiles_m, _tiles_n, splits), nnz = grid, col.shape[0]
    columns = nnz / M
    taken_n = ceil(columns / BLOCK_N)
    loads = [
        Access("crow", tiles_m * BLOCK_M * prod(grid[1:]) * 2, M + 1),
        Access("col", columns * tiles_m * splits, columns * tiles_m),
        Access("dy", T * M * taken_n, T * M),
        Access("x", T * columns * tiles_m, T * columns, 1),
    ]
    flops = 2 * tiles_m * BLOCK_M * taken_n * BLOCK_N * _padded(T, BLOCK_T)
    return Work(flops, loads, [Access("out", nnz * splits, nnz * splits)])


def sddmm_entries_kernel(grid, *, dy, x, col, T, M, STEPS, BY_COLUMNS, BLOCK_T, BLOCK_E, **_) -> Work:
    """Neighbouring entries are mostly of one row: their loads of dy meet in its sectors, those of x never do."""
    (_tiles, splits), nnz = grid, col.shape[0]
    tokens = _padded(T, BLOCK_T) if BY_COLUMNS else T
    elements = SECTOR // x.element_size()
    shared = min(BLOCK_E, max(1, nnz / M)) * elements if BY_COLUMNS else min(BLOCK_E, max(1, nnz / M * elements))
    loads = [
        Access("crow", prod(grid) * BLOCK_E * STEPS, M + 1),
        Access("col", nnz * splits, nnz),
        Access("dy", tokens * nnz, tokens * M, shared),
        Access("x", tokens * nnz, tokens * x.shape[1], elements if BY_COLUMNS else 1),
    ]
    return Work(0, loads, [Access("out", nnz * splits, nnz * splits)])


def by_columns_kernel(grid, *, T, padded, features, **_) -> Work:
    return Work(0, [Access("x", T * features, T * features)], [Access("columns", padded * features, padded * features)])


def gather_columns_kernel(grid, *, T, count, width, **_) -> Work:
    loads = [Access("columns", count * grid[0], count), Access("x", T * count, T * count, 1)]
    return Work(0, loads, [Access("gathered", T * width, T * width)])


def add_at_rows_kernel(grid, *, T, count, rows, STEPS, BLOCK_P, **_) -> Work:
    added = Access("out", T * count, T * count, 1)
    loads = [
        Access("crow", prod(grid) * BLOCK_P * STEPS, min(rows, 2**STEPS)),
        Access("D", T * count, T * count),
        added,
    ]
    return Work(0, loads, [added])


def pick_kernel(grid, *, col, **_) -> Work:
    (rows,), nnz = grid, col.shape[0]
    loads = [Access("crow", 2 * rows, rows + 1), Access("col", nnz, nnz), Access("dW", nnz, nnz, 1)]
    return Work(0, loads, [Access("out", nnz, nnz)])


FORMULAS = {
    formula.__name__: formula
    for formula in (
        linear_kernel,
        shrink_kernel,
        outer_kernel,
        sum_kernel,
        scatter_kernel,
        sddmm_tiled_kernel,
        sddmm_blocks_kernel,
        sddmm_entries_kernel,
        pick_kernel,
        by_columns_kernel,
        gather_columns_kernel,
        add_at_rows_kernel,
    )
}
