"""Library GEMMs by an adapter's small matrix, which may be wider than x.

An fp32 matrix beside bf16 x is split into three bf16 matrices, whose products are added: no precision is lost.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TERMS = 3
"""So many bf16 numbers hold the 24 bits of an fp32, as csrc/cuda/device_functions.h splits them."""
ALIGNMENT = 8
"""Elements. Library GEMMs take other, slower kernels for 16-bit matrices whose rows begin at no multiple of it."""


def few_rows_product(x: Tensor, rows: Tensor) -> Tensor:
    """x rowsᵀ (T, n) in fp32. n is so small that three terms of wider rows (n, in_features) cost little."""
    terms, n = terms_of(rows, x.dtype), rows.shape[0]
    if terms is None:
        return x.float() @ rows.T.float()
    if len(terms) == 1:
        return matmul(x, _aligned(terms[0]).T, torch.float32)[:, :n]
    product = matmul(x, _aligned(torch.cat(terms)).T, torch.float32)[:, : len(terms) * n]
    return product.unflatten(1, (len(terms), n)).sum(1)


def add_few_columns_product(y: Tensor | None, x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """y (or bias) + x columnsᵀ, rounded once, in y's place where there is one. columns (out_features, k) has a small k.

    Columns of x beyond the k-th are zeros.
    """
    terms, k = terms_of(columns, x.dtype), columns.shape[1]
    if terms is None:
        product = x[:, :k].float() @ columns.T.float()
        if y is None and bias is not None:
            product += bias
        return product.to(x.dtype) if y is None else y.add_(product)
    if x.shape[1] > k:
        terms = [F.pad(term, (0, x.shape[1] - k)) for term in terms]
    if len(terms) == 1:
        return plus_product(y, x, terms[0].T, bias)
    return plus_product(y, torch.cat([x] * len(terms), 1), torch.cat(terms, 1).T, bias)


def plus_product(y: Tensor | None, left: Tensor, right: Tensor, bias: Tensor | None, scaling: float = 1.0) -> Tensor:
    """y + scaling · left right, rounded once, in y's place. Without a y it is bias + the product, contiguous."""
    if y is not None:
        return y.addmm_(left, right, alpha=scaling)
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=scaling).contiguous()
    if scaling == 1.0:
        return torch.mm(left, right).contiguous()
    return torch.addmm(left[:, :1], left, right, beta=0, alpha=scaling).contiguous()


def _aligned(rows: Tensor) -> Tensor:
    """The rows, then rows of zeros up to a multiple of ALIGNMENT."""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % ALIGNMENT)) if rows.shape[0] % ALIGNMENT else rows


def terms_of(matrix: Tensor, dtype: torch.dtype) -> list[Tensor] | None:
    """Matrices of x's dtype whose sum is `matrix`, the largest first; None for fp16, whose numbers end at 2**-24."""
    if matrix.dtype == dtype or dtype == torch.float32:
        return [matrix.to(dtype)]
    if dtype == torch.float16:
        return None
    rest, terms = matrix.float(), []
    for _ in range(_TERMS):
        terms.append(rest.to(dtype))
        rest = torch.where(terms[-1].isfinite(), rest - terms[-1].float(), 0)
    return terms


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, both of one dtype. It is rounded once where that is `dtype`; else it is the fp32 sums."""
    if left.dtype in (dtype, torch.float32):
        return left @ right
    if torch.version.hip or left.device.type == "cpu":  # no out_dtype there
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)
