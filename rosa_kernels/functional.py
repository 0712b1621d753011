"""The functions that a user calls. They check every argument, so that a backend can trust what it gets."""

import torch
from torch import Tensor

from rosa_kernels import direct_call, dispatch, dropout, ops
from rosa_kernels.autograd import CSRAddFunction, RoSALinearFunction, SDDMMFunction, SpMMFunction
from rosa_kernels.pattern import UNSTRUCTURED, CSRPattern

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    *, dropout_p: float = 0.0, training: bool = True,
) -> Tensor:  # fmt: skip
    """A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685, eq. 3).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ.

    All tensors are on one device. Each that requires a gradient gets one, in its own dtype; the gradients themselves
    cannot be differentiated again.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        weight: (out_features, in_features), in x's dtype.
        bias: (out_features,), in x's dtype, or None.
        lora_A: (r, in_features), r at least 1, in any of the four dtypes.
        lora_B: (out_features, r), in any of the four dtypes.
        scaling: the factor of the low-rank part, usually lora_alpha / r.
        dropout_p: the chance in [0, 1] that an element of x is zeroed on its way to lora_A; the others grow by
            1 / (1 - dropout_p). The mask's seed is drawn from PyTorch's generator of x's device.
        training: False switches dropout off.

    Returns:
        (..., out_features), in x's dtype. Sums are accumulated in float32, of float64 in float64.

    Raises:
        ValueError: an argument's shape, dtype, device or range is another one; the message names the argument.
        TypeError: an argument has the wrong Python type.
        RuntimeError: a backend that use_backend asks for by name cannot serve x's device and dtype.
    """
    return _rosa_linear(x, weight, bias, lora_A, lora_B, scaling, None, None, dropout_p, training)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, pattern: CSRPattern) -> Tensor:
    """A linear layer with a sparse adapter S: y = x Wᵀ + b + x Sᵀ.

    The arguments are those of rosa_linear, and so are the result, the gradients and the errors.
    """
    return _rosa_linear(x, weight, bias, None, None, 1.0, values, pattern, 0.0, False)


def rosa_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    values: Tensor, pattern: CSRPattern, *, dropout_p: float = 0.0, training: bool = True,
) -> Tensor:  # fmt: skip
    """A linear layer with a low-rank and a sparse adapter (RoSA, arXiv 2401.04679, section 3.2).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ. Dropout acts on the low-rank part alone.

    Args:
        x, weight, bias, lora_A, lora_B, scaling, dropout_p, training: as in lora_linear.
        values: (nnz,), float32, bfloat16, float16 or float64: the non-zero entries of S, in the order of ``pattern``.
        pattern: where they sit in S; its shape is that of weight, its device that of x.

    Returns:
        (..., out_features), in x's dtype; gradients and errors as in lora_linear.
    """
    return _rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, pattern, dropout_p, training)


def rosa_delta(
    x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float,
    values: Tensor | None, pattern: CSRPattern | None, *, dropout_p: float = 0.0, training: bool = True,
) -> Tensor:  # fmt: skip
    """The adapter's part alone, scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ, to be added to what a base layer computes.

    lora_A and lora_B may both be None, or values and pattern. Otherwise the arguments, the result, the gradients and
    the errors are those of rosa_linear.
    """
    return _rosa_linear(x, None, None, lora_A, lora_B, scaling, values, pattern, dropout_p, training)


def spmm(x: Tensor, values: Tensor, pattern: CSRPattern) -> Tensor:
    """The product of a dense and a sparse matrix: x Sᵀ.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64.
        values: (nnz,), in any of these dtypes: the non-zero entries of S, in the order of ``pattern``.
        pattern: where they sit in S (out_features, in_features); on x's device, as values.

    Returns:
        (..., out_features), in x's dtype. Each gradient has its own tensor's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument has the wrong Python type.
    """
    _check_type("x", x, Tensor)
    _check_type("values", values, Tensor)
    _check_type("pattern", pattern, CSRPattern)
    _check_x(x, "x", pattern.shape[1])
    _check_values(values, pattern, x.device)
    if _wants_grad(x, values):
        return SpMMFunction.apply(
            x, values, pattern.crow_indices, pattern.col_indices, *pattern.transpose(), pattern.structure
        )
    return ops.spmm(x, values, pattern.crow_indices, pattern.col_indices, pattern.structure)


def sddmm(dy: Tensor, x: Tensor, pattern: CSRPattern) -> Tensor:
    """The entries of dyᵀ x where a pattern has entries: Σ_t dy[t, row_e] · x[t, col_e] for each entry e.

    This is the gradient of spmm's values.

    Args:
        dy: (..., out_features), with x's leading sizes, dtype and device.
        x: (..., in_features), float32, bfloat16, float16 or float64.
        pattern: of shape (out_features, in_features), on x's device.

    Returns:
        (nnz,), in x's dtype, in the order of ``pattern``.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument has the wrong Python type.
    """
    _check_type("dy", dy, Tensor)
    _check_type("x", x, Tensor)
    _check_type("pattern", pattern, CSRPattern)
    _check_x(x, "x", pattern.shape[1])
    _check_x(dy, "dy", pattern.shape[0])
    _check_device("pattern", pattern.device, x.device)
    if dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"dy: expected leading sizes {tuple(x.shape[:-1])} as x, got {tuple(dy.shape[:-1])}")
    _check_like("dy", dy, x)
    if _wants_grad(dy, x):
        return SDDMMFunction.apply(
            dy, x, pattern.crow_indices, pattern.col_indices, *pattern.transpose(), pattern.structure
        )
    return ops.sddmm(dy, x, pattern.crow_indices, pattern.col_indices, pattern.structure)


def csr_add(weight: Tensor, values: Tensor, pattern: CSRPattern) -> Tensor:
    """weight + S as a new dense tensor; weight stays as it is.

    Args:
        weight: (out_features, in_features), float32, bfloat16, float16 or float64.
        values: (nnz,), in any of these dtypes: the non-zero entries of S, in the order of ``pattern``.
        pattern: where they sit in S; its shape and device are those of weight.

    Returns:
        (out_features, in_features), in weight's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument has the wrong Python type.
    """
    _check_type("weight", weight, Tensor)
    _check_type("values", values, Tensor)
    _check_type("pattern", pattern, CSRPattern)
    _check_floating("weight", weight)
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(f"weight: expected shape {pattern.shape} as the pattern, got {tuple(weight.shape)}")
    _check_values(values, pattern, weight.device)
    if _wants_grad(weight, values):
        return CSRAddFunction.apply(weight, values, pattern.crow_indices, pattern.col_indices, pattern.row_of_entry())
    return ops.csr_add(weight, values, pattern.crow_indices, pattern.col_indices)


def _rosa_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    scaling: float, values: Tensor | None, pattern: CSRPattern | None, dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    crow = col = None
    structure = UNSTRUCTURED
    if isinstance(pattern, CSRPattern):
        crow, col, structure = pattern.crow_indices, pattern.col_indices, pattern.structure
    through_dispatcher = direct_call.needs_dispatcher((x, weight, bias, lora_A, lora_B, values, crow, col))
    if through_dispatcher or not _fits(x, weight, bias, lora_A, lora_B, values, pattern):
        x, weight, bias = _checked(x, weight, bias, lora_A, lora_B, values, pattern)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a number in [0, 1], got {dropout_p}")
    seed = None
    if training and dropout_p > 0 and lora_A is not None:
        seed = dropout.new_seed(x.device)
    scaling, dropout_p = float(scaling), float(dropout_p)
    if _wants_grad(x, weight, bias, lora_A, lora_B, values):
        transposed = (None, None, None) if pattern is None else pattern.transpose()
        return RoSALinearFunction.apply(
            x, weight, bias, lora_A, lora_B, scaling, values, crow, col, *transposed, structure, dropout_p, seed
        )
    call = ops.rosa_linear if through_dispatcher else dispatch.backend_for(x).rosa_linear
    return call(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed)


def _fits(
    x: object, weight: object, bias: object, lora_A: object, lora_B: object, values: object, pattern: object
) -> bool:
    """Whether a call has a weight, lora_A and lora_B and passes every check of _checked.

    This is the common kind of call, and _checked takes 10 us on a cold cache. The quick check knows nothing of
    autocast, under which direct_call.needs_dispatcher is true and _checked runs.
    """
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(lora_A, Tensor)
        and isinstance(lora_B, Tensor)
        and weight.device == (device := x.device)
        and lora_A.device == device
        and lora_B.device == device
        and (dtype := x.dtype) in _FLOATING
        and weight.dtype == dtype
        and lora_A.dtype in _FLOATING
        and lora_B.dtype in _FLOATING
        and len(shape := weight.shape) == 2
        and len(shape_x := x.shape) > 0
        and shape_x[-1] == shape[1]
        and len(shape_A := lora_A.shape) == 2
        and shape_A[0] > 0
        and shape_A[1] == shape[1]
        and lora_B.shape == (shape[0], shape_A[0])
        and (
            bias is None
            or (
                isinstance(bias, Tensor) and bias.device == device and bias.dtype == dtype and bias.shape == (shape[0],)
            )
        )
        and (
            values is pattern is None
            or (
                isinstance(pattern, CSRPattern)
                and isinstance(values, Tensor)
                and pattern.col_indices.device == device
                and values.device == device
                and values.dtype in _FLOATING
                and pattern.shape == shape
                and values.shape == pattern.col_indices.shape
            )
        )
    )


def _checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    values: Tensor | None, pattern: CSRPattern | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x, weight and bias as autocast wants them, where all arguments are right; a ValueError or TypeError elsewhere."""
    _check_type("x", x, Tensor)
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
        ("values", values),
    ):
        if tensor is not None:
            _check_type(name, tensor, Tensor)
    if pattern is not None:
        _check_type("pattern", pattern, CSRPattern)
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B: expected both or neither")
    if (values is None) != (pattern is None):
        raise ValueError("values and pattern: expected both or neither")
    if lora_A is None and pattern is None:
        raise ValueError("expected lora_A and lora_B, or values and pattern, or both")
    x, weight, bias = _autocast(x, weight, bias)
    out_features = _check_base(x, weight, bias, lora_B, pattern)
    in_features = x.shape[-1]
    if lora_A is not None and lora_B is not None:
        _check_lora(lora_A, lora_B, in_features, out_features, x.device)
    if pattern is not None and values is not None:
        if pattern.shape != (out_features, in_features):
            raise ValueError(f"pattern: expected shape {(out_features, in_features)}, got {pattern.shape}")
        _check_values(values, pattern, x.device)
    return x, weight, bias


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias as torch.nn.functional.linear sees them under torch.autocast. Adapters keep their dtype."""
    device_type = x.device.type
    if not ops.autocast_enabled(device_type):
        return x, weight, bias
    autocast_dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(autocast_dtype) if eligible else tensor

    return cast(x), None if weight is None else cast(weight), None if bias is None else cast(bias)


def _check_base(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_B: Tensor | None, pattern: CSRPattern | None
) -> int:
    """Checks x, weight and bias; returns out_features."""
    if weight is None:
        _check_floating("x", x)
        if x.dim() < 1:
            raise ValueError("x: expected shape (..., in_features), got a 0-D tensor")
        if pattern is not None:
            return pattern.shape[0]
        assert lora_B is not None, "_checked has seen to it"
        if lora_B.dim() != 2:
            raise ValueError(f"lora_B: expected shape (out_features, r), got {tuple(lora_B.shape)}")
        return lora_B.shape[0]
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (out_features, in_features), got {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    _check_x(x, "x", in_features)
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


def _check_x(x: Tensor, name: str, features: int) -> None:
    _check_floating(name, x)
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"{name}: expected shape (..., {features}), got {tuple(x.shape)}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name}: expected dtype {x.dtype} as x, got {tensor.dtype}")
    _check_device(name, tensor.device, x.device)


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_device(name: str, got: torch.device, expected: torch.device) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected on {expected} as x, got {got}")
