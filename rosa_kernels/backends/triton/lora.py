"""The low-rank part's products over tokens: H = x̂ Aᵀ by "shrink", and dA = dHᵀ x̂ and dB = dyᵀ H by "lora_grad".

They are bound by memory. Where one program a tile would leave the GPU idle, the long dimension is split. Each split
writes an fp32 part, and the parts are added in order: the bits are the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.kept_H import H_dtype, padded_rank
from rosa_kernels.backends.shapes import cdiv
from rosa_kernels.backends.triton import configs, heuristics, launcher
from rosa_kernels.backends.triton.device_functions import dot_mixed, int32_threshold, keep_tile, narrow
from rosa_kernels.backends.triton.operands import NO_DROPOUT, Dropout, LinearProblem
from rosa_kernels.backends.triton.split_k import add_parts, parts_for


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def shrink_kernel(
    H_parts, x, A, seed, T, K, R, columns, BLOCKS_PER_SPLIT, keep_scale, threshold, stride_xt, stride_xk, stride_ar,
    stride_ak,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """H_parts[split] (T, columns) = x̂ Aᵀ over the split's BLOCKS_PER_SPLIT · BLOCK_K features, and zeros beyond R.

    K is in_features and R the rank. x̂ = x unless there is a seed.
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
    out_at = H_parts + (split.to(tl.int64) * T + t64[:, None]) * columns + r[None, :]
    tl.store(out_at, narrow(acc, H_parts.dtype.element_ty), mask=(t < T)[:, None] & (r < columns)[None, :])


@triton.jit(do_not_specialize=["T", "BLOCKS_PER_SPLIT"])
def lora_grad_kernel(
    out, dH_parts, z, H, B, seed, T, F, R, columns, BLOCKS_PER_SPLIT, scaling, threshold, stride_zt, stride_zf,
    stride_bf, stride_br, stride_of, stride_or,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA or dB, and with dB also dH from the same read of dy.

    out[split] (F, R) = scaling · ẑᵀ H over the split's tokens, H (T, columns) rounded to z's dtype unless WIDE. For dB,
    z (T, F) is dy; for dA it is x, and dH takes the place of H.
    dH_parts[f] (T, columns) = z B over the program's BLOCK_F features, and zeros beyond R, unless dH_parts is None.
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
        in_H = (t < last)[:, None] & (r < columns)[None, :]
        of_H = t64[:, None] * columns + r[None, :]
        z_at = z + t64[:, None] * stride_zt + f64[None, :] * stride_zf
        z_tile = tl.load(z_at, mask=(t < last)[:, None] & (f < F)[None, :], other=0.0)
        if dH_parts is not None:
            dh = dot_mixed(z_tile, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION)
            dh_at = dH_parts + tl.program_id(0).to(tl.int64) * T * columns + of_H
            tl.store(dh_at, narrow(dh, dH_parts.dtype.element_ty), mask=in_H)
        if seed is not None:
            kept = keep_tile(key, t, tl.program_id(0) * BLOCK_F, threshold, BLOCK_F)
            z_tile = tl.where(kept, z_tile, tl.zeros_like(z_tile))
        h = tl.load(H + of_H, mask=in_H, other=0.0)
        if h.dtype != z_tile.dtype and not WIDE:
            h = narrow(h, z_tile.dtype)
        acc = dot_mixed(tl.trans(z_tile), h, acc, PRECISION)
    out_at = out + split.to(tl.int64) * F * R + f64[:, None] * stride_of + r64[None, :] * stride_or
    tl.store(out_at, narrow(acc * scaling, out.dtype.element_ty), mask=(f < F)[:, None] & (r < R)[None, :])


def block_r(r: int) -> int:
    """Ranks in a tile: a power of two that the tensor cores take."""
    return min(64, max(16, 1 << (r - 1).bit_length()))


def shrink(x: Tensor, A: Tensor, dtype: torch.dtype, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """H = x̂ Aᵀ (T, padded rank) of a dtype; x (T, in_features), A (r, in_features) of any strides."""
    (T, K), R = x.shape, A.shape[0]
    config = configs.choose(configs.SHRINK, x.device, x.dtype, T)
    if A.dtype != x.dtype and block_r(R) == 64:  # A, split into numbers of x's dtype, fills the registers
        config = config.with_blocks(BLOCK_K=32)
    H = torch.empty(T, padded_rank(R), dtype=dtype, device=x.device)
    tiles = cdiv(T, config["BLOCK_M"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(K, config["BLOCK_K"], tiles[0] * tiles[1], x.device, at_most=8)
    parts = parts_for(H, splits)
    launcher.launch(
        shrink_kernel, (tiles[0], splits, tiles[1]),
        (parts, x, A, dropout.seed),
        (T, K, R, H.shape[1], blocks, dropout.keep_scale, int32_threshold(dropout.threshold), *x.stride(), *A.stride()),
        (K % config["BLOCK_K"] == 0, hardware.precision(x), block_r(R)), config,
    )  # fmt: skip
    add_parts(H, parts)
    return H


def lora_grad(
    z: Tensor, H: Tensor, like: Tensor, scaling: float, *, features_first: bool, B: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dB, dH) from dy, H and B; or (dA, None) from x and dH. z (T, F) is dy or x, and H may be dH.

    The gradient has the shape and dtype of `like`: (F, r) where features_first, else (r, F).
    """
    (T, F), R = z.shape, like.shape[1] if features_first else like.shape[0]
    config = configs.choose(configs.LORA_GRAD, z.device, z.dtype, T)
    tiles = cdiv(F, config["BLOCK_F"]), cdiv(R, block_r(R))
    splits, blocks = hardware.splits_of(T, config["BLOCK_T"], tiles[0] * tiles[1], z.device, at_most=32)
    dH = dH_parts = None
    if B is not None:  # no features: one part of zeros
        dH = (torch.empty if F else torch.zeros)(H.shape, dtype=H.dtype, device=z.device)
        dH_parts = parts_for(dH, max(1, tiles[0]))
    out = torch.empty(like.shape, dtype=like.dtype, device=z.device)
    parts = parts_for(out, splits)
    stride_bf, stride_br = (0, 0) if B is None else B.stride()
    launcher.launch(
        lora_grad_kernel, (tiles[0], splits, tiles[1]),
        (parts, dH_parts, z, H, B, dropout.seed),
        (T, F, R, H.shape[1], blocks, scaling * dropout.keep_scale, int32_threshold(dropout.threshold),
         *z.stride(), stride_bf, stride_br, *((R, 1) if features_first else (1, F))),
        (like.dtype.itemsize > z.dtype.itemsize, hardware.precision(z), block_r(R)), config,
    )  # fmt: skip
    add_parts(out, parts)
    if dH is not None:
        add_parts(dH, dH_parts)
    return out, dH


def make_H(problem: LinearProblem, by_library: bool) -> Tensor:
    """x̂ Aᵀ of a problem, in the form of backends/kept_H.py."""
    x, A = problem.x, problem.A
    dtype, dropout = H_dtype(x, A, problem.B), problem.dropout if problem.drop_at == "x" else NO_DROPOUT
    if by_library and dropout is NO_DROPOUT and dtype == A.dtype == x.dtype:
        return library_H(x, A)
    return shrink(x, A, dtype, dropout)


def library_H(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ by a library GEMM, in the form of backends/kept_H.py; x and A have one dtype."""
    H = x @ A.T
    missing = padded_rank(A.shape[0]) - A.shape[0]
    return torch.nn.functional.pad(H, (0, missing)) if missing else H


def low_rank_gradients(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout, H: Tensor | None, *,
    need_dH: bool, need_dA: bool, need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dA, dB, dH), None each where it is not needed. Where H is not at hand, it is made again."""
    r, dtype = lora_A.shape[0], H_dtype(x, lora_A, lora_B)
    by_library = False
    if x.dtype == lora_A.dtype == lora_B.dtype:
        rates = device_rates.rates(x.device, hardware.architecture(x.device))
        by_library = heuristics.low_rank_gradients_by_library(*dy.shape, x.element_size(), rates)
    if need_dB and H is None:
        H = library_H(x, lora_A) if by_library and dropout is NO_DROPOUT else shrink(x, lora_A, dtype, dropout)
    dA = dB = dH = None
    if by_library:
        dH = library_H(dy, lora_B.T) if need_dH else None
        dB = torch.addmm(lora_B, dy.T, H[:, :r], beta=0, alpha=scaling) if need_dB else None
    elif need_dB:
        with_dH = need_dH and heuristics.dy_read_once(r)
        dB, dH = lora_grad(dy, H, lora_B, scaling, features_first=True, B=lora_B if with_dH else None)
    if need_dH and dH is None:
        dH = shrink(dy, lora_B.T, dtype)
    if need_dA:
        if by_library and dropout is NO_DROPOUT:
            dA = torch.addmm(lora_A, dH[:, :r].T, x, beta=0, alpha=scaling)
        else:
            dA, _ = lora_grad(x, dH, lora_A, scaling, features_first=False, dropout=dropout)
    return dA, dB, dH
