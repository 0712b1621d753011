"""Columns of x: all of them transposed, a few gathered, a few added at their places."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.device_functions import first_axis_fastest, narrow, row_of_entry
from rosa_kernels.backends.triton.split_bf16_gemm import ALIGNMENT

TOKEN_PADDING = 128
"""A multiple of every BLOCK_M and BLOCK_T of the kernels that read a transposed copy."""
_TRANSPOSE = Config({"BLOCK_T": 64, "BLOCK_F": 64}, num_warps=4, num_stages=1)
_FEW = Config({"BLOCK_T": 32, "BLOCK_P": 32}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["T"])
def transpose_kernel(
    transposed, x, T, padded, features, stride_xt, stride_xf, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """transposed (features, padded) = xᵀ, zeros beyond T; padded a multiple of BLOCK_T."""
    t_tile, f_tile = first_axis_fastest(tl.program_id(0), padded, BLOCK_T)
    t = t_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    f = f_tile * BLOCK_F + tl.arange(0, BLOCK_F)
    t64, f64 = t.to(tl.int64), f.to(tl.int64)
    in_f = f < features
    at = x + t64[:, None] * stride_xt + f64[None, :] * stride_xf
    tile = tl.load(at, mask=(t < T)[:, None] & in_f[None, :], other=0.0)
    tl.store(transposed + f64[:, None] * padded + t64[None, :], tl.trans(tile), mask=in_f[:, None])


@triton.jit(do_not_specialize=["T", "count", "width"])
def gather_columns_kernel(
    gathered, x, columns, T, count, width, stride_xt, stride_xf, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr
):
    """gathered (T, width) = x[:, columns], zeros beyond the count of columns."""
    t_tile, p_tile = first_axis_fastest(tl.program_id(0), T, BLOCK_T)
    t = (t_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    in_t = (t < T)[:, None]
    column = tl.load(columns + p, mask=p < count, other=0).to(tl.int64)
    at = x + t[:, None] * stride_xt + column[None, :] * stride_xf
    tile = tl.load(at, mask=in_t & (p < count)[None, :], other=0.0)
    tl.store(gathered + t[:, None] * width + p[None, :], tile, mask=in_t & (p < width)[None, :])


@triton.jit(do_not_specialize=["T", "count", "rows", "row_length", "STEPS"])
def add_at_rows_kernel(
    out, product, crow, T, count, rows, row_length, STEPS, stride_ot, stride_pt,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out (T, rows)[:, p-th row of crow (rows + 1,) that is not empty] += product (T, count)[:, p].

    Such a row has row_length entries.
    """
    t_tile, p_tile = first_axis_fastest(tl.program_id(0), T, BLOCK_T)
    t = (t_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    row = row_of_entry(crow, rows, tl.minimum(p, count - 1) * row_length, STEPS).to(tl.int64)
    mask = (t < T)[:, None] & (p < count)[None, :]
    at = out + t[:, None] * stride_ot + row[None, :]
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(product + t[:, None] * stride_pt + p[None, :], mask=mask, other=0.0)
    tl.store(at, narrow(total, out.dtype.element_ty), mask=mask)


def transpose(x: Tensor) -> Tensor:
    """A copy of x (T, features) with tokens next to each other in memory, and zeros up to a multiple of
    TOKEN_PADDING."""
    T, features = x.shape
    padded = cdiv(T, TOKEN_PADDING) * TOKEN_PADDING
    transposed = torch.empty(features, padded, dtype=x.dtype, device=x.device)
    grid = (padded // _TRANSPOSE["BLOCK_T"] * cdiv(features, _TRANSPOSE["BLOCK_F"]),)
    launcher.launch(transpose_kernel, grid, (transposed, x), (T, padded, features, *x.stride()), (), _TRANSPOSE)
    return transposed.T[:T]


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """x (T, features)[:, columns] (T, count), then columns of zeros up to a multiple of ALIGNMENT."""
    T, count = x.shape[0], columns.shape[0]
    width = cdiv(count, ALIGNMENT) * ALIGNMENT
    gathered = torch.empty(T, width, dtype=x.dtype, device=x.device)
    grid = (cdiv(T, _FEW["BLOCK_T"]) * cdiv(width, _FEW["BLOCK_P"]),)
    launcher.launch(gather_columns_kernel, grid, (gathered, x, columns), (T, count, width, *x.stride()), (), _FEW)
    return gathered


def gather_whole_rows(x: Tensor, crow: Tensor, count: int, row_length: int) -> Tensor:
    """As gather_columns: those of the `count` rows of crow that are not empty, each of row_length entries."""
    starts = torch.arange(count, dtype=torch.int32, device=x.device) * row_length
    return gather_columns(x, torch.searchsorted(crow, starts, right=True, out_int32=True) - 1)


def add_at_rows(out: Tensor, product: Tensor, crow: Tensor, row_length: int) -> None:
    """out[:, rows of crow that are not empty] += product (T, count), in fp32; each such row has row_length entries."""
    (T, rows), count = out.shape, product.shape[1]
    grid = (cdiv(T, _FEW["BLOCK_T"]) * cdiv(count, _FEW["BLOCK_P"]),)
    launcher.launch(
        add_at_rows_kernel, grid, (out, product, crow),
        (T, count, rows, row_length, rows.bit_length(), out.stride(0), product.stride(0)), (), _FEW,
    )  # fmt: skip
