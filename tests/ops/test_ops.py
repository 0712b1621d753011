"""Every op, forward and gradients, against dense float64 within the bounds of oracle.py; inputs are left as they
were.
"""

import pytest
import torch

import rosa_kernels as rk
from cases import CSR_ADD_CASES, LINEAR_CASES, SDDMM_CASES, SPMM_CASES, LinearCase, make_inputs
from linear_checks import SEED, bits, check_linear, linear, mask_of, run_linear
from oracle import (
    SMALLEST_SUBNORMAL,
    UNIT_ROUNDOFF,
    Expected,
    check,
    compute_roundoff,
    dense,
    expected_from,
    expected_linear,
    naive_linear,
)


def by_id(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


@by_id(LINEAR_CASES)
def test_linear(backend, dtype, device, case):
    check_linear(backend, case, dtype, device)


@by_id(LINEAR_CASES)
def test_linear_without_grad_gives_the_same_numbers(backend, dtype, device, case):
    inputs = make_inputs(case, dtype, device)
    torch.manual_seed(SEED)
    with torch.no_grad():
        y = linear(case, inputs, inputs.tensors())
    expected = expected_from(backend, case, inputs, mask_of(case, device))
    check("y", y, expected["y"], inputs.x)


@by_id([LinearCase((t,), 130, 100, 16, p) for t in (10, 90) for p in ("random", "rows", "columns")])
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["same", "fp32 adapters"])
def test_errors_are_no_worse_than_naive_pytorchs(backend, dtype, device, case, adapters):
    """Twice the naive way's error, one rounding of the result and a few roundoffs of the sums, in Frobenius norm."""
    inputs = make_inputs(LinearCase(**vars(case) | {"lora_dtype": adapters, "values_dtype": adapters}), dtype, device)
    expected = expected_linear(case, inputs)
    got = run_linear(case, inputs)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    y = naive_linear(case, leaves, inputs.pattern)
    naive = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), inputs.dy)))}
    for name, result in got.items():
        exact = expected[name].value
        allowed = 2 * (naive[name].cpu().double() - exact).norm()
        allowed += (UNIT_ROUNDOFF[result.dtype] + 8 * compute_roundoff(dtype)) * exact.norm()
        assert (result.cpu().double() - exact).norm() <= allowed, name


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
@pytest.mark.parametrize("pattern", ["random", "rows", "columns"])
def test_small_fp32_adapters_keep_their_precision(backend, dtype, device, pattern, scale):
    """As young adapters and gradients are: far below the smallest number of fp16."""
    case = LinearCase((20,), 66, 35, 4, pattern, base=False, lora_dtype=torch.float32, values_dtype=torch.float32)
    inputs = make_inputs(case, dtype, device)
    A, B = (scale * t for t in (inputs.lora_A, inputs.lora_B))
    leaves = [t.requires_grad_() for t in (A, B)]
    y = rk.rosa_delta(inputs.x, *leaves, 1 / scale, inputs.values, inputs.pattern)
    dA, dB = torch.autograd.grad(y, leaves, inputs.dy)
    x, dy, A, B = (t.detach().cpu().double() for t in (inputs.x, inputs.dy, A, B))
    for name, got, exact in (("dA", dA, (dy @ B).T @ x / scale), ("dB", dB, dy.T @ (x @ A.T) / scale)):
        error = float((got.cpu().double() - exact).norm() / exact.norm())
        assert error < 2.0**-19, f"{name}: relative error {error:.2g}"
    small = rk.spmm(inputs.x, scale * inputs.values, inputs.pattern).cpu().double() / scale
    exact = x @ dense(inputs.values.cpu(), inputs.pattern.to("cpu")).T
    rounding = UNIT_ROUNDOFF[dtype] + SMALLEST_SUBNORMAL[dtype] / scale  # of y
    assert float((small - exact).norm() / exact.norm()) < rounding + 2.0**-20


def sparse_inputs(case, dtype, device):
    inputs = make_inputs(case.as_linear(), dtype, device)
    return inputs, expected_linear(LinearCase(**vars(case.as_linear()) | {"base": False}), _without_base(inputs))


def _without_base(inputs):
    return type(inputs)(**{**vars(inputs), "weight": None, "bias": None})


@by_id(SPMM_CASES)
def test_spmm(backend, dtype, device, case):
    inputs, expected = sparse_inputs(case, dtype, device)
    x, values = inputs.x.detach().requires_grad_(), inputs.values.detach().requires_grad_()
    y = rk.spmm(x, values, inputs.pattern)
    dx, dvalues = torch.autograd.grad(y, (x, values), inputs.dy)
    check("y", y, expected["y"], inputs.x)
    check("dx", dx, expected["x"], inputs.x)
    # The gradient of the values is an sddmm in x's dtype, rounded once more to theirs.
    rounded = UNIT_ROUNDOFF[dtype] * expected["values"].value.abs()
    check(
        "dvalues", dvalues, Expected(expected["values"].value, expected["values"].bound + 1.01 * rounded), inputs.values
    )
    with torch.no_grad():
        assert torch.equal(rk.spmm(inputs.x, inputs.values, inputs.pattern), y)


@by_id([case for case in SDDMM_CASES if case.values_dtype is None])
def test_sddmm(backend, dtype, device, case):
    inputs, expected = sparse_inputs(case, dtype, device)
    dy, x = inputs.dy.detach().requires_grad_(), inputs.x.detach().requires_grad_()
    result = rk.sddmm(dy, x, inputs.pattern)
    check("sddmm", result, expected["values"], inputs.x)
    # With the values as the gradient of the result, its gradients are spmm's y and dx.
    ddy, dx = torch.autograd.grad(result, (dy, x), inputs.values)
    check("ddy", ddy, expected["y"], inputs.x)
    check("dx", dx, expected["x"], inputs.x)
    with torch.no_grad():
        assert torch.equal(rk.sddmm(inputs.dy, inputs.x, inputs.pattern), result)


@by_id(CSR_ADD_CASES)
def test_csr_add(backend, dtype, device, case):
    inputs = make_inputs(case.as_linear(), dtype, device)
    weight, values = inputs.weight.detach().requires_grad_(), inputs.values.detach().requires_grad_()
    before = bits({"weight": weight})["weight"]
    total = rk.csr_add(weight, values, inputs.pattern)
    rows, cols = inputs.pattern.to("cpu").to_mask().nonzero(as_tuple=True)
    # One addition an entry in fp32 (float64) and one rounding; an entry that S leaves alone keeps its bits.
    wide_weight, wide_values = inputs.weight.cpu().double(), inputs.values.cpu().double()
    expected = wide_weight.index_put((rows, cols), wide_values, accumulate=True)
    bound = torch.zeros_like(expected)
    sums = wide_weight.abs()[rows, cols] + wide_values.abs()
    bound[rows, cols] = 2 * compute_roundoff(dtype) * sums + UNIT_ROUNDOFF[dtype] * expected[rows, cols].abs()
    check("weight + S", total, Expected(expected, bound), inputs.weight)
    assert total.data_ptr() != weight.data_ptr() and torch.equal(bits({"weight": weight})["weight"], before)
    upstream = torch.randn(inputs.pattern.shape).to(device, dtype)
    dweight, dvalues = torch.autograd.grad(total, (weight, values), upstream)
    assert torch.equal(dweight, upstream)
    assert dvalues.dtype == inputs.values.dtype
    assert torch.equal(dvalues.cpu(), upstream.cpu()[rows, cols].to(dvalues.dtype))


def test_no_tokens_with_strides_of_their_own(backend, dtype, device):
    """As a mixture's expert without tokens may get them: an empty tensor keeps strides that no element has."""
    x = torch.randn(0, 70, dtype=dtype, device=device)[:, ::2].requires_grad_()
    A, B = torch.randn(3, 35, dtype=dtype, device=device), torch.randn(66, 3, dtype=dtype, device=device)
    y = rk.lora_linear(x, torch.randn(66, 35, dtype=dtype, device=device), None, A.requires_grad_(), B, 1.0)
    y.backward(torch.randn(0, 132, dtype=dtype, device=device)[:, ::2])
    assert y.shape == (0, 66) and x.grad.shape == (0, 35) and A.grad.count_nonzero() == 0


@pytest.mark.parametrize("tokens", [6, 66])
def test_a_fresh_adapter_changes_nothing(backend, dtype, device, tokens):
    """lora_B = 0 and values = 0, as at injection: y is F.linear's; bit for bit where that computes the base.

    A kernel of Triton or the CPU that multiplies the base too may sum in another order than the library: a rounding
    apart, and fp32's own.
    """
    inputs = make_inputs(LinearCase((tokens,), 66, 35, zero_values="all"), dtype, device)
    y = rk.rosa_linear(
        inputs.x,
        inputs.weight,
        inputs.bias,
        inputs.lora_A,
        torch.zeros_like(inputs.lora_B),
        2.0,
        inputs.values,
        inputs.pattern,
    )
    base = torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    if backend in ("triton", "cpu"):
        sums = 66 * torch.finfo(torch.float32).eps * float(base.abs().max())
        torch.testing.assert_close(y, base, rtol=torch.finfo(dtype).eps, atol=sums)
    else:
        assert torch.equal(y, base)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["random", "rows", "columns"])
@pytest.mark.parametrize("tokens", [7, 500])
def test_repeated_runs_give_the_same_bits(backend, dtype, device, tokens, pattern, dropout_p):
    case = LinearCase((tokens,), 130, 100, 16, pattern, dropout_p=dropout_p)
    inputs = make_inputs(case, dtype, device)
    first = run_linear(case, inputs)
    for _ in range(3):
        for name, again in run_linear(case, inputs).items():
            assert torch.equal(again, first[name]), name


@pytest.mark.skipif(rk.available_backends()["cpu"] is not None, reason="backend cpu is not available")
@pytest.mark.parametrize("tokens", [1, 3, 9, 40])
def test_few_tokens_of_a_large_layer_are_shared_among_threads(tokens):
    """Sizes at which the cpu kernels cut the output features of one block, raggedly; the same bits on every run."""
    out_features, in_features, r = 1030, 1000, 16
    generator = torch.Generator().manual_seed(0)
    pattern = rk.CSRPattern.random((out_features, in_features), 0.1, seed=0)
    shapes = (tokens, in_features), (r, in_features), (out_features, r), (pattern.nnz,)
    x, A, B, values = (torch.randn(shape, generator=generator) for shape in shapes)
    S = rk.csr_add(torch.zeros(pattern.shape), values, pattern)
    expected = 0.5 * (x.double() @ A.T.double()) @ B.T.double() + x.double() @ S.T.double()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with rk.use_backend("cpu"):
                got, again = (rk.rosa_delta(x, A, B, 0.5, values, pattern) for _ in range(2))
            assert torch.equal(got, again)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)
    finally:
        torch.set_num_threads(threads)
