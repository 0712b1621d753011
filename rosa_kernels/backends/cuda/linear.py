"""y and dx by the way that the plan chose: library GEMMs, then one pass over y for what they leave."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends import hardware
from rosa_kernels.backends.cuda import kernels
from rosa_kernels.backends.cuda.mixed import adapters, matmul, terms_of
from rosa_kernels.backends.problem import NO_DROPOUT, Linear, Sparse
from rosa_kernels.pattern import UNSTRUCTURED
from rosa_kernels.plan import cuda as plan
from rosa_kernels.plan import gpu_table


def linear(problem: Linear) -> Tensor:
    """(T, N) in x's dtype, contiguous. H, where known: (T, r rounded up to 16) as kernels.shrink gives it."""
    device, call = problem.x.device, problem.call()
    if call.mixed_values and problem.x.dtype == torch.float16:  # no sum of fp16 numbers holds them: not for the library
        call = call._replace(structure=UNSTRUCTURED)
    rates = gpu_table.rates(device, hardware.target(device))
    return take(problem, plan.choose_linear(call, hardware.shared_memory(device), rates))


def take(problem: Linear, way: plan.CudaWay) -> Tensor:
    x = problem.x
    if way.base == "merged":
        return F.linear(x, problem.merged(), problem.bias).contiguous()
    y = F.linear(x, problem.weight, problem.bias).contiguous() if way.base == "library" else None
    if way.S == "delta":
        y = _plus_product(y, x, problem.delta().T)
    if way.S == "columns":
        y = _plus_columns(y, x, problem.S)
    if way.H == "library":
        H = x @ problem.A.T if problem.H is None else problem.H[:, : problem.B.shape[1]]
        y = _plus_product(y, H, problem.B.T, problem.scaling)
    if way.runs_the_epilogue:
        return _epilogue(y, problem, way)
    return torch.zeros(x.shape[0], problem.N, dtype=x.dtype, device=x.device) if y is None else y


def _plus_product(y: Tensor | None, left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """y + scaling · left right, in y's place where there is one; one rounding."""
    if y is not None:
        return y.addmm_(left, right, alpha=scaling)
    return torch.addmm(left[:, :1], left, right, beta=0, alpha=scaling).contiguous()


def _plus_columns(y: Tensor | None, x: Tensor, S: Sparse) -> Tensor:
    """y + x Sᵀ for an S of whole columns."""
    terms = terms_of(S.whole_columns(), x.dtype)
    gathered = kernels.gather_columns(x, S.col[: terms[0].shape[1]])
    return _plus_product(y, torch.cat([gathered] * len(terms), 1), torch.cat(terms, 1).T)


def _epilogue(y: Tensor | None, problem: Linear, way: plan.CudaWay) -> Tensor:
    """y + scaling · H Bᵀ + x Sᵀ for an H and an S that no library call has served."""
    x, S, accumulate = problem.x, problem.S, y is not None
    if y is None:
        y = torch.empty(x.shape[0], problem.N, dtype=x.dtype, device=x.device)
    H = B = crow = entries = shared_x = columns = D = None
    if way.H == "kernel":
        A, B = adapters(problem.A, problem.B, x.dtype)
        H = problem.H
        if H is None:
            H = kernels.shrink(x, A, problem.dropout if problem.drop_at == "x" else NO_DROPOUT)
    if way.S in ("shared", "global"):
        crow, entries = S.crow, kernels.pack_entries(S)
        shared_x = kernels.unit_stride(x) if way.S == "shared" else None
        columns = kernels.by_columns(x) if way.S == "global" else None
    elif way.S == "rows":
        crow, D = S.crow, _product_with_rows(x, S.whole_rows())
    kernels.epilogue(
        y, accumulate, H, B, problem.scaling, problem.dropout if problem.drop_at == "out" else NO_DROPOUT,
        crow, entries, shared_x, columns, D, x.shape[1],
    )  # fmt: skip
    return y


def _product_with_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x rowsᵀ (T, rows) in fp32."""
    terms = terms_of(rows, x.dtype)
    product = matmul(x, torch.cat(terms).T, torch.float32)
    return product if len(terms) == 1 else product.view(x.shape[0], len(terms), rows.shape[0]).sum(1)
