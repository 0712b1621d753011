"""y = x Wᵀ + b + scaling · H Bᵀ + x Sᵀ in one accumulator, rounded once; with W, A, B and S transposed also dx.

Every part may be missing, so the same kernel adds an adapter to a y that a library GEMM made, and is spmm by itself.
"""

import triton
import triton.language as tl

from rosa_kernels.backends.triton.device_functions import (
    dot_mixed,
    keep_tile,
    narrow,
    sum_of_parts,
    tile_position,
)


@triton.jit
def times_B(h, acc, B, n64, in_n, first_r, R, stride_bn, stride_br, PRECISION: tl.constexpr):
    """acc + h Bᵀ, h (BLOCK_M, BLOCK_R) the columns of H from first_r on."""
    r = first_r + tl.arange(0, h.shape[1])
    at = B + n64[None, :] * stride_bn + r.to(tl.int64)[:, None] * stride_br
    return dot_mixed(h, tl.load(at, mask=in_n[None, :] & (r < R)[:, None], other=0.0), acc, PRECISION)


@triton.jit
def H_times_B(
    H, B, t64, in_t, n64, in_n, T, R, PARTS, stride_bn, stride_br, dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H Bᵀ, H the sum of its PARTS (T, R) in fp32, rounded once to the dtype of the dots."""
    acc = tl.zeros((t64.shape[0], n64.shape[0]), tl.float32)
    for first_r in range(0, R, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        mask = in_t[:, None] & (r < R)[None, :]
        h = sum_of_parts(H, t64[:, None] * R + r[None, :], mask, tl.cast(T, tl.int64) * R, PARTS)
        acc = times_B(narrow(h, dtype), acc, B, n64, in_n, first_r, R, stride_bn, stride_br, PRECISION)
    return acc


@triton.jit
def scaled(delta, key, t, first_n, scaling, keep_scale, threshold, DROP_OUT: tl.constexpr):
    """scaling · delta, behind dropout where the backward puts it: on the columns of dx."""
    if DROP_OUT:
        kept = keep_tile(key, t, first_n, threshold, delta.shape[1])
        return tl.where(kept, delta * (scaling * keep_scale), 0.0)
    return delta * scaling


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
    BY_COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """acc + x Sᵀ, BLOCK_E entries of each row of S at a time; x is read by entry.

    BY_COLUMNS: x_rows point into a copy from by_columns, whose padding makes loads wide and needs no mask over tokens.
    """
    start = tl.load(crow + n, mask=in_n, other=0)
    end = tl.load(crow + n + 1, mask=in_n, other=0)
    for j in tl.range(0, tl.max(end - start), BLOCK_E, num_stages=1):
        entry = start[:, None] + j + tl.arange(0, BLOCK_E)[None, :]
        inside = entry < end[:, None]
        column = tl.load(col + entry, mask=inside, other=0).to(tl.int64)
        if permutation is not None:
            entry = tl.load(permutation + entry, mask=inside, other=0)
        value = tl.load(values + entry, mask=inside, other=0.0).to(tl.float32)
        mask = inside[None, :, :] if BY_COLUMNS else in_t[:, None, None] & inside[None, :, :]
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
    out, x, x_columns, weight, bias, H, A, B, seed, S, values, crow, col, permutation,
    T, N, K, R, PARTS, scaling, keep_scale, threshold,
    stride_ot, stride_xt, stride_xk, stride_ck, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_sn, stride_sk,
    DROPOUT: tl.constexpr, SPARSE: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (T, N) from x (T, K); a part whose first tensor is None is left out.

    weight, S (N, K) dense. H (PARTS, T, R) fp32 and B (N, R); or A (R, K) and B, for H made here, R <= BLOCK_R.
    values at crow, col, in the order of permutation if there is one: SPARSE "gather" reads x entry by entry,
    "gather_columns" x_columns, its copy by columns; "blocks" takes BLOCK_N rows that share their columns. DROPOUT:
    "x" of H's input, "out" of the low-rank part of out, or "". ACCUMULATE adds to what out holds.
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
        acc = H_times_B(H, B, t64, in_t, n64, in_n, T, R, PARTS, stride_bn, stride_br, dtype, PRECISION, BLOCK_R)
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
            delta = times_B(narrow(h, dtype), zero, B, n64, in_n, 0, R, stride_bn, stride_br, PRECISION)
            acc += scaled(delta, key, t, n_tile * BLOCK_N, scaling, keep_scale, threshold, DROPOUT == "out")
    if SPARSE == "gather":
        acc = add_gathered(acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk, False, BLOCK_E)
    if SPARSE == "gather_columns":
        columns = x_columns + t64[:, None]
        acc = add_gathered(acc, columns, in_t, n, in_n, values, crow, col, permutation, stride_ck, True, BLOCK_E)
    if SPARSE == "blocks":
        acc = add_blocks(acc, x_rows, in_t, n, in_n, values, crow, col, permutation, stride_xk, PRECISION, BLOCK_K)
    if bias is not None:
        acc += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]

    out_at = out + t64[:, None] * stride_ot + n64[None, :]
    out_mask = in_t[:, None] & in_n[None, :]
    if ACCUMULATE:
        acc += tl.load(out_at, mask=out_mask, other=0.0).to(tl.float32)
    tl.store(out_at, narrow(acc, out.dtype.element_ty), mask=out_mask)
