"""The base layer's products on a CPU by fp32 GEMMs, PyTorch's or ours, over strips of the weight.

A strip is merged (weight + scaling · B A + S), widened from bf16, or both; it lives for one GEMM. In bf16 x and dy are
widened by chunks of tokens and the fp32 result is rounded once, so that no buffer grows with the tokens. Our GEMM
merges fp32 while it packs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rosa_kernels.backends.cpu import heuristics
from rosa_kernels.backends.cpu.binary import INDICES_CHECKED
from rosa_kernels.backends.cpu.binary import kernels as _kernels

CHUNK_TOKENS = 2048


class Delta(NamedTuple):
    """scaling · B A + S, all fp32 and contiguous; either part may be None."""

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 0.0
    values: Tensor | None = None
    crow: Tensor | None = None
    col: Tensor | None = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta | None, our_gemm: bool) -> Tensor:
    """x (T, in_features) times (weight + delta)ᵀ, plus bias: (T, out_features), in x's dtype. Ours takes fp32 alone."""
    out_features, in_features = weight.shape
    y = x.new_empty(x.shape[0], out_features)
    x = _widened_once(x)
    for begin, end in _strips(out_features, in_features):
        strip_bias, out = None if bias is None else bias[begin:end], y[:, begin:end]
        if our_gemm:
            _kernels.gemm(out, x, weight, strip_bias, *(delta or Delta()), begin, False, INDICES_CHECKED)
        else:
            _multiply(x, merged(weight, delta, torch.float32, rows=(begin, end)).T, strip_bias, out)
    return y


def linear_dx(dy: Tensor, weight: Tensor, delta: Delta | None, our_gemm: bool) -> Tensor:
    """dy (T, out_features) times (weight + delta): (T, in_features) in dy's dtype."""
    out_features, in_features = weight.shape
    dx = dy.new_empty(dy.shape[0], in_features)
    dy = _widened_once(dy)
    for begin, end in _strips(in_features, out_features):
        out = dx[:, begin:end]
        if our_gemm:
            _kernels.gemm(out, dy, weight, None, *(delta or Delta()), begin, True, INDICES_CHECKED)
        else:
            _multiply(dy, merged(weight, delta, torch.float32, columns=(begin, end)), None, out)
    return dx


def linear_dweight(dy: Tensor, x: Tensor, widened: bool) -> Tensor:
    """dyᵀ x: (out_features, in_features) in x's dtype, summed in fp32."""
    if not widened:
        return dy.T @ x
    dweight = torch.zeros(dy.shape[1], x.shape[1])
    for dy_chunk, x_chunk in zip(dy.split(CHUNK_TOKENS), x.split(CHUNK_TOKENS)):
        dweight.addmm_(dy_chunk.float().T, x_chunk.float())
    return dweight.to(x.dtype)


def merged(weight: Tensor, delta: Delta | None, dtype: torch.dtype, rows=None, columns=None) -> Tensor:
    """weight + delta, or those (begin, end) rows or columns of it, in float32, or in weight's dtype where r = 0."""
    (first_row, end_row), (first_column, end_column) = rows or (0, weight.shape[0]), columns or (0, weight.shape[1])
    out = torch.empty(end_row - first_row, end_column - first_column, dtype=dtype)
    _kernels.merge(out, weight, *(delta or Delta()), first_row, first_column, INDICES_CHECKED)
    return out


def _strips(count: int, length: int) -> list[tuple[int, int]]:
    """(begin, end) of equal strips of `count` vectors of this length."""
    strips = heuristics.strip_count(count * length)
    return [(count * i // strips, count * (i + 1) // strips) for i in range(strips)]


def _widened_once(x: Tensor) -> Tensor:
    """x in fp32 where it is one chunk, so that the strips do not widen it one after the other."""
    return x.float() if x.shape[0] <= CHUNK_TOKENS else x


@torch.no_grad()  # exported programs call ops with parameters above autograd, where out= would refuse them
def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x · matrix + bias, the matrix in fp32, x, bias and out in fp32 or bf16."""
    if out.dtype == matrix.dtype:
        torch.mm(x, matrix, out=out) if bias is None else torch.addmm(bias, x, matrix, out=out)
        return
    wide_bias = None if bias is None else bias.float()
    for begin in range(0, x.shape[0], CHUNK_TOKENS):
        wide = x[begin : begin + CHUNK_TOKENS].float()
        product = wide @ matrix if bias is None else torch.addmm(wide_bias, wide, matrix)
        out[begin : begin + CHUNK_TOKENS].copy_(product)
