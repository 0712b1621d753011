"""The functions that a user calls. They check every argument, so that a backend can trust what it gets."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rosa_kernels import checks, direct_call, dispatch, dropout, jagged, ops
from rosa_kernels.autograd import CSRAddFunction, LinearSettings, SDDMMFunction, SpMMFunction, apply_linear, apply_lora
from rosa_kernels.pattern import UNSTRUCTURED, CSRPattern


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float,
    *, dropout_p: float = 0.0, training: bool = True,
) -> Tensor:  # fmt: skip
    """A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685, eq. 3).

    y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ.

    All tensors are on one device. Each that requires a gradient gets one, in its own dtype. The gradients can be
    differentiated again, and so can everything by forward mode and by torch.func's transforms. For these PyTorch
    computes the formula itself, without the kernels.

    Args:
        x: (..., in_features), float32, bfloat16, float16 or float64. A nested tensor of layout torch.jagged gives one.
        weight: (out_features, in_features), in x's dtype.
        bias: (out_features,), in x's dtype, or None.
        lora_A: (r, in_features), r at least 1, in any of the four dtypes.
        lora_B: (out_features, r), in any of the four dtypes.
        scaling: the factor of the low-rank part, usually lora_alpha / r.
        dropout_p: the chance in [0, 1] that an element of x is zeroed on its way to lora_A; the others grow by
            1 / (1 - dropout_p). The mask's seed is drawn from PyTorch's generator of x's device.
        training: False switches dropout off.

    Returns:
        (..., out_features), in x's dtype. Sums are accumulated in float32, of float64 in float64. A library GEMM on a
        GPU may add parts of 16-bit sums in 16 bits, where PyTorch's switches in torch.backends.cuda.matmul allow it.

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
    if type(x) is not Tensor and getattr(x, "is_nested", False):
        return _jagged_spmm(x, values, pattern)
    checks.check_spmm(x, values, pattern)
    args = (x, values, pattern.crow_indices, pattern.col_indices, pattern.structure)
    return _call("spmm", SpMMFunction, args, _wants_grad(x, values), pattern)


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
    checks.check_sddmm(dy, x, pattern)
    args = (dy, x, pattern.crow_indices, pattern.col_indices, pattern.structure)
    return _call("sddmm", SDDMMFunction, args, _wants_grad(dy, x), pattern)


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
    checks.check_csr_add(weight, values, pattern)
    args = (weight, values, pattern.crow_indices, pattern.col_indices)
    return _call("csr_add", CSRAddFunction, args, _wants_grad(weight, values))


def _rosa_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None,
    scaling: float, values: Tensor | None, pattern: CSRPattern | None, dropout_p: float, training: bool,
) -> Tensor:  # fmt: skip
    crow = col = None
    structure = UNSTRUCTURED
    if isinstance(pattern, CSRPattern):
        crow, col, structure = pattern.crow_indices, pattern.col_indices, pattern.structure
    through_dispatcher = direct_call.needs_dispatcher((x, weight, bias, lora_A, lora_B, values, crow, col))
    try:
        fits = not through_dispatcher and checks.linear_fits(x, weight, bias, lora_A, lora_B, values, pattern)
    except RuntimeError:  # nested tensors of layout torch.strided tell nobody their shape
        fits = False
    if not fits:
        checks.check_linear_types(x, weight, bias, lora_A, lora_B, values, pattern)
        if x.is_nested:
            return _jagged_linear(x, weight, bias, lora_A, lora_B, scaling, values, pattern, dropout_p, training)
        if _must_leave_autocast(x):
            x, weight, bias = _autocast(x, weight, bias)
            with torch.autocast(x.device.type, enabled=False):
                return _rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, pattern, dropout_p, training)
        x, weight, bias = _autocast(x, weight, bias)
        checks.check_linear(x, weight, bias, lora_A, lora_B, values, pattern)
    if not 0 <= dropout_p <= 1:
        checks.check_dropout_p(dropout_p)
    seed = None
    if training and dropout_p > 0 and lora_A is not None:
        seed = dropout.new_seed(x.device)
    scaling, dropout_p = float(scaling), float(dropout_p)
    if through_dispatcher:
        by_columns = (None, None, None) if pattern is None else pattern.transpose()
        return torch.ops.rosa_kernels.rosa_linear(
            x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, *by_columns
        )
    backend = dispatch.backend_for(x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (lora_A is not None and lora_A.requires_grad)
        or (lora_B is not None and lora_B.requires_grad)
        or (values is not None and values.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        lora_alone = pattern is None and seed is None and lora_A is not None
        if lora_alone and _is_lora_step(backend, x, weight, bias, lora_A, lora_B):
            return apply_lora(x, weight, bias, lora_A, lora_B, scaling, *backend.LORA_OPS)
        settings = LinearSettings(backend, scaling, pattern, dropout_p, seed)
        return apply_linear(x, weight, bias, lora_A, lora_B, values, settings)
    return backend.rosa_linear(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed)


def _is_lora_step(backend: Any, x: Tensor, weight: Any, bias: Any, lora_A: Any, lora_B: Any) -> bool:
    """Whether LoRAFunction computes the call and its gradients: W and b are frozen, and library GEMMs are cheapest."""
    return (
        backend.LORA_OPS is not None
        and weight is not None
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and backend.lora_step_by_library(x, lora_A, lora_B)
    )


def _must_leave_autocast(x: Tensor) -> bool:
    """Whether autocast is on, as a backend's own calls must keep the dtypes that they are given.

    In a program that PyTorch compiles, the op switches autocast off when it runs.
    """
    return ops.autocast_enabled(x.device.type) and not torch.compiler.is_compiling()


def _jagged_linear(x: Tensor, *rest: Any) -> Tensor:
    return jagged.on_values(lambda tokens: _rosa_linear(tokens, *rest), x)


def _call(
    name: str, function: type[Function], args: tuple, wants_grad: bool, by_columns_of: CSRPattern | None = None
) -> Tensor:
    """An op by way of PyTorch's dispatcher where something looks for it, else past it."""
    through_dispatcher = direct_call.needs_dispatcher(args)
    if not wants_grad and not through_dispatcher:
        return getattr(dispatch.backend_for(args[0]), name)(*args)
    if by_columns_of is not None:
        args += by_columns_of.transpose()
    if through_dispatcher:
        if _must_leave_autocast(args[0]):  # under vmap the op could not leave it any more
            with torch.autocast(args[0].device.type, enabled=False):
                return getattr(torch.ops.rosa_kernels, name)(*args)
        return getattr(torch.ops.rosa_kernels, name)(*args)
    return function.apply(dispatch.backend_for(args[0]), *args)


def _jagged_spmm(x: Tensor, values: Tensor, pattern: CSRPattern) -> Tensor:
    return jagged.on_values(lambda tokens: spmm(tokens, values, pattern), x)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias as torch.nn.functional.linear sees them under torch.autocast. Adapters keep their dtype."""
    if not ops.autocast_enabled(x.device.type):
        return x, weight, bias
    autocast_dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(autocast_dtype) if eligible else tensor

    return cast(x), None if weight is None else cast(weight), None if bias is None else cast(bias)
