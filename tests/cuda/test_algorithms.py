"""Every way of the CUDA backend's cost model, forced in turn on the emulated kernels, gives the right numbers; and the
model is consistent."""

import os

import pytest
import torch

import rosa_kernels as rk
from cases import CPU, LinearCase, make_inputs
from cost_model_cases import call_of, calls, nearest
from linear_checks import mask_of, run_linear
from oracle import check, dense, expected_linear
from rosa_kernels.backends.cuda import bindings, heuristics
from rosa_kernels.backends.gpu import cost_model, device_rates, hardware
from rosa_kernels.backends.gpu.operands import NO_DROPOUT, Sparse
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

emulated = pytest.mark.skipif(
    "CUDA_EMULATED" not in os.environ, reason="runs where CUDA_EMULATED is set: test_emulation.py starts it"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_DTYPE = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
SHARED = hardware.shared_memory(CPU)

# A pass of 16 warps takes 512 features, one of 8 warps 256; rows are long from 129 entries on; sums over 256 bytes of
# features or 128 tokens are split.
WAYS_CASES = [
    LinearCase((5,), 66, 35, 3),
    LinearCase((20,), 64, 48, 16, "random"),
    LinearCase((33,), 66, 35, 17, "empty_rows", x_layout="transposed", dy_layout="padded"),
    LinearCase((20,), 66, 35, 8, "random", bias=False, dropout_p=0.3),
    LinearCase((20,), 66, 35, 4, "random", lora_dtype=FP32, values_dtype=FP32),
    LinearCase((20,), 66, 35, 33, "random", lora_dtype=FP32, dropout_p=0.3),
    LinearCase((20,), 66, 35, 4, None, dropout_p=0.5, lora_dtype=FP32),
    LinearCase((20,), 66, 35, 40, None, x_layout="expanded", dy_layout="expanded"),
    LinearCase((20,), 66, 35, 4, "rows", weight_layout="transposed"),
    LinearCase((20,), 66, 35, 4, "rows", values_dtype=FP32, dropout_p=0.3),
    LinearCase((20,), 66, 35, 4, "columns", values_dtype=FP32),
    LinearCase((20,), 66, 48, 4, "blocks"),
    LinearCase((20,), 66, 48, 4, "random", base=False, dropout_p=0.3),
    LinearCase((20,), 66, 35, 0, "blocks", base=False),
    LinearCase((20,), 66, 35, 0, "columns", base=False),
    LinearCase((20,), 66, 35, 4, "rows", base=False),
    LinearCase((300,), 600, 66, 40, "empty_rows"),
    LinearCase((40,), 66, 1100, 16, "almost_full"),
    LinearCase((700,), 66, 900, 3, "random", dropout_p=0.3),  # too many tokens for eight warps to share features
]


def legal_ways(call):
    """With and without shared memory for x."""
    return list(dict.fromkeys((*heuristics.linear_ways(call, SHARED), *heuristics.linear_ways(call, 0))))


WAYS = [
    pytest.param(case, dtype, way, id=f"{case.id}-{str(dtype)[6:]}-{'-'.join(filter(None, way)) or 'zeros'}")
    for case in WAYS_CASES
    for dtype in (FP32, BF16, FP16)
    for way in legal_ways(call_of(case, dtype))
]


def check_all(got, case, inputs, delta_rounded=False):
    expected = expected_linear(case, inputs, mask_of(case, inputs.x.device), delta_rounded)
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))


@emulated
@pytest.mark.parametrize("case,dtype,way", WAYS)
def test_linear_by_way(monkeypatch, case, dtype, way):
    taken = []

    def force(call, shared_limit, rates):
        taken.append(nearest(legal_ways(call), way))
        return taken[-1]

    monkeypatch.setattr(heuristics, "choose_linear", force)
    inputs = make_inputs(case, dtype)
    with rk.use_backend("cuda"):
        got = run_linear(case, inputs)
    check_all(got, case, inputs, delta_rounded=way.S in ("delta", "rows", "columns"))
    assert taken[0] == way and len(taken) == 2


@emulated
@BY_DTYPE
@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("dx_way", ["kernel", "library"])
def test_low_rank_gradients_by_library(monkeypatch, dtype, r, dx_way):
    """dH comes from the library, unpadded where r is no multiple of 16, and goes to either way of dx."""
    case = LinearCase((20,), 66, 35, r, None, x_layout="padded", adapter_layout="transposed")
    inputs = make_inputs(case, dtype)
    monkeypatch.setattr(heuristics, "choose_linear", lambda call, *limits: heuristics.CudaWay("library", dx_way))
    with rk.use_backend("cuda"):
        check_all(run_linear(case, inputs), case, inputs)


@emulated
@BY_DTYPE
@pytest.mark.parametrize("values_dtype", [None, FP32], ids=["same", "fp32 values"])
@pytest.mark.parametrize("way", ["entries_columns", "library"])
@pytest.mark.parametrize("pattern", ["sparse", "empty_rows", "full", "last_entry", "blocks"])
@pytest.mark.parametrize("tokens", [1, 40, 1100])
def test_sddmm_by_way(monkeypatch, dtype, values_dtype, way, pattern, tokens):
    case = LinearCase(
        (tokens,), 66, 50, 0, pattern, values_dtype=values_dtype, x_layout="strided", dy_layout="transposed"
    )
    inputs = make_inputs(case, dtype)
    taken = []
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, rates: taken.append(way) or way)
    with rk.use_backend("cuda"):
        got = run_linear(case, inputs)
    check("values", got["values"], expected_linear(case, inputs)["values"], inputs.values)
    assert taken == [way]


@emulated
@BY_DTYPE
@pytest.mark.parametrize("pattern", ["rows", "columns", "full"])
def test_sddmm_of_whole_rows_and_columns(dtype, pattern):
    """With the rows at hand, as in the backward; test_ops.test_sddmm comes without them."""
    case = LinearCase((20,), 66, 50, 0, pattern, values_dtype=FP32, x_layout="strided", dy_layout="transposed")
    inputs = make_inputs(case, dtype)
    with rk.use_backend("cuda"):
        got = run_linear(case, inputs)
    check("values", got["values"], expected_linear(case, inputs)["values"], inputs.values)


@emulated
@BY_DTYPE
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_any_number_of_splits(monkeypatch, dtype, splits):
    """More splits than there is work leave parts of zeros."""
    case = LinearCase((40,), 130, 100, 20, "random", dropout_p=0.3)
    inputs = make_inputs(case, dtype)
    taken = []
    monkeypatch.setattr(hardware, "splits_of", lambda *sizes: taken.append(splits) or (splits, 1))
    monkeypatch.setattr(
        heuristics, "choose_linear", lambda call, *limits: heuristics.CudaWay("library", "kernel", "shared")
    )
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, rates: "entries_columns")
    with rk.use_backend("cuda"):
        check_all(run_linear(case, inputs), case, inputs)
    assert len(taken) == 6  # H twice, dH, dA, dB, dS


@emulated
def test_tensors_that_no_16_byte_access_may_touch():
    """x and y one element off: the kernels' own tensors are aligned, a user's need not be."""
    for dtype in (FP32, BF16):
        x = torch.randn(20 * 64 + 1).to(dtype)[1:].view(20, 64)
        A = torch.randn(8 * 64 + 1).to(dtype)[1:].view(8, 64)
        H = bindings.shrink(x, A)
        assert x.data_ptr() % 16 and A.data_ptr() % 16
        torch.testing.assert_close(H[:, :8].double(), x.double() @ A.double().T, rtol=2e-2, atol=2e-2)
        assert H.shape == (20, 16) and not H[:, 8:].any()


@emulated
@BY_DTYPE
@pytest.mark.parametrize("way", ["shared", "global"])
def test_infinities_stay_where_they_belong(monkeypatch, dtype, way):
    """One in x meets the padding of tiles, ranks and rows, which must not make NaNs of it."""
    case = LinearCase((20,), 66, 35, 1, "empty_rows")
    inputs = make_inputs(case, dtype)
    inputs.x[3, 5] = torch.inf
    monkeypatch.setattr(heuristics, "choose_linear", lambda call, *limits: heuristics.CudaWay("library", "kernel", way))
    positive = {name: None if t is None else t.abs() for name, t in vars(inputs).items() if name != "pattern"}
    arguments = [positive[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with rk.use_backend("cuda"):
        y = rk.rosa_linear(*arguments, 1.0, positive["values"], inputs.pattern)
    assert bool((y[3] == torch.inf).all()) and bool(y[torch.arange(20) != 3].isfinite().all())


@emulated
def test_x_fills_shared_memory_to_the_last_byte():
    K = SHARED // (heuristics.TOKENS_A_BLOCK * 2)
    case = LinearCase((20,), K, 40, 4, "sparse", base=False)
    inputs = make_inputs(case, BF16)
    call = cost_model.LinearCall(20, 40, K, 4, inputs.pattern.nnz, base=False, dropout="x")
    assert {way.S for way in heuristics.linear_ways(call, SHARED)} == {"shared"}
    y = torch.empty(20, 40, dtype=BF16)
    S = Sparse(inputs.values, inputs.pattern.crow_indices, inputs.pattern.col_indices, 0, (40, K))
    bindings.epilogue(y, False, None, None, 1.0, NO_DROPOUT, S.crow, bindings.pack_entries(S), inputs.x, None, None, K)
    exact = inputs.x.double() @ dense(inputs.values, inputs.pattern).T
    assert float((y.double() - exact).norm() / exact.norm()) < 2.0**-7


@pytest.mark.parametrize("target", device_rates.RATES)
def test_the_plan_takes_the_cheapest_legal_way(target):
    rates = device_rates.RATES[target]
    for call in calls():
        chosen = heuristics.choose_linear(call, SHARED, rates)
        seconds = {way: heuristics.linear_seconds(call, way, rates) for way in heuristics.linear_ways(call, SHARED)}
        assert chosen in seconds and seconds[chosen] == min(seconds.values())
        assert all(0 < s < 10 for s in seconds.values())


def test_16_bit_and_tf32_deltas_are_never_merged():
    for call in calls():
        merged = any(way.base == "merged" for way in heuristics.linear_ways(call, SHARED))
        assert merged == (call.element_size == 4 and not call.tf32)
    dropped = cost_model.LinearCall(9, 8, 8, 4, element_size=4, dropout="x")
    assert not any(way.base == "merged" for way in heuristics.linear_ways(dropped, SHARED))


def test_structures_have_their_own_ways():
    for structure, S in ((ROW, {"rows"}), (COLUMN, {"columns"}), (BLOCK16, {"shared", "delta"})):
        assert {
            way.S for way in heuristics.linear_ways(cost_model.LinearCall(99, 64, 64, 4, 640, structure), SHARED)
        } == S
    for structure in (ROW, COLUMN):
        assert heuristics.sddmm_ways(cost_model.SDDMMCall(99, 64, 64, 640, structure, mixed=True)) == ("packed",)


def test_x_is_gathered_from_shared_memory_where_that_holds_its_features():
    fits = SHARED // (heuristics.TOKENS_A_BLOCK * 2)
    for K, S in ((fits, "shared"), (fits + 1, "global")):
        assert heuristics.linear_ways(cost_model.LinearCall(99, 64, K, 4, 640), SHARED)[0].S == S


def test_the_choices_that_the_docstring_explains():
    """On an H100: merging in fp32, entries gathered at 0.1 %, a dense S at 1 % and 5 %, library GEMMs for LoRA of few tokens."""
    h100 = device_rates.RATES["sm_90"]
    large = {"tokens": 4096, "N": 4096, "K": 4096, "r": 16}

    def chosen(**call):
        return heuristics.choose_linear(cost_model.LinearCall(**{**large, **call}), SHARED, h100)

    assert chosen(element_size=4, nnz=167772) == ("merged", "", "")
    assert chosen(nnz=16777) == ("library", "kernel", "shared")
    assert chosen(nnz=167772) == ("library", "delta", "delta")
    assert chosen(nnz=167772, mixed_values=True, mixed_lora=True) == ("library", "delta", "delta")
    assert chosen(nnz=838860) == ("library", "delta", "delta")
    assert chosen(nnz=838860, dropout="x") == ("library", "kernel", "shared")
    assert chosen(tokens=4) == ("library", "library", "")
    assert heuristics.choose_sddmm(cost_model.SDDMMCall(4096, 4096, 4096, 335544), h100) == "library"
    assert heuristics.choose_sddmm(cost_model.SDDMMCall(4096, 4096, 4096, 16777), h100) == "entries_columns"
