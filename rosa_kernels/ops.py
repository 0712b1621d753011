"""torch.ops.rosa_kernels.*: every op's schema, its fake for tracing, and its call into the backend that serves it.

An op takes tensors and numbers alone. A pattern arrives as its index tensors and its structure, an int of pattern.py;
a seed is there just when dropout is on. autograd.py differentiates the ops. Anybody may call them, so that op_checks.py
checks what comes through PyTorch's dispatcher. The package itself, which has checked its arguments, calls a backend's
functions of the same names where direct_call.py allows it. Those may return None for a gradient that is not needed.
"""

import contextlib
from collections.abc import Callable

import torch

from rosa_kernels import dispatch, op_checks
from rosa_kernels.backends.kept_H import empty_H

_BY_COLUMNS = "Tensor? ccol=None, Tensor? row=None, Tensor? permutation=None"
"""The pattern by columns, which the backward reads. Where a call has none, the backward makes it."""

_LINEAR_ARGUMENTS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? values, "
    "Tensor? crow, Tensor? col, int structure, float dropout_p, Tensor? seed"
)
_SCHEMAS = {
    "rosa_linear": f"({_LINEAR_ARGUMENTS}, {_BY_COLUMNS}) -> Tensor",
    # The forward that keeps H = x̂ Aᵀ for the backward, as backends/kept_H.py says: (y, H).
    "rosa_linear_with_H": f"({_LINEAR_ARGUMENTS}) -> (Tensor, Tensor)",
    # needs says which of dx, dweight, dbias, dlora_A, dlora_B and dvalues to compute. For each of the others a backend
    # returns None, and the op an empty tensor. Without H the backward makes it.
    "rosa_linear_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? values, "
        "Tensor? crow, Tensor? col, Tensor? ccol, Tensor? row, Tensor? permutation, int structure, float dropout_p, "
        "Tensor? seed, bool[6] needs, Tensor? H=None) -> Tensor[]"
    ),
    "spmm": f"(Tensor x, Tensor values, Tensor crow, Tensor col, int structure, {_BY_COLUMNS}) -> Tensor",
    "sddmm": f"(Tensor dy, Tensor x, Tensor crow, Tensor col, int structure, {_BY_COLUMNS}) -> Tensor",
    "csr_add": "(Tensor weight, Tensor values, Tensor crow, Tensor col) -> Tensor",
}
_ARGUMENTS = {name: schema.split("->")[0].count(",") + 1 for name, schema in _SCHEMAS.items()}
_BACKEND_ARGUMENTS = {name: count - 3 * (_BY_COLUMNS in _SCHEMAS[name]) for name, count in _ARGUMENTS.items()}

library = torch.library.Library("rosa_kernels", "DEF")


def autocast_enabled(device_type: str) -> bool:
    """Whether torch.autocast is on for tensors of this device type; "meta" has none."""
    # torch.amp.is_autocast_available would say it for every device, but PyTorch 2.10 cannot trace it when it compiles.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches torch.autocast off where it is on."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else contextlib.nullcontext()


def implementation(name: str) -> Callable:
    """The op itself, for tensors of a real device: it checks its arguments and calls a backend."""
    check = getattr(op_checks, name)

    def call(*args):
        check(*all_arguments(name, args))
        serve, args = getattr(dispatch.backend_for(args[0]), name), backend_arguments(name, args)
        with without_autocast(args[0].device.type):  # functional.py has cast x and weight; an op keeps what it is given
            return as_op_returns(serve(*args), args[0])

    return call


def all_arguments(name: str, args: tuple) -> tuple:
    """All arguments of a call. PyTorch leaves out the last ones where they are None, their default."""
    return args + (None,) * (_ARGUMENTS[name] - len(args))


def backend_arguments(name: str, args: tuple) -> tuple:
    """The arguments of a call that a backend takes: without those by columns, which the backward alone reads."""
    return args[: _BACKEND_ARGUMENTS[name]]


def as_op_returns(results, like):
    """What an op may return: a list of tensors alone, no two the same. Each None becomes an empty tensor of its own."""
    if isinstance(results, list):
        return [like.new_empty(0) if result is None else result for result in results]
    return results


def keeps_H(x: torch.Tensor) -> bool:
    """Whether a forward that goes through the dispatcher saves H: by the device, as a trace knows no backend."""
    return x.device.type == "cuda"


for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(_name, implementation(_name), "CompositeExplicitAutograd")


@torch.library.register_fake("rosa_kernels::rosa_linear", lib=library)
def _(
    x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed, ccol=None, row=None,
    permutation=None,
):  # fmt: skip
    out_features = lora_B.shape[0] if lora_B is not None else crow.shape[0] - 1
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("rosa_kernels::rosa_linear_with_H", lib=library)
def _(x, weight, bias, lora_A, lora_B, scaling, values, crow, col, structure, dropout_p, seed):
    return x.new_empty((*x.shape[:-1], lora_B.shape[0])), empty_H(x, lora_A, lora_B)


@torch.library.register_fake("rosa_kernels::rosa_linear_backward", lib=library)
def _(
    dy, x, weight, lora_A, lora_B, scaling, values, crow, col, ccol, row, permutation, structure, dropout_p, seed,
    needs, H=None,
):  # fmt: skip
    out_features, in_features = dy.shape[-1], x.shape[-1]
    sources = (x, dy, dy, lora_A, lora_B, values)
    shapes = (
        x.shape,
        (out_features, in_features),
        (out_features,),
        lora_A is not None and lora_A.shape,
        lora_B is not None and lora_B.shape,
        values is not None and values.shape,
    )
    return [source.new_empty(shape) if need else dy.new_empty(0) for need, source, shape in zip(needs, sources, shapes)]


@torch.library.register_fake("rosa_kernels::spmm", lib=library)
def _(x, values, crow, col, structure, ccol=None, row=None, permutation=None):
    return x.new_empty((*x.shape[:-1], crow.shape[0] - 1))


@torch.library.register_fake("rosa_kernels::sddmm", lib=library)
def _(dy, x, crow, col, structure, ccol=None, row=None, permutation=None):
    return x.new_empty(col.shape)


@torch.library.register_fake("rosa_kernels::csr_add", lib=library)
def _(weight, values, crow, col):
    return weight.new_empty(weight.shape)
