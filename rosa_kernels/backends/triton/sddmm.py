"""dS: Σ_t dy[t, row_e] x[t, col_e] for each entry e of a pattern.

"library" makes all of dyᵀ x by a library GEMM and picks, or for whole rows and columns ("packed") only what they need;
"tiled" multiplies whole tiles of dyᵀ x on the tensor cores and keeps the pattern's entries; "blocks" does so for rows
that share their columns, with those columns alone; "entries" gathers by entry, each program the same number of entries,
so that a long row holds nobody up. Kernels may split the tokens; the parts are added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import cost_model, device_rates, hardware
from rosa_kernels.backends.gpu.split_bf16_gemm import matmul
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import dot, first_entry_at, narrow, row_of_entry, tile_position
from rosa_kernels.backends.triton.split_k import add_parts
from rosa_kernels.backends.triton.transpose import by_columns, gather_columns
from rosa_kernels.pattern import ROW

_ENTRIES = Config({"BLOCK_T": 32, "BLOCK_E": 64}, num_warps=4, num_stages=2)
_PICK = Config({"BLOCK": 128}, num_warps=4, num_stages=1)
_GROUP_M = 8


@triton.jit
def dyT_x(
    dy_columns, x_columns, in_m, in_n, split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) Σ_t dy[t, m] x[t, n] over the split's tokens; *_columns point at token 0."""
    first_t = split * BLOCKS_PER_SPLIT * BLOCK_T
    last_t = min(first_t + BLOCKS_PER_SPLIT * BLOCK_T, T)
    acc = tl.zeros((dy_columns.shape[0], x_columns.shape[0]), tl.float32)
    for t0 in range(first_t, last_t, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        in_t = t < last_t
        g = tl.load(dy_columns[:, None] + t64[None, :] * stride_dyt, mask=in_m[:, None] & in_t[None, :], other=0.0)
        x_tile = tl.load(x_columns[None, :] + t64[:, None] * stride_xt, mask=in_n[None, :] & in_t[:, None], other=0.0)
        acc = dot(g, x_tile, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT", "STEPS"])
def sddmm_tiled_kernel(
    out, dy, x, crow, col, T, M, N, nnz, BLOCKS_PER_SPLIT, STEPS, stride_dyt, stride_dym, stride_xt, stride_xn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[split] (nnz,) from dy (T, M) and x (T, N); BLOCK_E entries of each row of the tile are stored at a time."""
    m_tile, n_tile = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = n_tile * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    in_m = m < M
    row_start = tl.load(crow + m, mask=in_m, other=0)
    row_end = tl.load(crow + m + 1, mask=in_m, other=0)
    start = first_entry_at(col, row_start, row_end, first_n, STEPS)
    end = first_entry_at(col, start, row_end, first_n + BLOCK_N, STEPS)
    longest = tl.max(end - start)
    if longest > 0:
        acc = dyT_x(
            dy + m.to(tl.int64) * stride_dym, x + n.to(tl.int64) * stride_xn, in_m, n < N,
            split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt, PRECISION, BLOCK_T,
        )  # fmt: skip
        for j in tl.range(0, longest, BLOCK_E, num_stages=1):
            entry = start[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
            inside = entry < end[:, None]
            column = tl.load(col + entry, mask=inside, other=0) - first_n
            value = tl.gather(acc, tl.where(inside, column, 0), axis=1)
            target = out + split.to(tl.int64) * nnz + entry
            tl.store(target, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT"])
def sddmm_blocks_kernel(
    out, dy, x, crow, col, T, M, nnz, BLOCKS_PER_SPLIT, stride_dyt, stride_dym, stride_xt, stride_xn,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As sddmm_tiled_kernel, where each BLOCK_M of the M rows share their columns."""
    split = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = m < M
    row = tl.minimum(m, M - 1)
    row_start = tl.load(crow + row)
    start = tl.min(row_start)
    count = tl.min(tl.load(crow + row + 1) - row_start)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(1) * BLOCK_N < count:
        in_n = n < count
        column = tl.load(col + start + n, mask=in_n, other=0)
        acc = dyT_x(
            dy + row.to(tl.int64) * stride_dym, x + column.to(tl.int64) * stride_xn, in_m, in_n,
            split, BLOCKS_PER_SPLIT, T, stride_dyt, stride_xt, PRECISION, BLOCK_T,
        )  # fmt: skip
        target = out + split.to(tl.int64) * nnz + row_start[:, None] + n[None, :]
        tl.store(target, narrow(acc, out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["T", "nnz", "BLOCKS_PER_SPLIT", "STEPS"])
def sddmm_entries_kernel(
    out, dy, x, crow, col, T, M, nnz, BLOCKS_PER_SPLIT, STEPS, stride_dyt, stride_dym, stride_xt, stride_xn,
    BY_COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[split] (nnz,): a program takes BLOCK_E entries, BLOCK_T tokens at a time.

    BY_COLUMNS: dy and x come from by_columns, whose zeros make a mask over tokens needless and the loads wide.
    """
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(1)
    inside = entry < nnz
    row = row_of_entry(crow, M, tl.minimum(entry, nnz - 1), STEPS)
    column = tl.load(col + entry, mask=inside, other=0)
    dy_columns = dy + row.to(tl.int64) * stride_dym
    x_columns = x + column.to(tl.int64) * stride_xn
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    last_t = min((split + 1) * BLOCKS_PER_SPLIT * BLOCK_T, T)
    for t0 in range(split * BLOCKS_PER_SPLIT * BLOCK_T, last_t, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask = inside[None, :] if BY_COLUMNS else (t < last_t)[:, None] & inside[None, :]
        t64 = t.to(tl.int64)[:, None]
        g = tl.load(dy_columns[None, :] + t64 * stride_dyt, mask=mask, other=0.0).to(tl.float32)
        acc += g * tl.load(x_columns[None, :] + t64 * stride_xt, mask=mask, other=0.0).to(tl.float32)
    target = out + split.to(tl.int64) * nnz + entry
    tl.store(target, narrow(tl.sum(acc, axis=0), out.dtype.element_ty), mask=inside)


@triton.jit
def pick_kernel(out, dW, crow, col, stride_m, stride_n, BLOCK: tl.constexpr):
    """out (nnz,) = the pattern's entries of dW (M, N), a row a program."""
    row = tl.program_id(0)
    end = tl.load(crow + row + 1)
    for first in range(tl.load(crow + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        inside = entry < end
        column = tl.load(col + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(dW + row.to(tl.int64) * stride_m + column * stride_n, mask=inside, other=0.0)
        tl.store(out + entry, value, mask=inside)


def sddmm(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, structure: int, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """(nnz,) of dtype; dy (T, M), x (T, N) of one dtype and any strides. rows: those not empty, where known."""
    (T, M), N, nnz = dy.shape, x.shape[1], col.shape[0]
    if nnz == 0:
        return torch.empty(0, dtype=dtype, device=x.device)
    tf32 = hardware.precision(x) == "tf32"
    call = cost_model.SDDMMCall(T, M, N, nnz, structure, x.element_size(), tf32, dtype != x.dtype)
    way = cost_model.choose_sddmm(call, device_rates.rates(x.device, hardware.target(x.device)))
    return take(way, dy, x, crow, col, structure, dtype, rows)


def take(
    way: str,
    dy: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    structure: int,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """sddmm by one of cost_model.sddmm_ways; nnz > 0."""
    if way == "packed":
        return _packed(dy, x, crow, col, structure, dtype, rows).to(dtype)
    out = torch.empty(col.shape, dtype=dtype, device=x.device)
    if way == "entries_columns":
        dy, x = by_columns(dy), by_columns(x)
    if way in ("entries", "entries_columns"):
        _entries(out, dy, x, crow, col, BY_COLUMNS=way == "entries_columns")
    elif way == "library":
        dW = matmul(dy.T, x, dtype)
        launcher.launch(pick_kernel, (dW.shape[0],), out, dW, crow, col, *dW.stride(), config=_PICK)
    elif way == "tiled":
        _tiled(out, dy, x, crow, col)
    else:
        _blocks(out, dy, x, crow, col)
    return out


def _packed(dy, x, crow, col, structure, dtype, rows) -> Tensor:
    M, N, nnz = dy.shape[1], x.shape[1], col.shape[0]
    if structure == ROW:
        count = nnz // N
        if rows is None:
            starts = torch.arange(count, dtype=torch.int32, device=x.device) * N
            rows = torch.searchsorted(crow, starts, right=True, out_int32=True) - 1
        return matmul(gather_columns(dy, rows).T, x, dtype)[:count].reshape(-1)
    count = nnz // M
    return matmul(dy.T, gather_columns(x, col[:count]), dtype)[:, :count].reshape(-1)


def _with_parts(out: Tensor, splits: int, run) -> None:
    """run(target) writes `splits` parts (splits, nnz), straight into out where there is one."""
    if splits == 1:
        run(out)
        return
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    run(parts)
    add_parts(out, parts)


def _tiled(out, dy, x, crow, col) -> None:
    (T, M), N, nnz = dy.shape, x.shape[1], col.shape[0]
    config = configs.choose(configs.SDDMM_TILED, x.device, x.dtype, T)
    if M % 8 or N % 8:  # no wide loads: a pointer an element
        smaller = {name: min(64, config[name]) for name in ("BLOCK_M", "BLOCK_N")}
        config = Config(config.blocks | smaller, 4, 2)
    tiles = cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"])
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles, x.device, at_most=8)
    _with_parts(out, splits, lambda target: launcher.launch(
        sddmm_tiled_kernel, (tiles, splits),
        target, dy, x, crow, col, T, M, N, nnz, blocks, N.bit_length(), *dy.stride(), *x.stride(),
        PRECISION=hardware.precision(x), BLOCK_E=4, GROUP_M=_GROUP_M, config=config,
    ))  # fmt: skip


def _blocks(out, dy, x, crow, col) -> None:
    (T, M), N, nnz = dy.shape, x.shape[1], col.shape[0]
    config = configs.choose(configs.SDDMM_BLOCKS, x.device, x.dtype, T)
    tiles = cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"])
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles[0] * tiles[1], x.device, at_most=8)
    _with_parts(out, splits, lambda target: launcher.launch(
        sddmm_blocks_kernel, (*tiles, splits),
        target, dy, x, crow, col, T, M, nnz, blocks, *dy.stride(), *x.stride(),
        PRECISION=hardware.precision(x), config=config,
    ))  # fmt: skip


def _entries(out, dy, x, crow, col, BY_COLUMNS) -> None:
    (T, M), nnz = dy.shape, col.shape[0]
    tiles = cdiv(nnz, _ENTRIES["BLOCK_E"])
    splits, blocks = hardware.splits_of(T, _ENTRIES["BLOCK_T"], tiles, x.device, at_most=8)
    _with_parts(out, splits, lambda target: launcher.launch(
        sddmm_entries_kernel, (tiles, splits),
        target, dy, x, crow, col, T, M, nnz, blocks, M.bit_length(), *dy.stride(), *x.stride(),
        BY_COLUMNS=BY_COLUMNS, config=_ENTRIES,
    ))  # fmt: skip
