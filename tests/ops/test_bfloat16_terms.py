"""Splitting fp32 adapters into bf16 terms, as the CPU's bf16 instructions need it, loses no infinity, digit or zero."""

import pytest
import torch

import rosa_kernels as rk
from cases import LAYOUTS, LinearCase, make_inputs
from linear_checks import check_linear

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)
BF16, FP32 = torch.bfloat16, torch.float32


def delta_and_gradients(x, A, B, dy):
    leaves = [t.detach().requires_grad_() for t in (x, A, B)]
    with rk.use_backend("cpu"):
        y = rk.rosa_delta(leaves[0], leaves[1], leaves[2], 1.0, None, None)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("adapters", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("r", [1, 3, 16, 33])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")], ids=str)
def test_infinities_are_those_of_fp32_arithmetic(r, value, adapters):
    """Adapters of ±1 and ±2: all but the first of their terms are 0, and 0 · inf would be NaN."""
    A = torch.randint(1, 3, (r, 37)).to(adapters)
    B = torch.randint(1, 3, (21, r)).to(adapters)
    x, dy = torch.randint(1, 3, (70, 37)).to(BF16), torch.randint(1, 3, (70, 21)).to(BF16)
    x[66, 36], dy[5, 20] = value, value
    got = delta_and_gradients(x, A, B, dy)
    x, A, B, dy = x.double(), A.double(), B.double(), dy.double()
    H, dH = x @ A.T, dy @ B
    for name, result, exact in zip(("y", "dx", "dA", "dB"), got, (H @ B.T, dH @ A, dH.T @ x, dy.T @ H)):
        torch.testing.assert_close(result.double(), exact, rtol=2.0**-7, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("largest", [1.0, 2.0**100, 3.4028234e38])
def test_fp32_adapters_keep_their_24_bits(largest):
    """One token decides: H is A's column, dH is B's row, and the gradients are those numbers again."""
    A = torch.rand(5, 33) * largest
    B = torch.rand(17, 5) * largest
    x, dy = torch.zeros(9, 33, dtype=BF16), torch.zeros(9, 17, dtype=BF16)
    x[2, 7], dy[2, 3] = 1.0, 1.0
    _, _, dA, dB = delta_and_gradients(x, A, B, dy)
    assert torch.equal(dA[:, 7], B[3]) and torch.equal(dB[3], A[:, 7])
    assert dA.count_nonzero() == 5 and dB.count_nonzero() == 5


@pytest.mark.parametrize("adapters", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", [
    LinearCase((70,), 64, 96, 16, "random"),
    LinearCase((64,), 64, 64, 32, "rows"),
    LinearCase((129,), 160, 33, 40, "columns"),
    LinearCase((130,), 96, 80, 65, None, dropout_p=0.3),
    LinearCase((130,), 49, 95, 31, "blocks", dropout_p=0.5),
    *(LinearCase((130,), 95, 49, 17, "random", x_layout=a, dy_layout=b) for a, b in zip(LAYOUTS, reversed(LAYOUTS))),
], ids=lambda case: case.id)  # fmt: skip
def test_linear_around_the_tiles(case, adapters):
    """Ranks, features and tokens at and off the multiples of 16, 32 and 64 that tiles and panels have."""
    with rk.use_backend("cpu"):
        check_linear("cpu", LinearCase(**vars(case) | {"lora_dtype": adapters}), BF16)


def test_a_gradient_that_is_not_needed_leaves_the_others_alone():
    inputs = make_inputs(LinearCase((70,), 66, 35, 5, None, base=False, lora_dtype=FP32), BF16)
    everything = delta_and_gradients(inputs.x, inputs.lora_A, inputs.lora_B, inputs.dy)[1:]
    for needed in range(1, 7):
        leaves = [
            t.detach().requires_grad_(bool(needed >> i & 1))
            for i, t in enumerate((inputs.x, inputs.lora_A, inputs.lora_B))
        ]
        with rk.use_backend("cpu"):
            y = rk.rosa_delta(*leaves, 1.0, None, None)
        wanted = [i for i in range(3) if needed >> i & 1]
        for i, gradient in zip(wanted, torch.autograd.grad(y, [leaves[i] for i in wanted], inputs.dy)):
            assert torch.equal(gradient, everything[i])
