"""Every algorithm of the GPU's cost model, forced in turn on the interpreted kernels, gives the right numbers; and the
model is consistent."""

import os

import pytest
import torch

import rosa_kernels as rk
from cases import LinearCase, make_inputs
from cost_model_cases import call_of, calls, nearest
from linear_checks import SEED, run_linear
from oracle import check, expected_linear
from philox import keep_mask, seed_drawn_after
from rosa_kernels.backends.gpu import device_rates
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall
from rosa_kernels.backends.triton import heuristics
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs where TRITON_INTERPRET=1: test_interpreter.py starts it",
)
FP32, BF16 = torch.float32, torch.bfloat16

CASES = [
    LinearCase((5,), 66, 35, 3),
    LinearCase((20,), 66, 35, 17, "empty_rows", x_layout="transposed", dy_layout="padded"),
    LinearCase((20,), 66, 35, 8, "random", bias=False, dropout_p=0.3),
    LinearCase((20,), 66, 35, 4, "random", lora_dtype=FP32, values_dtype=FP32),
    LinearCase((20,), 66, 35, 4, None, dropout_p=0.5, lora_dtype=FP32),
    LinearCase((20,), 66, 35, 4, "rows", weight_layout="transposed"),
    LinearCase((20,), 66, 35, 4, "columns", values_dtype=FP32),
    LinearCase((20,), 66, 48, 4, "blocks"),
    LinearCase((20,), 66, 48, 4, "random", base=False, dropout_p=0.3),
    LinearCase((20,), 66, 35, 0, "blocks", base=False),
]


def name_of(algorithm):
    return "-".join(filter(None, (algorithm.base, algorithm.H, algorithm.S))) or "zeros"


BY_ALGORITHM = [
    pytest.param(case, dtype, algorithm, id=f"{case.id}-{str(dtype)[6:]}-{name_of(algorithm)}")
    for case in CASES
    for dtype in (FP32, BF16)
    for algorithm in heuristics.linear_algorithms(call_of(case, dtype))
]


@interpreted
@pytest.mark.parametrize("case,dtype,algorithm", BY_ALGORITHM)
def test_linear_by_algorithm(monkeypatch, case, dtype, algorithm):
    taken = []

    def force(call, device):
        taken.append(nearest(heuristics.linear_algorithms(call), algorithm))
        return taken[-1]

    monkeypatch.setattr(heuristics, "choose_linear", force)
    inputs = make_inputs(case, dtype)
    keep = keep_mask(seed_drawn_after(SEED), case.tokens, case.in_features, case.dropout_p) if case.dropout_p else None
    with rk.use_backend("triton"):
        got = run_linear(case, inputs)
    expected = expected_linear(case, inputs, keep, delta_rounded=algorithm.S in ("delta", "rows", "columns"))
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))
    assert taken[0] == algorithm and len(taken) == 2


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dx_H", ["known", "library"])
@pytest.mark.parametrize("pattern", [None, "columns"])
def test_low_rank_gradients_by_library(monkeypatch, dtype, dx_H, pattern):
    case = LinearCase((20,), 66, 35, 4, pattern, x_layout="padded", adapter_layout="transposed")
    inputs = make_inputs(case, dtype)
    wanted = heuristics.LinearAlgorithm("library", dx_H, "rows" if pattern else "")
    taken = []

    def force(call, device):
        taken.append(nearest(heuristics.linear_algorithms(call), wanted))
        return taken[-1]

    monkeypatch.setattr(heuristics, "low_rank_gradients_by_library", lambda dy, x: True)
    monkeypatch.setattr(heuristics, "choose_linear", force)
    with rk.use_backend("triton"):
        got = run_linear(case, inputs)
    expected = expected_linear(case, inputs)
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))
    assert taken[1].H == dx_H


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["tiled", "entries", "entries_transposed", "library"])
@pytest.mark.parametrize("pattern", ["sparse", "empty_rows", "full", "last_entry", "blocks"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_sddmm_by_algorithm(monkeypatch, dtype, algorithm, pattern, tokens):
    case = LinearCase((tokens,), 66, 50, 0, pattern, base=False, x_layout="strided", dy_layout="transposed")
    inputs = make_inputs(case, dtype)
    expected = expected_linear(case, inputs)["values"]
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, device: algorithm)
    with rk.use_backend("triton"):
        check("sddmm", rk.sddmm(inputs.dy, inputs.x, inputs.pattern), expected, inputs.x)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("values_dtype", [None, FP32], ids=["same", "fp32 values"])
@pytest.mark.parametrize("pattern", ["rows", "columns", "full"])
def test_sddmm_of_whole_rows_and_columns(dtype, values_dtype, pattern):
    """In a backward, where the rows are at hand, and on its own."""
    case = LinearCase((20,), 66, 50, 0, pattern, x_layout="strided", dy_layout="transposed", values_dtype=values_dtype)
    inputs = make_inputs(case, dtype)
    expected = expected_linear(case, inputs)["values"]
    with rk.use_backend("triton"):
        check("values", run_linear(case, inputs)["values"], expected, inputs.values)
        if values_dtype is None:
            check("sddmm", rk.sddmm(inputs.dy, inputs.x, inputs.pattern), expected, inputs.x)


@pytest.mark.parametrize("architecture", device_rates.RATES)
def test_the_cheapest_algorithm_is_chosen(architecture):
    rates = device_rates.RATES[architecture]
    for call in calls():
        chosen = heuristics.cheapest_linear(call, rates)
        seconds = {
            algorithm: heuristics.linear_seconds(call, algorithm, rates)
            for algorithm in heuristics.linear_algorithms(call)
        }
        assert chosen in seconds and seconds[chosen] == min(seconds.values())
        assert all(0 < s < 10 for s in seconds.values())


def test_16_bit_and_tf32_deltas_are_never_merged():
    for call in calls():
        merged = any(algorithm.base == "merged" for algorithm in heuristics.linear_algorithms(call))
        assert merged == (call.element_size == 4 and not call.tf32)
    assert not any(
        algorithm.base == "merged"
        for algorithm in heuristics.linear_algorithms(LinearCall(9, 8, 8, 4, element_size=4, dropout="x"))
    )


def test_structures_have_their_own_algorithms():
    for structure, S, dS in ((ROW, "rows", "packed"), (COLUMN, "columns", "packed"), (BLOCK16, "blocks", "blocks")):
        assert {
            algorithm.S for algorithm in heuristics.linear_algorithms(LinearCall(99, 64, 64, 4, 640, structure))
        } == {S}
        assert heuristics.sddmm_algorithms(SDDMMCall(99, 64, 64, 640, structure, mixed=True)) == (dS,)


def test_wider_adapters_are_one_delta_but_in_fp16():
    for fp16 in (False, True):
        for wide in ({"mixed_values": True}, {"mixed_lora": True}):
            algorithms = heuristics.linear_algorithms(LinearCall(99, 64, 64, 4, 640, fp16=fp16, **wide))
            assert any(algorithm.S == "delta" for algorithm in algorithms) != fp16
    S_alone = LinearCall(99, 64, 64, 0, 640, mixed_values=True)
    assert not any(algorithm.S == "delta" for algorithm in heuristics.linear_algorithms(S_alone))


def test_the_choices_that_the_docstring_explains():
    """On an H100: library GEMMs for LoRA alone, a kernel for few tokens beside wider adapters or an S, merging in fp32, a
    dense S at 5 % and a gathered one at 0.01 %."""
    h100 = device_rates.RATES["sm_90"]
    large = dict(T=4096, out_features=4096, in_features=4096, r=16)
    assert heuristics.cheapest_linear(LinearCall(**large), h100).base == "library"
    assert heuristics.cheapest_linear(LinearCall(**large, element_size=4, nnz=167772), h100).base == "merged"
    assert heuristics.cheapest_linear(LinearCall(**large, nnz=838860), h100).S == "delta"
    assert heuristics.cheapest_linear(LinearCall(**large, nnz=838860, dropout="x"), h100).S == "dense"
    assert heuristics.cheapest_linear(LinearCall(**large, nnz=1677), h100).S == "gather_transposed"
    assert heuristics.cheapest_linear(LinearCall(4, 4096, 4096, 16), h100) == ("library", "library", "")
    assert heuristics.cheapest_linear(LinearCall(4, 4096, 4096, 16, mixed_lora=True), h100).base == "kernel"
    assert heuristics.cheapest_linear(LinearCall(4, 4096, 4096, 16, nnz=167772), h100) == (
        "kernel",
        "inside",
        "gather",
    )
    by_library = heuristics.library_gradients_pay
    assert by_library(4096, 768, 2, h100) and by_library(4, 768, 2, h100) and not by_library(32768, 4096, 2, h100)
    assert heuristics.cheapest_sddmm(SDDMMCall(4096, 4096, 4096, 167772), h100) == "library"
    assert heuristics.cheapest_sddmm(SDDMMCall(4096, 4096, 4096, 335544, mixed=True), h100) == "library"
    assert heuristics.cheapest_sddmm(SDDMMCall(4096, 4096, 4096, 16777, element_size=4), h100) == "entries_transposed"


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_parts_added_first_or_by_their_readers(monkeypatch, dropout_p):
    """H and dH come in parts here; whoever adds them, the numbers are right."""
    case = LinearCase((40,), 130, 100, 8, "random", dropout_p=dropout_p)
    keep = keep_mask(seed_drawn_after(SEED), case.tokens, case.in_features, dropout_p) if dropout_p else None
    inputs = make_inputs(case, BF16)
    expected = expected_linear(case, inputs, keep)
    seen = set()
    for first in (True, False):
        monkeypatch.setattr(heuristics, "parts_added_first", lambda parts, *sizes: seen.add(parts > 1) or first)
        with rk.use_backend("triton"):
            got = run_linear(case, inputs)
        for name, result in got.items():
            check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))
    assert seen == {True}
