"""The C++ kernels of csrc/, around PyTorch's own GEMMs for the base layer; fp32 and bf16, accumulated in fp32."""

from pathlib import Path

import torch
import torch.nn.functional as F

from rosa_kernels.backends.gemms import low_rank_gradients
from rosa_kernels.backends.shapes import as_matrix
from rosa_kernels.dropout import drop_threshold, keep_scale
from rosa_kernels.plan import cpu as plan

_DTYPES = (torch.float32, torch.bfloat16)
_library = next(Path(__file__).parent.parent.glob("_C.*so"), None)
if _library is not None:
    torch.ops.load_library(_library)
_kernels = torch.ops.rosa_kernels_cpu


def unavailable_reason() -> str | None:
    if _library is None:
        return (
            "the C++ kernels were not built; install a C++17 compiler (apt install g++, dnf install gcc-c++, "
            "xcode-select --install) and run pip install -e . again"
        )
    return None


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its tensors are on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def instruction_set() -> str:
    return _kernels.instruction_set()


def build_info() -> str:
    """Compiler and flags of the kernels."""
    return _kernels.build_info()


def rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    if plan.merges(x, weight, seed):
        return F.linear(x, _merged(weight, _low_rank(lora_A, lora_B, scaling), _floats(values), crow, col), bias)
    if weight is None:
        out_features = crow.shape[0] - 1 if lora_B is None else lora_B.shape[0]
        y = x.new_zeros(*x.shape[:-1], out_features)
    else:
        y = F.linear(x, weight, bias).contiguous()
    if plan.low_rank_by_gemm(x, lora_A, lora_B, values, seed):
        as_matrix(y).addmm_(as_matrix(x) @ lora_A.T, lora_B.T, alpha=scaling)
    else:
        _add_forward(y, x, _low_rank(lora_A, lora_B, scaling), _floats(values), crow, col, structure, dropout_p, seed)
    return y


def rosa_linear_backward(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed, needs
):
    need_dx, need_dweight, need_dbias, need_dA, need_dB, need_dvalues = needs
    dy2, x2 = _matrix(dy), _matrix(x)
    low_rank = _low_rank(lora_A, lora_B, scaling)
    values_fp32 = _floats(values)
    merges = plan.merges(x, weight, seed)
    dx2 = None
    if need_dx and merges:
        dx2 = dy2 @ _merged(weight, low_rank, values_fp32, crow, col)
    elif need_dx:
        dx2 = torch.zeros_like(x2) if weight is None else dy2 @ weight
    dx_to_add = None if merges else dx2
    if not merges and plan.low_rank_by_gemm(x, lora_A, lora_B, values, seed):
        dA, dB, dH = low_rank_gradients(dy2, x2, lora_A, lora_B, scaling, dx_to_add is not None, need_dA, need_dB)
        if dx_to_add is not None:
            dx_to_add.addmm_(dH, lora_A, alpha=scaling)
        dvalues = None
    else:
        dA, dB, dvalues = (
            torch.zeros(source.shape, dtype=torch.float32) if need else None
            for need, source in ((need_dA, lora_A), (need_dB, lora_B), (need_dvalues, values))
        )
        if any(gradient is not None for gradient in (dx_to_add, dA, dB, dvalues)):
            _kernels.backward(
                dx_to_add, dA, dB, dvalues, dy2, x2, *low_rank, values_fp32, crow, col, ccol, row, permutation,
                structure, *_dropout(dropout_p, seed),
            )  # fmt: skip
    gradients = (
        dx2.view(x.shape) if need_dx else None,
        dy2.T @ x2 if need_dweight else None,
        dy2.sum(0) if need_dbias else None,
        dA.to(lora_A.dtype) if need_dA else None,
        dB.to(lora_B.dtype) if need_dB else None,
        dvalues.to(values.dtype) if need_dvalues else None,
    )
    return [dy.new_empty(0) if gradient is None else gradient for gradient in gradients]


def spmm(x, values, crow, col, structure):
    y = x.new_zeros(*x.shape[:-1], crow.shape[0] - 1)
    _add_forward(y, x, (None, None, 0.0), _floats(values), crow, col, structure, 0.0, None)
    return y


def sddmm(dy, x, crow, col, structure):
    dvalues = torch.zeros(col.shape, dtype=torch.float32)
    # The kernel takes S whole: its values are not read for dS.
    _kernels.backward(
        None, None, None, dvalues, _matrix(dy), _matrix(x), None, None, 0.0, dvalues, crow, col, None, None, None,
        structure, None, 0, 0.0,
    )  # fmt: skip
    return dvalues.to(x.dtype)


def csr_add(weight, values, crow, col):
    return _merged(weight, (None, None, 0.0), _floats(values), crow, col)


def _merged(weight, low_rank, values, crow, col):
    """weight + scaling · B A + S, for one call."""
    weight = _matrix(weight)
    out = torch.empty(weight.shape, dtype=weight.dtype)
    _kernels.merge(out, weight, *low_rank, values, crow, col)
    return out


def _add_forward(y, x, low_rank, values, crow, col, structure, dropout_p, seed) -> None:
    _kernels.forward(as_matrix(y), _matrix(x), *low_rank, values, crow, col, structure, *_dropout(dropout_p, seed))


def _matrix(tensor):
    """as_matrix with unit column stride and rows that do not overlap, as the kernels read it."""
    matrix = as_matrix(tensor)
    row_stride, column_stride = matrix.stride()
    return matrix if column_stride == 1 and row_stride >= matrix.shape[1] else matrix.contiguous()


def _floats(tensor):
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def _low_rank(lora_A, lora_B, scaling):
    return _floats(lora_A), _floats(lora_B), scaling


def _dropout(dropout_p, seed):
    """(seed, threshold, scale) as the kernels take them."""
    if seed is None:
        return None, 0, 1.0
    return seed, drop_threshold(dropout_p), keep_scale(dropout_p)
