"""What the arguments of an op must be, so that a backend can trust them. A ValueError or TypeError names the argument.

functional.py checks what a user passes, with a CSRPattern whose indices are checked already. op_checks.py checks what
reaches an op through PyTorch's dispatcher, where the indices are tensors that anybody may have made.
"""

from typing import Any

import torch
from torch import Tensor

from rosa_kernels.pattern import CSRPattern

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
"""The types that the quick check knows. A look here takes half the time of isinstance of a Parameter."""


def linear_fits(x: Any, weight: Any, bias: Any, lora_A: Any, lora_B: Any, values: Any, pattern: Any) -> bool:
    """Whether a call has a weight, lora_A and lora_B and passes check_linear.

    This is the common kind of call, and check_linear takes 10 us on a cold cache.
    """
    return bool(
        type(x) in _TENSORS
        and type(weight) in _TENSORS
        and type(lora_A) in _TENSORS
        and type(lora_B) in _TENSORS
        and weight.device == (device := x.device)
        and lora_A.device == device
        and lora_B.device == device
        and (dtype := x.dtype) in FLOATING
        and weight.dtype is dtype
        and lora_A.dtype in FLOATING
        and lora_B.dtype in FLOATING
        and x.layout is weight.layout is torch.strided
        and len(shape := weight.shape) == 2
        and (shape_x := x.shape)
        and shape_x[-1] == shape[1]
        and len(shape_A := lora_A.shape) == 2
        and shape_A[0] > 0
        and shape_A[1] == shape[1]
        and lora_B.shape == (shape[0], shape_A[0])
        and (
            bias is None
            or (type(bias) in _TENSORS and bias.device == device and bias.dtype == dtype and bias.shape == (shape[0],))
        )
        and (
            values is pattern is None
            or (
                isinstance(pattern, CSRPattern)
                and type(values) in _TENSORS
                and pattern.col_indices.device == device
                and values.device == device
                and values.dtype in FLOATING
                and pattern.shape == shape
                and values.shape == pattern.col_indices.shape
            )
        )
    )


def check_linear_types(
    x: object, weight: object, bias: object, lora_A: object, lora_B: object, values: object, pattern: object
) -> None:
    """Raises TypeError or ValueError where a linear call's arguments have the wrong types or do not come in pairs."""
    check_type("x", x, Tensor)
    tensors = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "values": values}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_type(name, tensor, Tensor)
    if pattern is not None:
        check_type("pattern", pattern, CSRPattern)
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B: expected both or neither")
    if (values is None) != (pattern is None):
        raise ValueError("values and pattern: expected both or neither")
    if lora_A is None and pattern is None:
        raise ValueError("expected lora_A and lora_B, or values and pattern, or both")


def check_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    values: Tensor | None, pattern: CSRPattern | None,
) -> None:  # fmt: skip
    """Raises ValueError where the tensors of a linear call do not fit each other; check_linear_types has passed."""
    out_features = _check_base(x, weight, bias, lora_B, pattern)
    in_features = x.shape[-1]
    if lora_A is not None and lora_B is not None:
        _check_lora(lora_A, lora_B, in_features, out_features, x.device)
    if pattern is not None and values is not None:
        if pattern.shape != (out_features, in_features):
            raise ValueError(f"pattern: expected shape {(out_features, in_features)}, got {pattern.shape}")
        _check_values(values, pattern, x.device)


def check_spmm(x: Tensor, values: Tensor, pattern: CSRPattern) -> None:
    """Raises ValueError or TypeError where the arguments of spmm do not fit each other."""
    if not (isinstance(x, Tensor) and isinstance(values, Tensor) and isinstance(pattern, CSRPattern)):
        check_type("x", x, Tensor)
        check_type("values", values, Tensor)
        check_type("pattern", pattern, CSRPattern)
    _check_features("x", x, pattern.shape[1])
    _check_values(values, pattern, x.device)


def check_sddmm(dy: Tensor, x: Tensor, pattern: CSRPattern) -> None:
    """Raises ValueError or TypeError where the arguments of sddmm do not fit each other."""
    check_type("dy", dy, Tensor)
    check_type("x", x, Tensor)
    check_type("pattern", pattern, CSRPattern)
    _check_features("x", x, pattern.shape[1])
    _check_device("pattern", pattern.device, x.device)
    check_output_gradient(dy, x, pattern.shape[0])


def check_output_gradient(dy: Tensor, x: Tensor, out_features: int) -> None:
    _check_features("dy", dy, out_features)
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"dy: expected leading sizes {tuple(x.shape[:-1])} as x, got {tuple(dy.shape[:-1])}")
    _check_like("dy", dy, x)


def check_csr_add(weight: Tensor, values: Tensor, pattern: CSRPattern) -> None:
    """Raises ValueError or TypeError where the arguments of csr_add do not fit each other."""
    check_type("weight", weight, Tensor)
    check_type("values", values, Tensor)
    check_type("pattern", pattern, CSRPattern)
    _check_floating("weight", weight)
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(f"weight: expected shape {pattern.shape} as the pattern, got {tuple(weight.shape)}")
    _check_values(values, pattern, weight.device)


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def check_dropout_p(dropout_p: float) -> None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1], got {dropout_p}")


def _check_base(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_B: Tensor | None, pattern: CSRPattern | None
) -> int:
    """Checks x, weight and bias; returns out_features."""
    if weight is None:
        _check_dense("x", x)
        if x.dim() < 1:
            raise ValueError("x: expected shape (..., in_features), got a 0-D tensor")
        if pattern is not None:
            return pattern.shape[0]
        assert lora_B is not None, "check_linear_types has seen to it"
        if lora_B.dim() != 2:
            raise ValueError(f"lora_B: expected shape (out_features, r), got {tuple(lora_B.shape)}")
        return lora_B.shape[0]
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    _check_features("x", x, in_features)
    _check_layout("weight", weight)
    _check_like("weight", weight, x)
    if bias is not None:
        if tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias: expected shape ({out_features},), got {tuple(bias.shape)}")
        _check_like("bias", bias, x)
    return out_features


def _check_lora(lora_A: Tensor, lora_B: Tensor, in_features: int, out_features: int, device: torch.device) -> None:
    if lora_A.dim() != 2 or lora_A.shape[0] < 1 or lora_A.shape[1] != in_features:
        raise ValueError(f"lora_A: expected shape (r, {in_features}) with r >= 1, got {tuple(lora_A.shape)}")
    expected = (out_features, lora_A.shape[0])
    if tuple(lora_B.shape) != expected:
        raise ValueError(f"lora_B: expected shape {expected}, got {tuple(lora_B.shape)}")
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check_floating(name, tensor)
        _check_device(name, tensor.device, device)


def _check_values(values: Tensor, pattern: CSRPattern, device: torch.device) -> None:
    if values.dim() != 1 or values.shape[0] != pattern.nnz:
        raise ValueError(f"values: expected shape ({pattern.nnz},), got {tuple(values.shape)}")
    _check_floating("values", values)
    _check_device("values", values.device, device)
    _check_device("pattern", pattern.device, device)


def _check_features(name: str, x: Tensor, features: int) -> None:
    """Raises ValueError where x is no dense floating tensor (..., features)."""
    shape = x.shape
    if x.dtype not in FLOATING or x.layout is not torch.strided:
        _check_dense(name, x)
    if not shape or shape[-1] != features:
        raise ValueError(f"{name}: expected shape (..., {features}), got {tuple(shape)}")


def _check_dense(name: str, x: Tensor) -> None:
    _check_floating(name, x)
    _check_layout(name, x)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor (layout torch.strided), got {tensor.layout}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name}: expected dtype {x.dtype} as x, got {tensor.dtype}")
    _check_device(name, tensor.device, x.device)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_device(name: str, got: torch.device, expected: torch.device) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected on {expected} as x, got {got}")
