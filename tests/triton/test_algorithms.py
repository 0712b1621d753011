"""Every algorithm of the Triton backend, forced in turn on the interpreted kernels, gives the right numbers; and its
heuristics are consistent."""

import os

import pytest
import torch

import rosa_kernels as rk
from cases import LinearCase, make_inputs
from cost_model_cases import (
    by_algorithm,
    check_by_algorithm,
    check_call,
    check_cheapest_is_chosen,
    check_merged_in_fp32_alone,
    force,
)
from oracle import check, expected_linear
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall
from rosa_kernels.backends.triton import heuristics
from rosa_kernels.backends.triton.heuristics import LinearAlgorithm, linear_algorithms
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="runs where TRITON_INTERPRET=1: test_interpreter.py starts it",
)
FP32, BF16 = torch.float32, torch.bfloat16
by_library = heuristics.low_rank_gradients_by_library  # as it is where conftest.py leaves it alone

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


@interpreted
@pytest.mark.parametrize("case,dtype,algorithm", by_algorithm(CASES, (FP32, BF16), linear_algorithms))
def test_linear_by_algorithm(monkeypatch, case, dtype, algorithm):
    check_by_algorithm(monkeypatch, "triton", heuristics, linear_algorithms, case, dtype, algorithm)


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("low_rank", ["known", "library"])
@pytest.mark.parametrize("pattern", [None, "columns"])
def test_low_rank_gradients_by_library(monkeypatch, dtype, low_rank, pattern):
    """dH comes from the library and goes to either algorithm of dx."""
    case = LinearCase((20,), 66, 35, 4, pattern, x_layout="padded", adapter_layout="transposed")
    wanted = LinearAlgorithm("library", low_rank, "rows" if pattern else "")
    monkeypatch.setattr(heuristics, "low_rank_gradients_by_library", lambda *sizes: True)
    chosen = force(monkeypatch, heuristics, linear_algorithms, wanted)
    check_call("triton", case, make_inputs(case, dtype))
    assert chosen[-1].low_rank == low_rank


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("algorithm", ["tiled", "entries", "entries_transposed", "library"])
@pytest.mark.parametrize("pattern", ["sparse", "empty_rows", "full", "last_entry", "blocks"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_sddmm_by_algorithm(monkeypatch, dtype, algorithm, pattern, tokens):
    case = LinearCase((tokens,), 66, 50, 0, pattern, base=False, x_layout="strided", dy_layout="transposed")
    inputs = make_inputs(case, dtype)
    expected = expected_linear(case, inputs)["values"]
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, rates: algorithm)
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
    check_call("triton", case, inputs)
    if values_dtype is None:
        with rk.use_backend("triton"):
            got = rk.sddmm(inputs.dy, inputs.x, inputs.pattern)
        check("sddmm", got, expected_linear(case, inputs)["values"], inputs.x)


@pytest.mark.parametrize("architecture", device_rates.RATES)
def test_the_cheapest_algorithm_is_chosen(architecture):
    check_cheapest_is_chosen(heuristics, linear_algorithms, device_rates.RATES[architecture])


def test_16_bit_and_tf32_deltas_are_never_merged():
    check_merged_in_fp32_alone(linear_algorithms)


def test_structures_have_their_own_algorithms():
    for structure, S, dS in ((ROW, "rows", "packed"), (COLUMN, "columns", "packed"), (BLOCK16, "blocks", "blocks")):
        assert {listed.sparse for listed in linear_algorithms(LinearCall(99, 64, 64, 4, 640, structure))} == {S}
        assert heuristics.sddmm_algorithms(SDDMMCall(99, 64, 64, 640, structure, mixed=True)) == (dS,)


def test_wider_adapters_are_one_delta_but_in_fp16():
    for fp16 in (False, True):
        for wide in ({"mixed_values": True}, {"mixed_lora": True}):
            algorithms = linear_algorithms(LinearCall(99, 64, 64, 4, 640, fp16=fp16, **wide))
            assert any(listed.sparse == "delta" for listed in algorithms) != fp16
    S_alone = LinearCall(99, 64, 64, 0, 640, mixed_values=True)
    assert not any(listed.sparse == "delta" for listed in linear_algorithms(S_alone))


def test_the_choices_that_the_docstring_explains():
    """On an H100: library GEMMs for LoRA alone, a kernel for few tokens beside wider adapters or an S, merging in fp32,
    a dense S at 5 % and a gathered one at 0.01 %."""
    h100 = device_rates.RATES["sm_90"]

    def chosen(T=4096, **call):
        return heuristics.choose_linear(LinearCall(T, 4096, 4096, 16, **call), h100)

    def sddmm(nnz, **call):
        return heuristics.choose_sddmm(SDDMMCall(4096, 4096, 4096, nnz, **call), h100)

    assert chosen().base == "library"
    assert chosen(element_size=4, nnz=167772).base == "merged"
    assert chosen(nnz=838860).sparse == "delta"
    assert chosen(nnz=838860, dropout="x").sparse == "dense"
    assert chosen(nnz=1677).sparse == "gather_transposed"
    assert chosen(4) == ("library", "library", "")
    assert chosen(4, mixed_lora=True).base == "kernel"
    assert chosen(4, nnz=167772) == ("kernel", "inside", "gather")
    assert by_library(4096, 768, 2, h100) and by_library(4, 768, 2, h100) and not by_library(32768, 4096, 2, h100)
    assert sddmm(167772) == sddmm(335544, mixed=True) == "library"
    assert sddmm(16777, element_size=4) == "entries_transposed"


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_sums_in_one_part_and_in_as_many_as_there_may_be(monkeypatch, dropout_p, multiprocessors):
    case = LinearCase((40,), 130, 100, 8, "random", dropout_p=dropout_p)
    splits, splits_of = [], hardware.splits_of
    monkeypatch.setattr(hardware, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(hardware, "splits_of", lambda *a, **k: splits.append(splits_of(*a, **k)) or splits[-1])
    monkeypatch.setattr(heuristics, "low_rank_gradients_by_library", lambda *sizes: False)
    check_call("triton", case, make_inputs(case, BF16), delta_rounded=True)
    assert {count > 1 for count, _ in splits} == {multiprocessors > 1}
