"""Hypothesis searches shapes, ranks, patterns, dtypes, layouts and mixes for a case that misses the bounds of test_ops.

HYPOTHESIS_PROFILE=search draws a thousand examples at random; the default draws the same few every time.
"""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rosa_kernels as rk
from cases import LAYOUTS, PATTERNS, LinearCase
from linear_checks import check_linear

ADAPTER_DTYPES = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16, torch.float64])
FEATURES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 127, 130, 257]))
TOKENS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 193, 300]))
RANKS = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 33, 48, 64, 65]))


@st.composite
def leading_sizes(draw):
    tokens = draw(TOKENS)
    return draw(st.sampled_from([(tokens,), (1, tokens), (tokens, 1), (2, tokens), (tokens, 1, 2), (1, 1, tokens, 1)]))


@st.composite
def linear_cases(draw):
    r = draw(RANKS)
    return LinearCase(
        leading=draw(leading_sizes()),
        in_features=draw(FEATURES),
        out_features=draw(FEATURES),
        r=r,
        pattern=draw(st.sampled_from([*PATTERNS, None] if r else list(PATTERNS))),
        base=draw(st.sampled_from([True, True, True, False])),
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from([0.0, 0.5, 1.0, -3.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.25, 1.0])) if r else 0.0,
        x_layout=draw(st.sampled_from(LAYOUTS)),
        dy_layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(LAYOUTS)),
        adapter_layout=draw(st.sampled_from(LAYOUTS)),
        lora_dtype=draw(ADAPTER_DTYPES),
        values_dtype=draw(ADAPTER_DTYPES),
        zero_values="",
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds for all examples
@given(case=linear_cases())
def test_any_linear_call_is_within_its_bounds(backend, dtype, case):
    check_linear(backend, case, dtype)


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_any_pattern_survives_mask_and_transpose(rows, cols, density, seed):
    pattern = rk.CSRPattern.random((rows, cols), density, seed)
    assert rk.CSRPattern.from_mask(pattern.to_mask()) == pattern
    ccol, row, permutation = pattern.transpose()
    transposed = rk.CSRPattern(ccol, row, (cols, rows))
    assert torch.equal(transposed.to_mask(), pattern.to_mask().T)
    back, there = transposed.transpose()[2].long(), permutation.long()
    assert torch.equal(there[back], torch.arange(pattern.nnz))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), cols=st.integers(1, 70), tokens=st.integers(0, 130), density=st.floats(0, 1))
def test_spmm_and_sddmm_are_adjoint(backend, rows, cols, tokens, density):
    """⟨dy, x Sᵀ⟩ = ⟨sddmm(dy, x), values⟩: no oracle needed."""
    pattern = rk.CSRPattern.random((rows, cols), density, seed=rows)
    x, dy, values = torch.randn(tokens, cols), torch.randn(tokens, rows), torch.randn(pattern.nnz)
    left = (dy.double() * rk.spmm(x, values, pattern).double()).sum()
    right = (rk.sddmm(dy, x, pattern).double() * values.double()).sum()
    scale = float((dy.abs().double() * rk.spmm(x.abs(), values.abs(), pattern).double()).sum())
    assert abs(float(left - right)) <= 2.0**-24 * (tokens + cols + 4) * scale
