"""The low-rank part's products over tokens: H = x̂ Aᵀ by "shrink", and dA = dHᵀ x̂ and dB = dyᵀ H by "lora_grad".

They are bound by memory. Where one program a tile would leave the GPU idle, the long dimension is split. Each split
writes an fp32 part, and whoever reads the parts adds them in order: the bits are the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Dropout
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, heuristics, launcher
from rosa_kernels.backends.triton.device_functions import dot_mixed, int32_threshold, keep_tile, narrow, sum_of_parts
from rosa_kernels.backends.triton.split_k import add_parts, parts_for, summed, summed_if_cheaper

_FEW_TOKENS = 64


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def shrink_kernel(
    H_parts, x, A, seed, T, K, R, BLOCKS_PER_SPLIT, keep_scale, threshold, stride_xt, stride_xk, stride_ar, stride_ak,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H_parts[split] (T, R) = x̂ Aᵀ over the split's BLOCKS_PER_SPLIT · BLOCK_K features; x̂ = x unless there is a
    seed.

    K is in_features and R the rank.
    """
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
    out_at = H_parts + (split.to(tl.int64) * T + t64[:, None]) * R + r[None, :]
    tl.store(out_at, acc, mask=(t < T)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def lora_grad_kernel(
    out, dH_parts, z, H, B, seed, T, F, R, BLOCKS_PER_SPLIT, H_PARTS, scaling, threshold, stride_zt, stride_zf,
    stride_bf, stride_br, stride_of, stride_or,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA or dB, and with dB also dH from the same read of dy.

    out[split] (F, R) = scaling · ẑᵀ H over the split's tokens, H the sum of its H_PARTS (T, R), rounded to z's dtype
    unless WIDE. For dB, z (T, F) is dy; for dA it is x, and dH takes the place of H.
    dH_parts[f] (T, R) = z B over the program's BLOCK_F features, unless dH_parts is None.
    """
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    f64, r64 = f.to(tl.int64), r.to(tl.int64)
    if dH_parts is not None:
        b_at = B + f64[:, None] * stride_bf + r64[None, :] * stride_br
        b = tl.load(b_at, mask=(f < F)[:, None] & (r < R)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    key = None if seed is None else tl.load(seed)
    first = split * BLOCKS_PER_SPLIT * BLOCK_T
    last = min(first + BLOCKS_PER_SPLIT * BLOCK_T, T)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        t64 = t.to(tl.int64)
        in_ranks = (t < last)[:, None] & (r < R)[None, :]
        of_ranks = t64[:, None] * R + r[None, :]
        z_at = z + t64[:, None] * stride_zt + f64[None, :] * stride_zf
        z_tile = tl.load(z_at, mask=(t < last)[:, None] & (f < F)[None, :], other=0.0)
        if dH_parts is not None:
            dh = dot_mixed(z_tile, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
            tl.store(dH_parts + tl.program_id(0).to(tl.int64) * T * R + of_ranks, dh, mask=in_ranks)
        if seed is not None:
            kept = keep_tile(key, t, tl.program_id(0) * BLOCK_F, threshold, BLOCK_F)
            z_tile = tl.where(kept, z_tile, tl.zeros_like(z_tile))
        h = sum_of_parts(H, of_ranks, in_ranks, tl.cast(T, tl.int64) * R, H_PARTS)
        acc = dot_mixed(tl.trans(z_tile), h if WIDE else narrow(h, z_tile.dtype), acc, PRECISION)
    out_at = out + split.to(tl.int64) * F * R + f64[:, None] * stride_of + r64[None, :] * stride_or
    tl.store(out_at, narrow(acc * scaling, out.dtype.element_ty), mask=(f < F)[:, None] & (r < R)[None, :])


def block_r(r: int) -> int:
    """Ranks in a tile: a power of two that the tensor cores take."""
    return min(64, max(16, 1 << (r - 1).bit_length()))


def shrink(x: Tensor, A: Tensor, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """H = x̂ Aᵀ as fp32 parts (parts, T, r) to be added; x (T, in_features), A (r, in_features) of any strides."""
    (T, K), R = x.shape, A.shape[0]
    config = configs.choose(configs.SHRINK, x.device, x.dtype, T)
    if A.dtype != x.dtype and block_r(R) == 64:  # A, split into numbers of x's dtype, fills the registers
        config = config.with_blocks(BLOCK_K=32)
    tiles = cdiv(T, config["BLOCK_M"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(K, config["BLOCK_K"], tiles[0] * tiles[1], x.device, at_most=8)
    H_parts = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    launcher.launch(
        shrink_kernel, (tiles[0], splits, tiles[1]),
        H_parts, x, A, dropout.seed, T, K, R, blocks, dropout.keep_scale, int32_threshold(dropout.threshold),
        *x.stride(), *A.stride(),
        EVEN_K=K % config["BLOCK_K"] == 0, PRECISION=hardware.precision(x), BLOCK_R=block_r(R), config=config,
    )  # fmt: skip
    return H_parts


def lora_grad(
    z: Tensor, H_parts: Tensor, like: Tensor, scaling: float, *, features_first: bool, B: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dB, dH parts) from dy, H and B; or (dA, None) from x and dH. z (T, F) is dy or x, H_parts H or dH.

    The gradient has the shape and dtype of `like`: (F, r) where features_first, else (r, F).
    """
    (T, F), R = z.shape, H_parts.shape[2]
    if T > _FEW_TOKENS:  # a loop over parts would keep the one over tokens from fetching ahead
        H_parts = summed(H_parts)
    config = configs.choose(configs.LORA_GRAD, z.device, z.dtype, T)
    tiles = cdiv(F, config["BLOCK_F"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles[0] * tiles[1], z.device, at_most=32)
    dH_parts = None
    if B is not None:  # no features: one part of zeros
        dH_parts = (torch.empty if F else torch.zeros)(max(1, tiles[0]), T, R, dtype=torch.float32, device=z.device)
    out = torch.empty(like.shape, dtype=like.dtype, device=z.device)
    parts = parts_for(out, splits)
    stride_bf, stride_br = (0, 0) if B is None else B.stride()
    launcher.launch(
        lora_grad_kernel, (tiles[0], splits, tiles[1]),
        parts, dH_parts, z, H_parts, B, dropout.seed, T, F, R, blocks, H_parts.shape[0],
        scaling * dropout.keep_scale, int32_threshold(dropout.threshold),
        *z.stride(), stride_bf, stride_br, *((R, 1) if features_first else (1, F)),
        WIDE=like.dtype.itemsize > z.dtype.itemsize, PRECISION=hardware.precision(z), BLOCK_R=block_r(R),
        config=config,
    )  # fmt: skip
    add_parts(out, parts)
    return out, dH_parts


def gradients_by_kernels(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB):
    """As gpu/lora.py says; dH as parts (parts, T, r)."""
    dA = dB = dH = None
    readers_of_dH = x.shape[1] * (need_dx + need_dA)
    if need_dB:
        H = summed_if_cheaper(shrink(x, lora_A, dropout), dy.shape[1])
        with_dH = (need_dx or need_dA) and heuristics.dy_read_once(lora_B.shape[1])
        dB, dH = lora_grad(dy, H, lora_B, scaling, features_first=True, B=lora_B if with_dH else None)
        dH = None if dH is None else summed_if_cheaper(dH, readers_of_dH)
    if need_dA:
        if dH is None:
            dH = summed_if_cheaper(shrink(dy, lora_B.T), readers_of_dH)
        dA, _ = lora_grad(x, dH, lora_A, scaling, features_first=False, dropout=dropout)
    return dA, dB, dH


def H_of_matrix(H: Tensor) -> Tensor:
    """H (T, r) as its only part."""
    return H[None]


def matrix_of_H(H_parts: Tensor, r: int) -> Tensor:
    return H_parts[0]
