"""The guard catches planted bf16 arithmetic, and the interpreter still needs it; kernels that keep to fp32 pass."""

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="backend triton: Triton is not installed")

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import interpreter_guard

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs where TRITON_INTERPRET=1: test_interpreter.py starts it",
)
SIZE = 16


@triton.jit
def add_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def compare_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.where(tl.load(x + at) > 0.0, tl.load(x + at), 0.0))


@triton.jit
def negate_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, -tl.load(x + at))


@triton.jit
def fma_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    loaded = tl.load(x + at)
    tl.store(out + at, tl.math.fma(loaded, loaded, loaded))


@triton.jit
def dot_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tile = tl.zeros((SIZE, SIZE), tl.float32) + 0.0
    operand = tl.broadcast_to(tl.load(x + at)[:, None], (SIZE, SIZE))
    tl.store(out + at[:, None] * SIZE + at[None, :], tl.dot(operand, operand, tile).to(tl.bfloat16))


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def reduce_kernel(out, x, SIZE: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, SIZE)), 0, _plus))


@triton.jit
def reduce_by_tritons_own_sum_kernel(out, x, SIZE: tl.constexpr):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, SIZE)), 0, tl.standard._sum_combine))


@triton.jit
def round_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, (tl.load(x + at).to(tl.float32) * 1.00390625).to(tl.bfloat16))


@triton.jit
def from_int_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, (at + 257).to(tl.bfloat16))


@triton.jit
def atomic_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.atomic_add(out + at, tl.load(x + at))


@triton.jit
def moves_kernel(out, x, SIZE: tl.constexpr):
    """No arithmetic on bf16: a masked load, a select, an exact constant, a reshape, a product in fp32 that is exact."""
    at = tl.arange(0, SIZE)
    loaded = tl.load(x + at, mask=at < SIZE - 1, other=0.5)
    chosen = tl.where(at % 2 == 0, loaded, 2.0).reshape(SIZE // 2, 2).reshape(SIZE)
    tl.store(out + at, (chosen.to(tl.float32) * 2.0).to(tl.bfloat16))


def run(kernel, dtype=torch.bfloat16):
    x = torch.linspace(0.5, 3, SIZE).to(dtype)
    out = torch.zeros(SIZE * SIZE, dtype=dtype)
    kernel[(1,)](out, x, SIZE=SIZE)
    return x, out


PLANTED = [
    add_kernel, compare_kernel, negate_kernel, fma_kernel, dot_kernel, reduce_kernel,
    reduce_by_tritons_own_sum_kernel, round_kernel, from_int_kernel, atomic_kernel,
]  # fmt: skip


@pytest.mark.parametrize("kernel", PLANTED, ids=lambda kernel: kernel.__name__)
def test_planted_bf16_arithmetic_is_refused(kernel):
    with pytest.raises((TypeError, InterpreterError), match=r"TypeError.*bf16.*(float32|arithmetic\.narrow)"):
        run(kernel)


@pytest.mark.parametrize(
    "kernel", [add_kernel, compare_kernel, negate_kernel, fma_kernel, reduce_kernel, atomic_kernel]
)
def test_the_same_in_fp32_is_not(kernel):
    _, out = run(kernel, torch.float32)
    assert out.any()


def test_moving_bf16_is_allowed_and_right():
    x, out = run(moves_kernel)
    expected = torch.where(torch.arange(SIZE) % 2 == 0, x, torch.tensor(2.0, dtype=torch.bfloat16)) * 2
    expected[SIZE - 1] = 4.0
    assert torch.equal(out[:SIZE], expected)


ALL_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def convert(tensor, given, wanted):
    """The interpreter's own conversion of a CPU tensor."""
    data = tensor.view(torch.uint16).numpy() if given == tl.bfloat16 else tensor.numpy()
    handle = interpreter.TensorHandle(data, given)
    return interpreter.interpreter_builder.create_fp_to_fp(handle, wanted, interpreter._ir.ROUNDING_MODE.RTNE).data


def test_every_conversion_that_the_guard_lets_through_is_right():
    subnormal = (ALL_BF16.abs() < torch.finfo(torch.bfloat16).smallest_normal) & (ALL_BF16 != 0)
    numbers = ALL_BF16[~ALL_BF16.isnan() & ~subnormal]
    wide = convert(numbers, tl.bfloat16, tl.float32)
    assert np.array_equal(wide, numbers.float().numpy())
    back = convert(numbers.float(), tl.float32, tl.bfloat16)
    assert np.array_equal(back, numbers.view(torch.uint16).numpy())


@pytest.mark.parametrize("given,wanted", [(tl.bfloat16, tl.float32), (tl.float32, tl.bfloat16)], ids=str)
def test_subnormals_are_refused(given, wanted):
    numbers = torch.tensor([1.0, 1e-39]).to(torch.bfloat16)
    with pytest.raises(TypeError, match="subnormal"):
        convert(numbers if given == tl.bfloat16 else numbers.float(), given, wanted)


def test_the_interpreter_still_rounds_to_bf16_wrongly():
    """Once this fails, Triton has mended it: the refusal of fp32 -> bf16, and arithmetic.narrow's detour, can go."""
    just_below_two = torch.tensor([1.999, 2.001, 1.0 + 2**-8])
    right = just_below_two.to(torch.bfloat16).view(torch.uint16).numpy()
    with interpreter_guard.lifted():
        got = convert(just_below_two, tl.float32, tl.bfloat16)
    assert not np.array_equal(got, right), "fp32 -> bf16 is mended in this Triton: drop its guard"


def test_the_interpreter_still_adds_raw_bits():
    """Once this fails, Triton has mended it, and the guard on bf16 arithmetic can go."""
    with interpreter_guard.lifted():
        x, out = run(add_kernel)
    assert not torch.equal(out[:SIZE], x + x), "bf16 arithmetic is mended in this Triton: drop its guard"
    with pytest.raises((TypeError, InterpreterError)):
        run(add_kernel)
