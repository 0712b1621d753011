"""The derivatives of the ops: which tensors a forward saves, and which gradients its backward returns.

A forward saves its inputs. On a GPU it saves H = x̂ Aᵀ too, which is small, and which the backward would read all of x
to make again. Activation checkpointing makes H again with the rest of a forward.

An op that is called through PyTorch's dispatcher comes here by its Autograd key, the package's own calls by ``apply``.
Both say which backend serves them. First derivatives in reverse mode are kernels. The others are those of the plain
PyTorch formulas of backends/reference.py: derivatives of rosa_linear_backward, forward mode, and the transforms of
torch.func.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rosa_kernels import direct_call, dispatch, op_checks, ops, transforms
from rosa_kernels.backends import reference
from rosa_kernels.pattern import UNSTRUCTURED, CSRPattern, transposed_structure


def _forward(ctx, name, backend, *args):
    """The op by this backend, or where that is None through PyTorch's dispatcher, below autograd.

    It notes in ctx what _backward must know.
    """
    ctx.choice, ctx.through_dispatcher = dispatch.chosen(), backend is None
    if backend is not None:
        return getattr(backend, name)(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.rosa_kernels, name)(*args)


def _backward(ctx, name, *args):
    """The op on the backend that use_backend chose for the forward, in whichever thread the backward runs.

    It is differentiable itself where a graph of the backward is asked for (create_graph=True). After a forward that
    came through the dispatcher the op checks its indices again, because nobody else may have.
    """
    token = dispatch.choice.set(ctx.choice)
    try:
        if ctx.through_dispatcher or torch.is_grad_enabled() or direct_call.needs_dispatcher(args):
            with ops.without_autocast(args[0].device.type):
                return getattr(torch.ops.rosa_kernels, name)(*args)
        return getattr(dispatch.backend_for(args[0]), name)(*args)
    finally:
        dispatch.choice.reset(token)


def _by_columns(saved, crow, col, in_features):
    """ccol, row and permutation as saved, or made again where a call came without them."""
    if saved[0] is not None:
        return saved
    return CSRPattern._trusted(crow, col, (crow.shape[0] - 1, in_features), UNSTRUCTURED, None).transpose()


class LinearSettings(NamedTuple):
    """What a call of rosa_linear has beside the tensors that may want a gradient."""

    backend: ModuleType | None
    """None: the call came through PyTorch's dispatcher, and goes on through it."""
    scaling: float
    pattern: CSRPattern | None
    dropout_p: float
    seed: Tensor | None


class RoSALinearFunction(Function):
    """y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ + x Sᵀ; W, b, A with B, and S may each be None."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, values, settings):
        backend, scaling, pattern, dropout_p, seed = ctx.settings = settings
        ctx.needs = needs = list(ctx.needs_input_grad[:6])
        crow = col = H = None
        structure = UNSTRUCTURED
        if pattern is not None:
            crow, col, structure = pattern.crow_indices, pattern.col_indices, pattern.structure
        keeps_H = needs[4] and (ops.keeps_H(x) if backend is None else backend.KEEPS_H)
        result = _forward(
            ctx, "rosa_linear_with_H" if keeps_H else "rosa_linear", backend,
            x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed,
        )  # fmt: skip
        y, H = result if keeps_H else (result, None)
        ctx.save_for_backward(x, weight if needs[0] else None, lora_A, lora_B, values, crow, col, seed, H)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, values, crow, col, seed, H = ctx.saved_tensors
        backend, scaling, pattern, dropout_p, _ = ctx.settings
        needs, by_columns, structure = ctx.needs, (None, None, None), UNSTRUCTURED
        if pattern is not None:
            by_columns, structure = pattern.transpose(), pattern.structure
        args = (
            dy, x, weight, lora_A, lora_B, scaling, values, crow, col, *by_columns, structure, dropout_p, seed, needs, H
        )  # fmt: skip
        tensors = dy, x, weight, lora_A, lora_B, values, crow, col, seed, H
        if backend is not None and not torch.is_grad_enabled() and not direct_call.needs_dispatcher(tensors):
            return *backend.rosa_linear_backward(*args), None
        gradients = _backward(ctx, "rosa_linear_backward", *args)
        return *(gradient if need else None for gradient, need in zip(gradients, needs)), None


class LoRAFunction(Function):
    """y = x Wᵀ + b + scaling · x Aᵀ Bᵀ by library GEMMs on a GPU, W and b frozen: the commonest step, with the least
    Python around it. lora and lora_backward are the ops of backends/gpu/library_ops.py."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, lora, lora_backward):
        need_x, _, _, _, need_B, *_ = ctx.needs_input_grad
        y, H = lora(x, weight, bias, lora_A, lora_B, scaling, need_B)
        ctx.save_for_backward(x, weight if need_x else None, lora_A, lora_B, H)
        ctx.scaling, ctx.lora_backward, ctx.choice = scaling, lora_backward, dispatch.chosen()
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, H = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        if not torch.is_grad_enabled() and not direct_call.needs_dispatcher((dy, x, weight, lora_A, lora_B, H)):
            needs = need_x + 2 * need_A + 4 * need_B
            dx, dA, dB = ctx.lora_backward(dy, x, weight, lora_A, lora_B, H, ctx.scaling, needs)
            return dx, None, None, dA, dB, None, None, None
        ctx.through_dispatcher = False
        gradients = _backward(
            ctx, "rosa_linear_backward",
            dy, x, weight, lora_A, lora_B, ctx.scaling, *(None,) * 6, UNSTRUCTURED, 0.0, None,
            [need_x, False, False, need_A, need_B, False], H,
        )  # fmt: skip
        dx, _, _, dA, dB, _ = gradients
        return dx if need_x else None, None, None, dA if need_A else None, dB if need_B else None, None, None, None


apply_linear: Callable = super(Function, RoSALinearFunction).apply
apply_lora: Callable = super(Function, LoRAFunction).apply
"""The functions' apply without what torch.func's transforms need, for calls that go past the dispatcher: 3 us less."""


class SpMMFunction(Function):
    """y = x Sᵀ, with the backward of rosa_linear without W, A and B: dx = dy S, dvalues = sddmm(dy, x)."""

    @staticmethod
    def forward(ctx, backend, x, values, crow, col, structure, ccol, row, permutation):
        ctx.structure = structure
        ctx.save_for_backward(x, values, crow, col, ccol, row, permutation)
        return _forward(ctx, "spmm", backend, x, values, crow, col, structure)

    @staticmethod
    def backward(ctx, dy):
        x, values, crow, col, *by_columns = ctx.saved_tensors
        _, need_x, need_values = ctx.needs_input_grad[:3]
        if not need_x and x.dtype == values.dtype:  # then sddmm's result needs no second rounding
            dvalues = _backward(ctx, "sddmm", dy, x, crow, col, ctx.structure)
            return None, None, dvalues, None, None, None, None, None, None
        by_columns = _by_columns(by_columns, crow, col, x.shape[-1])
        needs = [need_x, False, False, False, False, need_values]
        dx, *_, dvalues = _backward(
            ctx, "rosa_linear_backward",
            dy, x, None, None, None, 1.0, values, crow, col, *by_columns, ctx.structure, 0.0, None, needs, None,
        )  # fmt: skip
        return None, dx if need_x else None, dvalues if need_values else None, None, None, None, None, None, None


class SDDMMFunction(Function):
    """v_e = Σ_t dy[t, row_e] x[t, col_e]; with gradient g as the values of S: ddy = x Sᵀ, dx = dy S."""

    @staticmethod
    def forward(ctx, backend, dy, x, crow, col, structure, ccol, row, permutation):
        ctx.structure = structure
        ctx.save_for_backward(dy, x, crow, col, ccol, row, permutation)
        return _forward(ctx, "sddmm", backend, dy, x, crow, col, structure)

    @staticmethod
    def backward(ctx, g):
        dy, x, crow, col, *by_columns = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[1]:
            ddy = _backward(ctx, "spmm", x, g, crow, col, ctx.structure)
        if ctx.needs_input_grad[2]:
            ccol, row, permutation = _by_columns(by_columns, crow, col, x.shape[-1])
            dx = _backward(ctx, "spmm", dy, g[permutation], ccol, row, transposed_structure(ctx.structure))
        return None, ddy, dx, None, None, None, None, None, None


class CSRAddFunction(Function):
    """W + S; dW = g, dvalues_e = g[row_e, col_e]."""

    @staticmethod
    def forward(ctx, backend, weight, values, crow, col):
        ctx.values_dtype = values.dtype
        ctx.shape = tuple(weight.shape)
        ctx.save_for_backward(crow, col)
        return _forward(ctx, "csr_add", backend, weight, values, crow, col)

    @staticmethod
    def backward(ctx, g):
        dvalues = None
        if ctx.needs_input_grad[2]:
            crow, col = ctx.saved_tensors
            pattern = CSRPattern._trusted(crow, col, ctx.shape, UNSTRUCTURED, None)
            dvalues = g[pattern.row_of_entry(), pattern.col_indices.long()].to(ctx.values_dtype)
        return None, g if ctx.needs_input_grad[1] else None, dvalues, None, None


def _formula(name: str) -> Callable:
    """The op in plain PyTorch, which PyTorch differentiates and batches in any way."""
    compute, check = getattr(reference, name), getattr(op_checks, name)

    def call(*args):
        check(*ops.all_arguments(name, args))
        with ops.without_autocast(args[0].device.type):
            return ops.as_op_returns(compute(*ops.backend_arguments(name, args)), args[0])

    return call


def _may_skip_dispatcher(args):
    """Whether a call that has come to autograd may go on to its backend at once."""
    return args[0] is not None and not direct_call.needs_dispatcher(args)


def _linear_arguments(
    backend, x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, ccol, row,
    permutation,
):  # fmt: skip
    """An op's arguments as those of RoSALinearFunction."""
    pattern = None
    if crow is not None:
        by_columns = None if ccol is None else (ccol, row, permutation)
        pattern = CSRPattern._trusted(crow, col, (crow.shape[0] - 1, x.shape[-1]), structure, by_columns)
    return x, weight, bias, lora_A, lora_B, values, LinearSettings(backend, scaling, pattern, dropout_p, seed)


def _autograd_kernel(name: str, function: type[Function] | None) -> Callable:
    op, formula, implementation = getattr(torch.ops.rosa_kernels, name), _formula(name), ops.implementation(name)
    check = getattr(op_checks, name)

    def call(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if transforms.active() or (transforms.in_forward_mode() and any(map(transforms.has_tangent, tensors))):
            return formula(*args)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            if function is None:
                return formula(*args)
            args = ops.all_arguments(name, args)
            check(*args)
            backend = dispatch.backend_for(args[0]) if _may_skip_dispatcher(args) else None
            if function is RoSALinearFunction:
                return function.apply(*_linear_arguments(backend, *args))
            return function.apply(backend, *args)
        if _may_skip_dispatcher(args):  # this saves 10 us
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


for _name, _function in {
    "rosa_linear": RoSALinearFunction,
    "rosa_linear_with_H": None,
    "rosa_linear_backward": None,
    "spmm": SpMMFunction,
    "sddmm": SDDMMFunction,
    "csr_add": CSRAddFunction,
}.items():
    ops.library.impl(_name, _autograd_kernel(_name, _function), "Autograd")
    ops.library.impl(_name, _formula(_name), "FuncTorchBatchedDecomposition")  # torch.vmap
    ops.library.impl(_name, _formula(_name), "Batched")  # torch.autograd.grad(..., is_grads_batched=True)
