"""y = x Wᵀ + b + scaling · H Bᵀ + x Sᵀ in one accumulator, rounded once. With W, A, B and S transposed it is dx.

Every part may be missing. So the same kernel adds an adapter to a y that a library GEMM made, and is spmm by itself.
In the kernels x is (T, K) and y (T, N): K is the number of x's features, N of y's, and R the rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, launcher
from rosa_kernels.backends.triton.configs import Config
from rosa_kernels.backends.triton.densify import dense
from rosa_kernels.backends.triton.device_functions import (
    dot_mixed,
    int32_threshold,
    keep_tile,
    narrow,
    tile_position,
)
from rosa_kernels.backends.triton.heuristics import LinearAlgorithm
from rosa_kernels.backends.triton.lora import block_r
from rosa_kernels.backends.triton.operands import NO_DROPOUT, LinearProblem, Sparse
from rosa_kernels.backends.triton.transpose import transpose

_GROUP_M = 8
_SMALL_TILE = 32


@triton.jit
def times_B(h, acc, B, n64, in_n, first_r, R, stride_bn, stride_br, PRECISION: tl.constexpr):
    """acc + h Bᵀ, h (BLOCK_M, BLOCK_R) the columns of H from first_r on."""
    r = first_r + tl.arange(0, h.shape[1])
    at = B + n64[None, :] * stride_bn + r.to(tl.int64)[:, None] * stride_br
    return dot_mixed(h, tl.load(at, mask=in_n[None, :] & (r < R)[:, None], other=0.0), acc, PRECISION)


@triton.jit
def H_times_B(
    H, B, t64, in_t, n64, in_n, R, stride_ht, stride_bn, stride_br, dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H Bᵀ; H (T, R), where it is wider, is rounded to the dtype of the dots."""
    acc = tl.zeros((t64.shape[0], n64.shape[0]), tl.float32)
    for first_r in range(0, R, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        mask = in_t[:, None] & (r < R)[None, :]
        h = tl.load(H + t64[:, None] * stride_ht + r[None, :], mask=mask, other=0.0)
        if h.dtype != dtype:
            h = narrow(h, dtype)
        acc = times_B(h, acc, B, n64, in_n, first_r, R, stride_bn, stride_br, PRECISION)
    return acc


@triton.jit
def scaled(low_rank, key, t, first_n, scaling, keep_scale, threshold, DROP_OUT: tl.constexpr):
    """scaling · low_rank, behind dropout where the backward puts it: on the columns of dx."""
    if DROP_OUT:
        kept = keep_tile(key, t, first_n, threshold, low_rank.shape[1])
        return tl.where(kept, low_rank * (scaling * keep_scale), 0.0)
    return low_rank * scaling


@triton.jit
def add_dense(
    acc, x_rows, weight, S, A, key, t, in_t, n64, in_n, K, R, keep_scale, threshold,
    stride_xk, stride_wn, stride_wk, stride_sn, stride_sk, stride_ar, stride_ak,
    DROP_X: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(acc + x Wᵀ + x Sᵀ, x̂ Aᵀ): one read of x for whichever of weight, S and A are there."""
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    k64, r64 = k.to(tl.int64), r.to(tl.int64)
    block = tl.full((), BLOCK_K, tl.int64)
    x_at = x_rows + k64[None, :] * stride_xk
    if weight is not None:
        w_at = weight + n64[None, :] * stride_wn + k64[:, None] * stride_wk
    if S is not None:
        s_at = S + n64[None, :] * stride_sn + k64[:, None] * stride_sk
    if A is not None:
        a_at = A + r64[None, :] * stride_ar + k64[:, None] * stride_ak
    h = tl.zeros((acc.shape[0], BLOCK_R), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        in_k = first_k + k < K
        x_mask = in_t[:, None] if EVEN_K else in_t[:, None] & in_k[None, :]
        w_mask = in_n[None, :] if EVEN_K else in_n[None, :] & in_k[:, None]
        x_tile = tl.load(x_at, mask=x_mask, other=0.0)
        if weight is not None:
            acc = dot_mixed(x_tile, tl.load(w_at, mask=w_mask, other=0.0), acc, PRECISION)
            w_at += block * stride_wk
        if S is not None:
            acc = dot_mixed(x_tile, tl.load(s_at, mask=w_mask, other=0.0), acc, PRECISION)
            s_at += block * stride_sk
        if A is not None:
            if DROP_X:
                x_tile = tl.where(keep_tile(key, t, first_k, threshold, BLOCK_K), x_tile, tl.zeros_like(x_tile))
            a_mask = (r < R)[None, :] if EVEN_K else (r < R)[None, :] & in_k[:, None]
            h = dot_mixed(x_tile, tl.load(a_at, mask=a_mask, other=0.0), h, PRECISION)
            a_at += block * stride_ak
        x_at += block * stride_xk
    return acc, h * keep_scale if DROP_X else h


@triton.jit
def add_gathered(
    acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk,
    TRANSPOSED: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """acc + x Sᵀ, BLOCK_E entries of each row of S at a time; x is read by entry.

    TRANSPOSED: x_rows point into a transposed copy, whose padding makes loads wide and needs no mask over tokens.
    """
    start = tl.load(crow + n, mask=in_n, other=0)
    end = tl.load(crow + n + 1, mask=in_n, other=0)
    for j in tl.range(0, tl.max(end - start), BLOCK_E, num_stages=1):
        entry = start[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
        # beside a longer row an entry may pass 2**31, where as an int32 it would be below every end
        inside = entry.to(tl.uint32, bitcast=True) < end[:, None].to(tl.uint32, bitcast=True)
        column = tl.load(col + entry, mask=inside, other=0).to(tl.int64)
        if permutation is not None:
            entry = tl.load(permutation + entry, mask=inside, other=0)
        value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
        mask = inside[None, :, :] if TRANSPOSED else in_t[:, None, None] & inside[None, :, :]
        gathered = tl.load(x_rows[:, :, None] + column[None, :, :] * stride_xk, mask=mask, other=0.0)
        acc += tl.sum(gathered.to(tl.float32) * value[None, :, :], axis=2)
    return acc


@triton.jit
def add_blocks(
    acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x Sᵀ where the tile is a row of blocks: its rows share their columns, a dense product with those of x."""
    first_row = tl.min(n)
    start = tl.load(crow + first_row)
    count = tl.load(crow + first_row + 1) - start
    row_start = tl.load(crow + n, mask=in_n, other=0)
    k = tl.arange(0, BLOCK_K)
    for first_k in tl.range(0, count, BLOCK_K):
        inside = first_k + k < count
        column = tl.load(col + start + first_k + k, mask=inside, other=0).to(tl.int64)
        entry = row_start[None, :] + (first_k + k)[:, None]
        entry_mask = in_n[None, :] & inside[:, None]
        if permutation is not None:
            entry = tl.load(permutation + entry, mask=entry_mask, other=0)
        value = tl.load(values + entry, mask=entry_mask, other=0.0)
        x_tile = tl.load(x_rows + column[None, :] * stride_xk, mask=in_t[:, None] & inside[None, :], other=0.0)
        acc = dot_mixed(x_tile, value, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    out, x, x_transposed, weight, bias, H, A, B, seed, S, values, crow, col, permutation,
    T, N, K, R, scaling, keep_scale, threshold,
    stride_ot, stride_xt, stride_xk, stride_xtk, stride_ht, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn,
    stride_br, stride_sn, stride_sk,
    DROPOUT: tl.constexpr, SPARSE: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (T, N) from x (T, K). A part whose first tensor is None is left out.

    weight and S are dense (N, K). H (T, R) comes made; or it is made here from A (R, K), where R <= BLOCK_R. B is
    (N, R).
    values lie at crow and col, in the order of permutation if there is one. SPARSE "gather" reads x by entry,
    "gather_transposed" reads x_transposed, and "blocks" takes BLOCK_N rows that share their columns.
    DROPOUT acts on "x" before A, on the low-rank part of "out", or "" nowhere. ACCUMULATE adds to what out holds.
    """
    m_tile, n_tile = tile_position(tl.program_id(0), T, N, BLOCK_M, BLOCK_N, GROUP_M)
    t = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    t64, n64 = t.to(tl.int64), n.to(tl.int64)
    in_t, in_n = t < T, n < N
    x_rows = x + t64[:, None] * stride_xt
    dtype: tl.constexpr = x.dtype.element_ty
    key = None if seed is None else tl.load(seed)

    if H is not None:
        acc = H_times_B(H, B, t64, in_t, n64, in_n, R, stride_ht, stride_bn, stride_br, dtype, PRECISION, BLOCK_R)
        acc = scaled(acc, key, t, n_tile * BLOCK_N, scaling, keep_scale, threshold, DROPOUT == "out")
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if (weight is not None) or (S is not None) or (A is not None):
        acc, h = add_dense(
            acc, x_rows, weight, S, A, key, t, in_t, n64, in_n, K, R, keep_scale, threshold,
            stride_xk, stride_wn, stride_wk, stride_sn, stride_sk, stride_ar, stride_ak,
            DROPOUT == "x", EVEN_K, PRECISION, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        if A is not None:
            zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            low_rank = times_B(narrow(h, dtype), zero, B, n64, in_n, 0, R, stride_bn, stride_br, PRECISION)
            acc += scaled(low_rank, key, t, n_tile * BLOCK_N, scaling, keep_scale, threshold, DROPOUT == "out")
    if SPARSE == "gather":
        acc = add_gathered(acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk, False, BLOCK_E)
    if SPARSE == "gather_transposed":
        transposed_rows = x_transposed + t64[:, None]
        acc = add_gathered(
            acc, transposed_rows, in_t, n, in_n, values, crow, col, permutation, stride_xtk, True, BLOCK_E
        )
    if SPARSE == "blocks":
        acc = add_blocks(acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk, PRECISION, BLOCK_K)
    if bias is not None:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]

    out_at = out + t64[:, None] * stride_ot + n64[None, :]
    out_mask = in_t[:, None] & in_n[None, :]
    if ACCUMULATE:
        acc += tl.load(out_at, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(out_at, narrow(acc, out.dtype.element_ty), mask=out_mask)


def run_kernel(problem: LinearProblem, algorithm: LinearAlgorithm, H: Tensor | None) -> Tensor:
    """A new y with the bias, and with what the algorithm gives to the kernel. H is there unless it is made inside."""
    x, S = problem.x, problem.S
    y = torch.empty(x.shape[0], problem.out_features, dtype=x.dtype, device=x.device)
    A = B = None
    if algorithm.low_rank in ("inside", "before", "known"):
        B = problem.B
        A = problem.A if algorithm.low_rank == "inside" else None
        H = None if A is not None else H
    else:
        H = None
    drop_at = problem.drop_at if B is not None and (A is not None or problem.drop_at == "out") else ""
    in_csr_form = algorithm.sparse in ("gather", "gather_transposed")
    dense_dtype = x.dtype if S is None or S.values.dtype == x.dtype else torch.float32  # the kernel splits fp32
    _launch(
        y, x, x_transposed=transpose(x) if algorithm.sparse == "gather_transposed" else None,
        weight=problem.weight if algorithm.base == "kernel" else None, bias=problem.bias, H=H, A=A, B=B,
        scaling=problem.scaling, dropout=problem.dropout if drop_at else NO_DROPOUT, drop_at=drop_at,
        S=S if in_csr_form else None, sparse=algorithm.sparse if in_csr_form else "",
        dense_S=dense(S, dense_dtype) if algorithm.sparse == "dense" else None,
    )  # fmt: skip
    return y


def add_blocks_of_S(y: Tensor, x: Tensor, S: Sparse) -> None:
    """y += x Sᵀ of an S of 16 x 16 blocks."""
    _launch(y, x, S=S, sparse="blocks", accumulate=True, block_n=16)


def _launch(
    y: Tensor, x: Tensor, *, x_transposed=None, weight=None, bias=None, H=None, A=None, B=None, scaling=1.0,
    dropout=NO_DROPOUT, drop_at="", S: Sparse | None = None, sparse="", dense_S=None, accumulate=False,
    block_n: int | None = None,
) -> None:  # fmt: skip
    (T, K), N, R = x.shape, y.shape[1], 0 if B is None else B.shape[1]
    wider = any(operand is not None and operand.dtype != x.dtype for operand in (A, B, dense_S))
    config = _config(x, N, T, bool(sparse) or dense_S is not None, wider, block_n)
    if sparse == "blocks" and S.values.dtype != x.dtype:  # a pointer an element, each value split
        tile = {name: min(64, config[name]) for name in ("BLOCK_M", "BLOCK_N")}
        config = Config(tile | {"BLOCK_K": 32}, num_warps=4, num_stages=2)
    in_csr_form = (None,) * 4 if S is None else (S.values, S.crow, S.col, S.permutation)
    bias = None if bias is None else bias.contiguous()
    launcher.launch(
        linear_kernel, (cdiv(T, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]),),
        (y, x, x_transposed, weight, bias, H, A, B, dropout.seed, dense_S, *in_csr_form),
        (T, N, K, R, scaling, dropout.keep_scale, int32_threshold(dropout.threshold),
         y.stride(0), *x.stride(), _strides(x_transposed)[1], _strides(H)[0],
         *_strides(weight), *_strides(A), *_strides(B), *_strides(dense_S)),
        (drop_at, sparse, accumulate, K % config["BLOCK_K"] == 0, hardware.precision(x),
         _block_r(R, H, B, x.dtype), _block_e(config, x.element_size()), _GROUP_M),
        config,
    )  # fmt: skip


def _strides(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()


def _config(x: Tensor, N: int, tokens: int, has_S: bool, wider: bool, block_n: int | None) -> Config:
    """The configuration for so many tokens, with a smaller tile where registers or shared memory have to hold more.

    wider: an operand of a dot is of a wider dtype than x, and is split into numbers of x's dtype.
    """
    if N % 8 or x.shape[1] % 8:  # no wide loads: a pointer an element
        tokens = min(tokens, _SMALL_TILE)
    config = configs.choose(configs.LINEAR, x.device, x.dtype, tokens)
    if wider and config["BLOCK_M"] > 64 and configs.dots_read_registers(hardware.architecture(x.device)):
        config = Config({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=config.num_stages)
    if block_n is None and has_S:
        block_n = min(config["BLOCK_N"], 128)
    if block_n is None or block_n == config["BLOCK_N"]:
        return config
    return config.with_blocks(BLOCK_N=block_n)


def _block_r(R: int, H: Tensor | None, B: Tensor | None, dtype: torch.dtype) -> int:
    """Ranks at a time: fewer where B is split into numbers of x's dtype, all where H is made in the kernel."""
    return block_r(R) if H is None or B.dtype == dtype else min(32, block_r(R))


def _block_e(config: Config, element_size: int) -> int:
    """Entries of a row that a gather takes at a time, so that each thread has 64 bytes of products in flight."""
    elements = 64 // element_size
    return max(1, elements * 32 * config.num_warps // (config["BLOCK_M"] * config["BLOCK_N"]))
