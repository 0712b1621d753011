"""Under TRITON_INTERPRET=1: refuses what Triton's interpreter would compute wrongly in bf16, and lets it work at a
bearable speed.

The interpreter holds bf16 as uint16 and hands these to numpy as they are: a sum of bf16 is a sum of bit patterns. Its
own rounding of fp32 to bf16 truncates, or drops the carry into the exponent, and it takes subnormals for zeros. All
of it is silent. What only moves bits stays allowed: loads, stores, selects, reshapes, gathers, bitcasts; so does what
it gets right: bf16 -> fp32 and fp16, |x|, and fp32 -> bf16 where nothing is lost.
"""

import contextlib
import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface

_RIGHT_FROM_BF16 = (tl.float32, tl.float16)
_COMPUTING = (
    "binary_op", "unary_op", "create_clampf", "create_fma", "create_dot", "create_dot_scaled",
    "create_atomic_rmw", "create_atomic_cas",
)  # fmt: skip
_CONVERTING = ("cast_impl", "create_fp_to_fp")


def _is_bf16(handle) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.get_element_ty() == tl.bfloat16


def _is_pointer(handle) -> bool:
    return isinstance(handle.dtype.scalar, tl.pointer_type)


def _refuses_bf16_operands(name: str, compute):
    def guarded(self, *operands, **options):
        for operand in (*operands, *options.values()):
            if _is_bf16(operand) and not _is_pointer(operand):
                operation = operands[-1].__name__ if callable(operands[-1]) else name
                raise TypeError(
                    f"bf16 {operation}: the interpreter would take the raw bits; go .to(tl.float32) after the load"
                )
        return compute(self, *operands, **options)

    return guarded


def _refuses_wrong_conversions(convert):
    def guarded(self, source, destination_type, *rounding):
        given, wanted = source.dtype.scalar, destination_type.scalar
        if given == tl.bfloat16 and wanted not in _RIGHT_FROM_BF16:
            raise TypeError(f"bf16 -> {wanted}: the interpreter converts the raw bits; go through tl.float32")
        if wanted == tl.bfloat16 and not _is_exactly_bf16(source, given):
            raise TypeError(
                f"{given} -> bf16: the interpreter would not round to nearest even; use the package's arithmetic.narrow"
            )
        if tl.bfloat16 in (given, wanted) and _has_subnormals(source, given):
            raise TypeError(
                f"{given} -> {wanted}: the interpreter would take the subnormal numbers among these for zeros"
            )
        return convert(self, source, destination_type, *rounding)

    return guarded


def _is_exactly_bf16(source, dtype) -> bool:
    """Whether every number of an fp32 source is one of bf16, so that there is nothing to round."""
    return dtype == tl.float32 and not (np.ascontiguousarray(source.data).view(np.uint32) & 0xFFFF).any()


def _has_subnormals(source, dtype) -> bool:
    """Whether bf16, or fp32 that is exactly bf16, holds numbers other than 0 with the smallest exponent."""
    unsigned, exponent, significand = {
        tl.bfloat16: (np.uint16, 0x7F80, 0x007F),
        tl.float32: (np.uint32, 0x7F800000, 0x007FFFFF),
    }[dtype]
    bits = np.ascontiguousarray(source.data).view(unsigned)
    return bool((((bits & exponent) == 0) & ((bits & significand) != 0)).any())


def _refuses_bf16_inputs(check_tensor):
    """tl.reduce and tl.associative_scan with one of Triton's own combine functions go past the builder, to numpy."""

    def guarded(self, inputs):
        if any(_is_bf16(tensor.handle) for tensor in inputs):
            raise TypeError(
                "bf16 reduction or scan: the interpreter would compute on the raw bits; take .to(tl.float32) first"
            )
        return check_tensor(self, inputs)

    return guarded


class _Patches:
    """Attributes to set, and what they were before."""

    def __init__(self):
        self._changes = [
            (InterpreterBuilder, name, _refuses_bf16_operands(name, getattr(InterpreterBuilder, name)))
            for name in _COMPUTING
        ]
        self._changes += [
            (InterpreterBuilder, name, _refuses_wrong_conversions(getattr(InterpreterBuilder, name)))
            for name in _CONVERTING
        ]
        check = ReduceScanOpInterface.check_tensor
        self._changes.append((ReduceScanOpInterface, "check_tensor", _refuses_bf16_inputs(check)))
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, _ in self._changes]

    def apply(self) -> None:
        for owner, name, value in self._changes:
            setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in self._originals:
            setattr(owner, name, value)


_guard = _Patches()


def install() -> None:
    """Guards and hastens the interpreter, for the whole process. Call once."""
    _guard.apply()
    _patch_the_language_once_a_launch()
    _leave_out_overflow_checks()


@contextlib.contextmanager
def lifted():
    """The interpreter as Triton ships it."""
    _guard.undo()
    try:
        yield
    finally:
        _guard.apply()


def _patch_the_language_once_a_launch() -> None:
    """Every call of a device function patches triton.language anew, a third of all time: once a module is enough."""
    patch_language, launch = interpreter._patch_lang, GridExecutor.__call__
    patched = set()

    def patch_unless_done(function):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch_language(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()  # the last launch undid its patches
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, GridExecutor.__call__ = patch_unless_done, launch_afresh


def _leave_out_overflow_checks() -> None:
    """Another quarter: each integer sum is made once more in 64 bits. No tensor that it can bear is so large."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
