"""The low-rank part's products over tokens: H = x̂ Aᵀ ("shrink"), dA = dHᵀ x̂ and dB = Gᵀ H ("outer"); memory-bound.

Where one program a tile would leave the GPU idle, the long dimension is split; each split writes an fp32 part, and
whoever reads them adds the parts in order: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Dropout
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, launcher
from rosa_kernels.backends.triton.device_functions import dot_mixed, int32_threshold, keep_tile, narrow, sum_of_parts
from rosa_kernels.backends.triton.split_k import add_parts, one_part

_FEW_TOKENS = 64


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def shrink_kernel(
    parts, x, A, seed, T, K, R, BLOCKS_PER_SPLIT, keep_scale, threshold, stride_xt, stride_xk, stride_ar, stride_ak,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[split] (T, R) = x̂ Aᵀ over the split's BLOCKS_PER_SPLIT · BLOCK_K features; x̂ = x unless there is a seed."""
    t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    first = split * BLOCKS_PER_SPLIT * BLOCK_K
    last = min(first + BLOCKS_PER_SPLIT * BLOCK_K, K)
    t64, k64 = t.to(tl.int64), first + k.to(tl.int64)
    x_at = x + t64[:, None] * stride_xt + k64[None, :] * stride_xk
    a_at = A + k64[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar
    block = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    key = None if seed is None else tl.load(seed)
    for k0 in range(first, last, BLOCK_K):
        inside = k0 + k < K
        x_mask = (t < T)[:, None] if EVEN_K else (t < T)[:, None] & inside[None, :]
        a_mask = (r < R)[None, :] if EVEN_K else (r < R)[None, :] & inside[:, None]
        x_tile = tl.load(x_at, mask=x_mask, other=0.0)
        a = tl.load(a_at, mask=a_mask, other=0.0)
        if seed is not None:
            x_tile = tl.where(keep_tile(key, t, k0, threshold, BLOCK_K), x_tile, tl.zeros_like(x_tile))
        acc = dot_mixed(x_tile, a, acc, PRECISION)
        x_at += block * stride_xk
        a_at += block * stride_ak
    if seed is not None:
        acc *= keep_scale
    target = parts + (split.to(tl.int64) * T + t64[:, None]) * R + r[None, :]
    tl.store(target, acc, mask=(t < T)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def outer_kernel(
    out, shrunk, z, P, Q, seed, T, F, R, BLOCKS_PER_SPLIT, P_PARTS, scaling, threshold, stride_zt, stride_zf,
    stride_qf, stride_qr, stride_of, stride_or,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One read of z (T, F) for two products.

    out[split] (F, R) = scaling · ẑᵀ P over the split's tokens, P the sum of P_PARTS parts (T, R),
    rounded to z's dtype unless WIDE;
    shrunk[f] (T, R) = z Q over the program's BLOCK_F features, unless shrunk is None.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    f64, r64 = f.to(tl.int64), r.to(tl.int64)
    if shrunk is not None:
        q = tl.load(
            Q + f64[:, None] * stride_qf + r64[None, :] * stride_qr, mask=(f < F)[:, None] & (r < R)[None, :], other=0.0
        )
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    key = None if seed is None else tl.load(seed)
    first = split * BLOCKS_PER_SPLIT * BLOCK_T
    last = min(first + BLOCKS_PER_SPLIT * BLOCK_T, T)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        small_mask = (t < last)[:, None] & (r < R)[None, :]
        small = t64[:, None] * R + r[None, :]
        z_tile = tl.load(
            z + t64[:, None] * stride_zt + f64[None, :] * stride_zf,
            mask=(t < last)[:, None] & (f < F)[None, :],
            other=0.0,
        )
        if shrunk is not None:
            h = dot_mixed(z_tile, q, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
            tl.store(shrunk + tl.program_id(0).to(tl.int64) * T * R + small, h, mask=small_mask)
        if seed is not None:
            z_tile = tl.where(
                keep_tile(key, t, tl.program_id(0) * BLOCK_F, threshold, BLOCK_F), z_tile, tl.zeros_like(z_tile)
            )
        p = sum_of_parts(P, small, small_mask, tl.cast(T, tl.int64) * R, P_PARTS)
        acc = dot_mixed(tl.trans(z_tile), p if WIDE else narrow(p, z_tile.dtype), acc, PRECISION)
    target = out + split.to(tl.int64) * F * R + f64[:, None] * stride_of + r64[None, :] * stride_or
    tl.store(target, narrow(acc * scaling, out.dtype.element_ty), mask=(f < F)[:, None] & (r < R)[None, :])


def block_r(r: int) -> int:
    """Ranks in a tile: a power of two that the tensor cores take."""
    return min(64, max(16, 1 << (r - 1).bit_length()))


def shrink(x: Tensor, A: Tensor, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """x̂ Aᵀ as fp32 parts (parts, T, r) to be added; x (T, K), A (r, K) of any strides."""
    (T, K), R = x.shape, A.shape[0]
    config = configs.choose(configs.SHRINK, x.device, x.dtype, T)
    if A.dtype != x.dtype and block_r(R) == 64:  # A, split into numbers of x's dtype, fills the registers
        config = config.with_blocks(BLOCK_K=32)
    tiles = cdiv(T, config["BLOCK_M"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(K, config["BLOCK_K"], tiles[0] * tiles[1], x.device, at_most=8)
    parts = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    launcher.launch(
        shrink_kernel, (tiles[0], splits, tiles[1]),
        parts, x, A, dropout.seed, T, K, R, blocks, dropout.keep_scale, int32_threshold(dropout.threshold),
        *x.stride(), *A.stride(),
        EVEN_K=K % config["BLOCK_K"] == 0, PRECISION=hardware.precision(x), BLOCK_R=block_r(R), config=config,
    )  # fmt: skip
    return parts


def outer(
    z: Tensor, P: Tensor, like: Tensor, scaling: float, *, features_first: bool, Q: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scaling · ẑᵀ P, z Q as parts): z (T, F), P the parts of (T, r), Q (F, r) or None for no second product.

    The first has the shape and dtype of `like`: (F, r) where features_first, else (r, F).
    """
    (T, F), R = z.shape, P.shape[2]
    if T > _FEW_TOKENS:  # a loop over parts would keep the one over tokens from fetching ahead
        P = one_part(P)
    config = configs.choose(configs.OUTER, z.device, z.dtype, T)
    tiles = cdiv(F, config["BLOCK_F"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles[0] * tiles[1], z.device, at_most=32)
    shrunk = None
    if Q is not None:  # no features: one part of zeros
        shrunk = (torch.empty if F else torch.zeros)(max(1, tiles[0]), T, R, dtype=torch.float32, device=z.device)
    out = torch.empty(like.shape, dtype=like.dtype, device=z.device)
    parts = out if splits == 1 else torch.empty(splits, *like.shape, dtype=torch.float32, device=z.device)
    stride_qf, stride_qr = (0, 0) if Q is None else Q.stride()
    launcher.launch(
        outer_kernel, (tiles[0], splits, tiles[1]),
        parts, shrunk, z, P, Q, dropout.seed, T, F, R, blocks, P.shape[0],
        scaling * dropout.keep_scale, int32_threshold(dropout.threshold),
        *z.stride(), stride_qf, stride_qr, *((R, 1) if features_first else (1, F)),
        WIDE=like.dtype.itemsize > z.dtype.itemsize, PRECISION=hardware.precision(z), BLOCK_R=block_r(R),
        config=config,
    )  # fmt: skip
    if splits > 1:
        add_parts(out, parts)
    return out, shrunk
