"""Entries of dyᵀ x by kernels, for dS.

"tiled" multiplies whole tiles of dyᵀ x on the tensor cores and keeps the pattern's entries. "blocks" does so for rows
that share their columns, with those columns alone. "entries" gathers by entry; each program takes the same number of
entries, so that a long row holds nobody up. The kernels may split the tokens; the parts are added in order.

In the kernels dy is (T, N) and x (T, K): N is out_features and K in_features. A tile of dyᵀ x (N, K) has BLOCK_M rows
and BLOCK_N columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, heuristics, launcher
from rosa_kernels.backends.triton.calls import sddmm_call
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import (
    dot,
    first_axis_fastest,
    first_entry_at,
    narrow,
    row_of_entry,
    tile_position,
)
from rosa_kernels.backends.triton.split_bf16_gemm import matmul
from rosa_kernels.backends.triton.split_k import add_parts, parts_for
from rosa_kernels.backends.triton.transpose import gather_columns, gather_whole_rows, transpose
from rosa_kernels.pattern import ROW

_ENTRIES = Config({"BLOCK_T": 32, "BLOCK_E": 64}, num_warps=4, num_stages=2)
_GATHER = Config({"BLOCK": 128}, num_warps=4, num_stages=1)
_GROUP_M, _BLOCK_E = 8, 4


@triton.jit
def dyT_x(
    dy_columns, x_columns, in_rows, in_columns, split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) Σ_t dy[t, row] x[t, column] over the split's tokens; *_columns point at token 0."""
    first_t = split * BLOCKS_PER_SPLIT * BLOCK_T
    last_t = min(first_t + BLOCKS_PER_SPLIT * BLOCK_T, T)
    acc = tl.zeros((dy_columns.shape[0], x_columns.shape[0]), tl.float32)
    for t0 in range(first_t, last_t, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        in_t = t < last_t
        g = tl.load(dy_columns[:, None] + t64[None, :] * stride_dyt, mask=in_rows[:, None] & in_t[None, :], other=0.0)
        x_tile = tl.load(
            x_columns[None, :] + t64[:, None] * stride_xt, mask=in_columns[None, :] & in_t[:, None], other=0.0
        )
        acc = dot(g, x_tile, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT", "STEPS"])
def sddmm_tiled_kernel(
    out, dy, x, crow, col, T, N, K, nnz, BLOCKS_PER_SPLIT, STEPS, stride_dyt, stride_dyn, stride_xt, stride_xk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[split] (nnz,) from dy (T, N) and x (T, K); BLOCK_E entries of each row of the tile are stored at a time."""
    row_tile, column_tile = tile_position(tl.program_id(0), N, K, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = column_tile * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    in_rows = row < N
    row_start = tl.load(crow + row, mask=in_rows, other=0)
    row_end = tl.load(crow + row + 1, mask=in_rows, other=0)
    start = first_entry_at(col, row_start, row_end, first_column, STEPS)
    end = first_entry_at(col, start, row_end, first_column + BLOCK_N, STEPS)
    longest = tl.max(end - start)
    if longest > 0:
        acc = dyT_x(
            dy + row.to(tl.int64) * stride_dyn, x + column.to(tl.int64) * stride_xk, in_rows, column < K,
            split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt, PRECISION, BLOCK_T,
        )  # fmt: skip
        for j in tl.range(0, longest, BLOCK_E, num_stages=1):
            entry = start[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
            inside = entry < end[:, None]
            at = tl.load(col + entry, mask=inside, other=0) - first_column
            value = tl.gather(acc, tl.where(inside, at, 0), axis=1)
            out_at = out + split.to(tl.int64) * nnz + entry
            tl.store(out_at, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT"])
def sddmm_blocks_kernel(
    out, dy, x, crow, col, T, N, nnz, BLOCKS_PER_SPLIT, stride_dyt, stride_dyn, stride_xt, stride_xk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As sddmm_tiled_kernel, where each BLOCK_M of the N rows share their columns."""
    row_tile, entry_tile = first_axis_fastest(tl.program_id(0), N, BLOCK_M)
    split = tl.program_id(1)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    row = tl.minimum(row, N - 1)
    row_start = tl.load(crow + row)
    start = tl.min(row_start)
    count = tl.min(tl.load(crow + row + 1) - row_start)
    entry = entry_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if entry_tile * BLOCK_N < count:
        in_columns = entry < count
        column = tl.load(col + start + entry, mask=in_columns, other=0)
        acc = dyT_x(
            dy + row.to(tl.int64) * stride_dyn, x + column.to(tl.int64) * stride_xk, in_rows, in_columns,
            split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt, PRECISION, BLOCK_T,
        )  # fmt: skip
        out_at = out + split.to(tl.int64) * nnz + row_start[:, None] + entry[None, :]
        tl.store(out_at, narrow(acc, out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT", "STEPS"])
def sddmm_entries_kernel(
    out, dy, x, crow, col, T, N, nnz, BLOCKS_PER_SPLIT, STEPS, stride_dyt, stride_dyn, stride_xt, stride_xk,
    TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[split] (nnz,): a program takes BLOCK_E entries, BLOCK_T tokens at a time.

    TRANSPOSED: dy and x are transposed copies, whose zeros make a mask over tokens needless and the loads wide.
    """
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    inside = entry < nnz
    row = row_of_entry(crow, N, tl.minimum(entry, nnz - 1), STEPS)
    column = tl.load(col + entry, mask=inside, other=0)
    dy_columns = dy + row.to(tl.int64) * stride_dyn
    x_columns = x + column.to(tl.int64) * stride_xk
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    last_t = min((split + 1) * BLOCKS_PER_SPLIT * BLOCK_T, T)
    for t0 in range(split * BLOCKS_PER_SPLIT * BLOCK_T, last_t, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask = inside[None, :] if TRANSPOSED else (t < last_t)[:, None] & inside[None, :]
        t64 = t.to(tl.int64)[:, None]
        g = tl.load(dy_columns[None, :] + t64 * stride_dyt, mask=mask, other=0.0).to(tl.float32)
        acc += g * tl.load(x_columns[None, :] + t64 * stride_xt, mask=mask, other=0.0).to(tl.float32)
    out_at = out + split.to(tl.int64) * nnz + entry
    tl.store(out_at, narrow(tl.sum(acc, axis=0), out.dtype.element_ty), mask=inside)


@triton.jit
def gather_entries_kernel(out, dW, crow, col, stride_wn, stride_wk, BLOCK: tl.constexpr):
    """out (nnz,) = the pattern's entries of dW (N, K), a row a program."""
    row = tl.program_id(0)
    end = tl.load(crow + row + 1)
    for first in range(tl.load(crow + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        inside = entry < end
        column = tl.load(col + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(dW + row.to(tl.int64) * stride_wn + column * stride_wk, mask=inside, other=0.0)
        tl.store(out + entry, value, mask=inside)


def gather_entries(dW: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """(nnz,) the pattern's entries of dW."""
    out = torch.empty(col.shape, dtype=dtype, device=dW.device)
    launcher.launch(gather_entries_kernel, (dW.shape[0],), (out, dW, crow, col), dW.stride(), (), _GATHER)
    return out


def sddmm_tiled(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """dS (nnz,) of dtype, where nnz > 0; the functions below do the same."""
    (T, N), K, nnz = dy.shape, x.shape[1], col.shape[0]
    config = configs.choose(configs.SDDMM_TILED, x.device, x.dtype, T)
    if N % 8 or K % 8:  # no wide loads: a pointer an element
        smaller = {name: min(64, config[name]) for name in ("BLOCK_M", "BLOCK_N")}
        config = Config(config.blocks | smaller, 4, 2)
    tiles = cdiv(N, config["BLOCK_M"]) * cdiv(K, config["BLOCK_N"])
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles, x.device, at_most=8)
    out = torch.empty(nnz, dtype=dtype, device=x.device)
    parts = parts_for(out, splits)
    launcher.launch(
        sddmm_tiled_kernel, (tiles, splits),
        (parts, dy, x, crow, col), (T, N, K, nnz, blocks, K.bit_length(), *dy.stride(), *x.stride()),
        (hardware.precision(x), _BLOCK_E, _GROUP_M), config,
    )  # fmt: skip
    add_parts(out, parts)
    return out


def sddmm_blocks(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    (T, N), K, nnz = dy.shape, x.shape[1], col.shape[0]
    config = configs.choose(configs.SDDMM_BLOCKS, x.device, x.dtype, T)
    tiles = cdiv(N, config["BLOCK_M"]) * cdiv(K, config["BLOCK_N"])
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles, x.device, at_most=8)
    out = torch.empty(nnz, dtype=dtype, device=x.device)
    parts = parts_for(out, splits)
    launcher.launch(
        sddmm_blocks_kernel, (tiles, splits),
        (parts, dy, x, crow, col), (T, N, nnz, blocks, *dy.stride(), *x.stride()), (hardware.precision(x),), config,
    )  # fmt: skip
    add_parts(out, parts)
    return out


def sddmm_entries(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype, transposed: bool = False
) -> Tensor:
    (T, N), nnz = dy.shape, col.shape[0]
    tiles = cdiv(nnz, _ENTRIES["BLOCK_E"])
    splits, blocks = hardware.splits_of(T, _ENTRIES["BLOCK_T"], tiles, x.device, at_most=8)
    out = torch.empty(nnz, dtype=dtype, device=x.device)
    parts = parts_for(out, splits)
    launcher.launch(
        sddmm_entries_kernel, (tiles, splits),
        (parts, dy, x, crow, col), (T, N, nnz, blocks, N.bit_length(), *dy.stride(), *x.stride()),
        (transposed,), _ENTRIES,
    )  # fmt: skip
    add_parts(out, parts)
    return out


def sddmm_entries_transposed(dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    return sddmm_entries(transpose(dy), transpose(x), crow, col, dtype, transposed=True)


KERNELS = {
    "tiled": sddmm_tiled,
    "blocks": sddmm_blocks,
    "entries": sddmm_entries,
    "entries_transposed": sddmm_entries_transposed,
}
"""By the name of the algorithm in heuristics.sddmm_algorithms."""


def sddmm(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, structure: int, dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(nnz,) of dtype; dy (T, out_features) and x (T, in_features) of one dtype and any strides.

    rows: those of a ROW pattern that are not empty, if they are at hand.
    """
    (T, out_features), in_features, nnz = dy.shape, x.shape[1], col.shape[0]
    if nnz == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    call = sddmm_call(x, T, out_features, in_features, nnz, structure, dtype)
    rates = device_rates.rates(x.device, hardware.architecture(x.device))
    algorithm = heuristics.choose_sddmm(call, rates)
    if algorithm == "packed":
        return _packed(dy, x, crow, col, structure, dtype, rows).to(dtype)
    if algorithm == "library":
        return gather_entries(matmul(dy.T, x, dtype), crow, col, dtype)
    return KERNELS[algorithm](dy, x, crow, col, dtype)


def _packed(dy, x, crow, col, structure, dtype, rows) -> Tensor:
    """For whole rows a GEMM of their columns of dy, for whole columns one of those of x."""
    out_features, in_features, nnz = dy.shape[1], x.shape[1], col.shape[0]
    if structure == ROW:
        count = nnz // in_features
        dy = gather_whole_rows(dy, crow, count, in_features) if rows is None else gather_columns(dy, rows)
        return matmul(dy.T, x, dtype)[:count].reshape(-1)
    count = nnz // out_features
    return matmul(dy.T, gather_columns(x, col[:count]), dtype)[:, :count].reshape(-1)
