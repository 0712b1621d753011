"""The Triton kernels, for CUDA and ROCm GPUs; under TRITON_INTERPRET=1, asked for by name, CPU tensors too."""

import os
import sys

import torch
from torch import Tensor

from rosa_kernels.backends.gemms import low_rank_gradients
from rosa_kernels.backends.shapes import as_matrix

try:
    import triton
except ModuleNotFoundError:
    triton = None
else:
    from rosa_kernels.backends.triton import runtime
    from rosa_kernels.backends.triton.linear import Linear, linear
    from rosa_kernels.backends.triton.low_rank import outer, shrink
    from rosa_kernels.backends.triton.parts import for_readers
    from rosa_kernels.backends.triton.problem import Dropout, sparse_of
    from rosa_kernels.backends.triton.scatter import add_in_place, dense, sum_with
    from rosa_kernels.backends.triton.sddmm import sddmm as _sddmm
    from rosa_kernels.pattern import ROW
    from rosa_kernels.plan import gpu, gpu_table

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def unavailable_reason() -> str | None:
    if triton is None:
        return f"Triton is not installed; {sys.executable} -m pip install triton"
    if not torch.cuda.is_available() and not _emulated():
        return "no CUDA or ROCm device; TRITON_INTERPRET=1 lets it run on CPU tensors, slowly, when asked for by name"
    return None


def _emulated() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" and not (device.type == "cpu" and _emulated()):
        return f"its tensors are on a CUDA or ROCm device, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < _OLDEST:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"it needs a GPU of compute capability 8.0 (Ampere) or newer, this one has {capability}"
    return None


def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    x2 = as_matrix(x)
    S = sparse_of(values, crow, col, structure, x2.shape[1])
    problem = Linear(
        x2,
        lora_B.shape[0] if lora_B is not None else crow.shape[0] - 1,
        weight,
        bias,
        lora_A,
        lora_B,
        scaling,
        S,
        dropout=Dropout.of(dropout_p, seed),
        drop_at="" if seed is None else "x",
        merged=lambda: _merged(weight, lora_A, lora_B, scaling, S),
        delta=lambda: _delta(x2.dtype, lora_A, lora_B, scaling, S),
    )
    return linear(problem).view(*x.shape[:-1], problem.N)


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed, needs
):
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    dy2, x2 = as_matrix(dy), as_matrix(x)
    dropout = Dropout.of(dropout_p, seed)
    S = sparse_of(values, crow, col, structure, x2.shape[1])
    dA, dB, dH = _low_rank_gradients(dy2, x2, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB)
    dx = dvalues = None
    if need_dx:
        dx = linear(
            Linear(
                dy2,
                x2.shape[1],
                None if weight is None else weight.T,
                None,
                None if lora_B is None else lora_B.T,
                None if lora_A is None else lora_A.T,
                scaling,
                None if S is None else S.transposed(ccol, row, permutation),
                dH,
                dropout,
                "" if seed is None else "out",
                lambda: _merged(weight, lora_A, lora_B, scaling, S).T,
                lambda: _delta(x2.dtype, lora_A, lora_B, scaling, S).T,
            )
        ).view(x.shape)
    if need_dvalues:
        rows = row[: S.nnz // x2.shape[1]] if S is not None and structure == ROW else None  # of the first column
        dvalues = _sddmm(dy2, x2, crow, col, structure, values.dtype, rows)
    gradients = (dx, dy2.T @ x2 if need_dweight else None, dy2.sum(0) if need_dbias else None, dA, dB, dvalues)
    return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]


def _low_rank_gradients(dy, x, lora_A, lora_B, scaling, dropout, need_dx, need_dA, need_dB):
    """(dA, dB, dH as unscaled parts): None where not needed, dH for dx where it was made on the way."""
    if not (need_dA or need_dB):
        return None, None, None
    if dropout.seed is None and x.dtype == lora_A.dtype == lora_B.dtype:
        rates = gpu_table.rates(x.device, runtime.target(x.device))
        if gpu.low_rank_gradients_by_library(*dy.shape, x.element_size(), rates):
            dA, dB, dH = low_rank_gradients(dy, x, lora_A, lora_B, scaling, need_dx, need_dA, need_dB)
            return dA, dB, None if dH is None else dH[None]
    dA = dB = dH = None
    dH_readers = x.shape[1] * (need_dx + need_dA)
    if need_dB:
        H = for_readers(shrink(x, lora_A, dropout), dy.shape[1])
        by_the_way = (need_dx or need_dA) and gpu.dy_read_once(lora_B.shape[1])
        dB, dH = outer(dy, H, lora_B, scaling, features_first=True, Q=lora_B if by_the_way else None)
        dH = None if dH is None else for_readers(dH, dH_readers)
    if need_dA:
        if dH is None:
            dH = for_readers(shrink(dy, lora_B.T), dH_readers)
        dA, _ = outer(x, dH, lora_A, scaling, features_first=False, dropout=dropout)
    return dA, dB, dH


def _merged(weight: Tensor, lora_A, lora_B, scaling: float, S) -> Tensor:
    """weight + scaling · B A + S in fp32, for one call."""
    if lora_A is None:
        return sum_with(weight, S)
    total = torch.addmm(weight, lora_B.to(weight.dtype), lora_A.to(weight.dtype), alpha=scaling).contiguous()
    return total if S is None else add_in_place(total, S)


def _delta(dtype: torch.dtype, lora_A, lora_B, scaling: float, S) -> Tensor:
    """scaling · B A + S in the dtype of all three, for one call."""
    if lora_A is None:
        return dense(S, dtype)
    return add_in_place(torch.addmm(lora_B[:, :1], lora_B, lora_A, beta=0, alpha=scaling), S)


def spmm(x, values, crow, col, structure):
    x2 = as_matrix(x)
    N = crow.shape[0] - 1
    S = sparse_of(values, crow, col, structure, x2.shape[1])
    return linear(Linear(x2, N, S=S, delta=lambda: dense(S, x2.dtype))).view(*x.shape[:-1], N)


def sddmm(dy, x, crow, col, structure):
    return _sddmm(as_matrix(dy), as_matrix(x), crow, col, structure, x.dtype)


def csr_add(weight, values, crow, col):
    S = sparse_of(values, crow, col, 0, weight.shape[1])
    return weight.clone(memory_format=torch.contiguous_format) if S is None else sum_with(weight, S)
