"""The oracle: every op in plain PyTorch, for any device and floating dtype. It is readable before it is fast.

16-bit and fp32 inputs are computed in fp32, float64 in float64. Each result is rounded once, to its own dtype. Nothing
is written in place, so that PyTorch can differentiate and batch these functions: autograd.py takes them for derivatives
that the kernels do not compute.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels import transforms
from rosa_kernels.backends.kept_H import H_dtype, padded_rank
from rosa_kernels.dropout import keep_mask, keep_scale

LORA_OPS = None
KEEPS_H = False
"""The formulas of the backward make H themselves, so that they can be differentiated."""


def unavailable_reason() -> str | None:
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, features). The leading sizes are multiplied out, because reshape(-1, ...) cannot do it where features is
    0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)


def _rows(crow: Tensor, nnz: int) -> Tensor:
    return torch.arange(crow.shape[0] - 1, device=crow.device).repeat_interleave(crow.diff(), output_size=nnz)


def _positions(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each entry of S, each (nnz,) int64."""
    return _rows(crow, col.shape[0]), col.long()


def _dense(values: Tensor, crow: Tensor, col: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """S (out_features, in_features)."""
    S = torch.zeros(crow.shape[0] - 1, in_features, dtype=dtype, device=values.device)
    return S.index_put(_positions(crow, col), values.to(dtype))


def _dropout_factor(x2: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """(T, in_features): 1 / (1 - p) where kept, 0 where dropped."""
    keep = keep_mask(seed, x2.shape[0], x2.shape[1], dropout_p)
    return keep.to(x2.dtype) * keep_scale(dropout_p)


def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    if weight is None and lora_A is None:
        return spmm(x, values, crow, col, structure)
    dtype = _compute_dtype(x)
    x2 = _flat(x, dtype)
    added = None
    if lora_A is not None:
        x_hat = x2 if seed is None else x2 * _dropout_factor(x2, dropout_p, seed)
        added = scaling * ((x_hat @ lora_A.to(dtype).T) @ lora_B.to(dtype).T)
    if values is not None:
        sparse = x2 @ _dense(values, crow, col, x.shape[-1], dtype).T
        added = sparse if added is None else added + sparse
    added = added.view(*x.shape[:-1], added.shape[-1])
    if weight is None:
        return added.to(x.dtype)
    return (F.linear(x, weight, bias).to(dtype) + added).to(x.dtype).contiguous()


def rosa_linear_with_H(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    y = rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed)
    return y, H_of(x, lora_A, lora_B, dropout_p, seed)


def H_of(x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x̂ Aᵀ in the form of backends/kept_H.py."""
    dtype, r = _compute_dtype(x), lora_A.shape[0]
    x2 = _flat(x, dtype)
    x_hat = x2 if seed is None else x2 * _dropout_factor(x2, dropout_p, seed)
    return F.pad(x_hat @ lora_A.to(dtype).T, (0, padded_rank(r) - r)).to(H_dtype(x, lora_A, lora_B))


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    dtype = _compute_dtype(x)
    G = _flat(dy, dtype)
    x2 = _flat(x, dtype)
    dx = dweight = dbias = dA = dB = dvalues = None
    dx_terms = []
    if lora_A is not None:
        A, B = lora_A.to(dtype), lora_B.to(dtype)
        factor = None if seed is None else _dropout_factor(x2, dropout_p, seed)
        x_hat = x2 if factor is None else x2 * factor
        dH = scaling * (G @ B)
        if need_dA:
            dA = (dH.T @ x_hat).to(lora_A.dtype)
        if need_dB:
            dB = (scaling * (G.T @ (x_hat @ A.T))).to(lora_B.dtype)
        if need_dx:
            dx_terms.append(dH @ A if factor is None else (dH @ A) * factor)
    if values is not None:
        rows, columns = _positions(crow, col)
        if need_dx:
            dx_terms.append(G @ _dense(values, crow, col, x.shape[-1], dtype))
            if weight is None and lora_A is None:
                dx_terms = [_without_spread(dx_terms[0], G, values, rows, columns)]
        if need_dvalues:
            dvalues = (G.T @ x2)[rows, columns].to(values.dtype)
    if need_dx:
        if weight is not None:
            dx_terms.append(G @ weight.to(dtype))
        dx = sum(dx_terms).view(x.shape).to(x.dtype)
    if need_dweight:
        dweight = (G.T @ x2).to(dy.dtype)
    if need_dbias:
        dbias = G.sum(0).to(dy.dtype)
    return [dx, dweight, dbias, dA, dB, dvalues]


def spmm(x, values, crow, col, structure):
    dtype = _compute_dtype(x)
    x2 = _flat(x, dtype)
    rows, columns = _positions(crow, col)
    y = x2 @ _dense(values, crow, col, x.shape[-1], dtype).T
    y = _without_spread(y, x2, values, columns, rows)
    return y.view(*x.shape[:-1], y.shape[-1]).to(x.dtype).contiguous()


def _without_spread(product: Tensor, x2: Tensor, values: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """The product of x2 (T, features) and a dense S, without what 0 · NaN and 0 · inf did to it.

    Tokens that are not all finite are multiplied again by the entries of S alone: entry e takes feature inputs[e] of
    x2 to outputs[e]. Where nobody may look at numbers, under vmap and in traces, the product stays as it is.
    """
    if not transforms.holds_numbers(product):
        return product
    tokens = ~x2.isfinite().all(1)
    if not tokens.any():
        return product
    terms = x2[tokens].T[inputs] * values.to(x2.dtype)[:, None]
    sums = torch.zeros(product.shape[1], terms.shape[1], dtype=terms.dtype, device=terms.device)
    return product.index_put((tokens,), sums.index_add(0, outputs, terms).T)


def sddmm(dy, x, crow, col, structure):
    dtype = _compute_dtype(x)
    dW = _flat(dy, dtype).T @ _flat(x, dtype)
    return dW[_positions(crow, col)].to(x.dtype)


def csr_add(weight, values, crow, col):
    dtype = _compute_dtype(weight)
    return (weight.to(dtype) + _dense(values, crow, col, weight.shape[1], dtype)).to(weight.dtype).contiguous()
