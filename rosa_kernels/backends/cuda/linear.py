"""y and dx by the way that the plan chose: library GEMMs, then one pass over y for what they leave."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rosa_kernels.backends.cuda import bindings, heuristics
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Linear
from rosa_kernels.backends.gpu.split_bf16_gemm import adapters, add_few_columns_product, few_rows_product, plus_product


def linear(problem: Linear) -> Tensor:
    """(T, N) in x's dtype, contiguous. H, where known: (T, r rounded up to 16) as bindings.shrink gives it."""
    device = problem.x.device
    rates = device_rates.rates(device, hardware.target(device))
    return take(problem, heuristics.choose_linear(problem.call(), hardware.shared_memory(device), rates))


def take(problem: Linear, way: heuristics.CudaWay) -> Tensor:
    x, S = problem.x, problem.S
    if way.base == "merged":
        return F.linear(x, problem.merged(), problem.bias).contiguous()
    y = F.linear(x, problem.weight, problem.bias).contiguous() if way.base == "library" else None
    if way.S == "delta":
        y = plus_product(y, x, problem.delta().T)
    if way.S == "columns":
        columns = problem.operand(S.whole_columns())
        y = add_few_columns_product(y, bindings.gather_columns(x, S.col[: columns.shape[1]]), columns)
    if way.H == "library":
        H = x @ problem.A.T if problem.H is None else problem.H[:, : problem.B.shape[1]]
        y = plus_product(y, H, problem.B.T, problem.scaling)
    if way.runs_the_epilogue:
        return _epilogue(y, problem, way)
    return torch.zeros(x.shape[0], problem.N, dtype=x.dtype, device=x.device) if y is None else y


def _epilogue(y: Tensor | None, problem: Linear, way: heuristics.CudaWay) -> Tensor:
    """y + scaling · H Bᵀ + x Sᵀ for an H and an S that no library call has served."""
    x, S, accumulate = problem.x, problem.S, y is not None
    if y is None:
        y = torch.empty(x.shape[0], problem.N, dtype=x.dtype, device=x.device)
    H = B = crow = entries = shared_x = columns = D = None
    if way.H == "kernel":
        A, B = adapters(problem.A, problem.B, x.dtype)
        H = problem.H
        if H is None:
            H = bindings.shrink(x, A, problem.dropout if problem.drop_at == "x" else NO_DROPOUT)
    if way.S in ("shared", "global"):
        crow, entries = S.crow, bindings.pack_entries(S)
        shared_x = bindings.unit_stride(x) if way.S == "shared" else None
        columns = bindings.transpose(x) if way.S == "global" else None
    elif way.S == "rows":
        crow, D = S.crow, few_rows_product(x, problem.operand(S.whole_rows())).contiguous()
    bindings.epilogue(
        y, accumulate, H, B, problem.scaling, problem.dropout if problem.drop_at == "out" else NO_DROPOUT,
        crow, entries, shared_x, columns, D, x.shape[1],
    )  # fmt: skip
    return y
