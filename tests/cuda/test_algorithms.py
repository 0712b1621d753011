"""Every algorithm of the CUDA backend, forced in turn on the emulated kernels, gives the right numbers; and its
heuristics are consistent."""

import os

import pytest
import torch

import cuda_kernels
import rosa_kernels as rk
from cases import LinearCase, make_inputs
from cost_model_cases import (
    by_algorithm,
    check_by_algorithm,
    check_call,
    check_cheapest_is_chosen,
    check_merged_in_fp32_alone,
)
from linear_checks import run_linear
from oracle import check, dense, expected_linear
from rosa_kernels.backends.cuda import heuristics
from rosa_kernels.backends.cuda.heuristics import LinearAlgorithm
from rosa_kernels.backends.gpu import device_rates, hardware
from rosa_kernels.backends.gpu.cost_model import LinearCall, SDDMMCall
from rosa_kernels.backends.triton.operands import NO_DROPOUT, Sparse
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW

emulated = pytest.mark.skipif(
    "CUDA_EMULATED" not in os.environ, reason="runs where CUDA_EMULATED is set: test_emulation.py starts it"
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BY_DTYPE = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
H100 = device_rates.RATES["sm_90"]
LARGEST_K = H100.shared_memory // (cuda_kernels.EPILOGUE_TOKENS * 2)
"""The most features in 16 bits of which shared memory holds a block's tokens."""

# A pass of 16 warps takes 512 features, one of 8 warps 256; rows are long from 129 entries on; sums over 256 bytes of
# features or 128 tokens are split.
CASES = [
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


def linear_algorithms(call):
    return heuristics.linear_algorithms(call, H100)


def with_and_without_shared_memory(call):
    """Whether or not it holds x."""
    without = heuristics.linear_algorithms(call, H100._replace(shared_memory=0))
    return list(dict.fromkeys((*linear_algorithms(call), *without)))


@emulated
@pytest.mark.parametrize(
    "case,dtype,algorithm", by_algorithm(CASES, (FP32, BF16, FP16), with_and_without_shared_memory)
)
def test_linear_by_algorithm(monkeypatch, case, dtype, algorithm):
    check_by_algorithm(monkeypatch, "cuda", heuristics, with_and_without_shared_memory, case, dtype, algorithm)


@emulated
@BY_DTYPE
@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("low_rank", ["kernel", "library"])
def test_low_rank_gradients_by_library(monkeypatch, dtype, r, low_rank):
    """dH comes from the library, unpadded where r is no multiple of 16, and goes to either algorithm of dx."""
    case = LinearCase((20,), 66, 35, r, None, x_layout="padded", adapter_layout="transposed")
    monkeypatch.setattr(heuristics, "choose_linear", lambda call, rates: LinearAlgorithm("library", low_rank))
    check_call("cuda", case, make_inputs(case, dtype))


@emulated
@BY_DTYPE
@pytest.mark.parametrize("values_dtype", [None, FP32], ids=["same", "fp32 values"])
@pytest.mark.parametrize("algorithm", ["entries_transposed", "library"])
@pytest.mark.parametrize("pattern", ["sparse", "empty_rows", "full", "last_entry", "blocks"])
@pytest.mark.parametrize("tokens", [1, 40, 1100])
def test_sddmm_by_algorithm(monkeypatch, dtype, values_dtype, algorithm, pattern, tokens):
    case = LinearCase(
        (tokens,), 66, 50, 0, pattern, values_dtype=values_dtype, x_layout="strided", dy_layout="transposed"
    )
    inputs = make_inputs(case, dtype)
    taken = []
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, rates: taken.append(algorithm) or algorithm)
    with rk.use_backend("cuda"):
        got = run_linear(case, inputs)
    check("values", got["values"], expected_linear(case, inputs)["values"], inputs.values)
    assert taken == [algorithm]


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
    inputs = make_inputs(LinearCase((40,), 130, 100, 20, "random"), dtype)
    x, dy, A = inputs.x, inputs.dy, inputs.lora_A
    crow, col = inputs.pattern.crow_indices, inputs.pattern.col_indices
    monkeypatch.setattr(hardware, "splits_of", lambda *sizes: (splits, 1))
    H, dB = cuda_kernels.shrink(x, A), torch.empty(100, 20, dtype=dtype)
    cuda_kernels.lora_grad(dy, H, dB, 2.0)
    dS = cuda_kernels.sddmm(dy, x, crow, col, dtype)
    dW = dy.double().T @ x.double()
    for got, exact in (
        (H[:, :20], x.double() @ A.double().T),
        (dB, 2.0 * dy.double().T @ H[:, :20].double()),
        (dS, dW[inputs.pattern.row_of_entry(), col.long()]),
    ):
        assert float((got.double() - exact).norm() / exact.norm()) < 2.0**-7


@emulated
@BY_DTYPE
@pytest.mark.parametrize("multiprocessors", [1, 60000])
def test_sums_in_one_part_and_in_as_many_as_there_may_be(monkeypatch, dtype, multiprocessors):
    case = LinearCase((2100,), 300, 100, 20, "random", dropout_p=0.3)
    monkeypatch.setattr(hardware, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(heuristics, "choose_linear", lambda call, rates: LinearAlgorithm("library", "kernel", "shared"))
    monkeypatch.setattr(heuristics, "choose_sddmm", lambda call, rates: "entries_transposed")
    check_call("cuda", case, make_inputs(case, dtype))


@emulated
def test_tensors_that_no_16_byte_access_may_touch():
    """x and y one element off: the kernels' own tensors are aligned, a user's need not be."""
    for dtype in (FP32, BF16):
        x = torch.randn(20 * 64 + 1).to(dtype)[1:].view(20, 64)
        A = torch.randn(8 * 64 + 1).to(dtype)[1:].view(8, 64)
        H = cuda_kernels.shrink(x, A)
        assert x.data_ptr() % 16 and A.data_ptr() % 16
        torch.testing.assert_close(H[:, :8].double(), x.double() @ A.double().T, rtol=2e-2, atol=2e-2)
        assert H.shape == (20, 16) and not H[:, 8:].any()


@emulated
@BY_DTYPE
@pytest.mark.parametrize("algorithm", ["shared", "global"])
def test_infinities_stay_where_they_belong(monkeypatch, dtype, algorithm):
    """One in x meets the padding of tiles, ranks and rows, which must not make NaNs of it."""
    case = LinearCase((20,), 66, 35, 1, "empty_rows")
    inputs = make_inputs(case, dtype)
    inputs.x[3, 5] = torch.inf
    monkeypatch.setattr(
        heuristics, "choose_linear", lambda call, rates: LinearAlgorithm("library", "kernel", algorithm)
    )
    positive = {name: None if t is None else t.abs() for name, t in vars(inputs).items() if name != "pattern"}
    arguments = [positive[name] for name in ("x", "weight", "bias", "lora_A", "lora_B")]
    with rk.use_backend("cuda"):
        y = rk.rosa_linear(*arguments, 1.0, positive["values"], inputs.pattern)
    assert bool((y[3] == torch.inf).all()) and bool(y[torch.arange(20) != 3].isfinite().all())


@emulated
def test_x_fills_shared_memory_to_the_last_byte():
    K = LARGEST_K
    case = LinearCase((20,), K, 40, 4, "sparse", base=False)
    inputs = make_inputs(case, BF16)
    call = LinearCall(20, 40, K, 4, inputs.pattern.nnz, has_base=False, dropout="x")
    assert {listed.sparse for listed in linear_algorithms(call)} == {"shared"}
    y = torch.empty(20, 40, dtype=BF16)
    S = Sparse(inputs.values, inputs.pattern.crow_indices, inputs.pattern.col_indices, 0, (40, K))
    entries = cuda_kernels.pack_entries(S)
    cuda_kernels.epilogue(y, False, None, None, 1.0, NO_DROPOUT, S.crow, entries, inputs.x, None, None, K)
    exact = inputs.x.double() @ dense(inputs.values, inputs.pattern).T
    assert float((y.double() - exact).norm() / exact.norm()) < 2.0**-7


@pytest.mark.parametrize("architecture", device_rates.RATES)
def test_the_cheapest_algorithm_is_chosen(architecture):
    check_cheapest_is_chosen(heuristics, linear_algorithms, device_rates.RATES[architecture])


def test_16_bit_and_tf32_deltas_are_never_merged():
    check_merged_in_fp32_alone(linear_algorithms)


def test_structures_have_their_own_algorithms():
    for structure, S in ((ROW, {"rows"}), (COLUMN, {"columns"}), (BLOCK16, {"shared", "delta"})):
        assert {listed.sparse for listed in linear_algorithms(LinearCall(99, 64, 64, 4, 640, structure))} == S
    for structure in (ROW, COLUMN):
        assert heuristics.sddmm_algorithms(SDDMMCall(99, 64, 64, 640, structure, mixed=True)) == ("packed",)


def test_x_is_gathered_from_shared_memory_where_that_holds_its_features():
    for K, S in ((LARGEST_K, "shared"), (LARGEST_K + 1, "global")):
        assert linear_algorithms(LinearCall(99, 64, K, 4, 640))[0].sparse == S


def test_the_choices_that_the_docstring_explains():
    """On an H100: merging in fp32, entries gathered at 0.1 %, a dense delta at 1 % and 5 %, library GEMMs for LoRA of
    few tokens."""

    def chosen(T=4096, **call):
        return heuristics.choose_linear(LinearCall(T, 4096, 4096, 16, **call), H100)

    assert chosen(element_size=4, nnz=167772) == ("merged", "", "")
    assert chosen(nnz=16777) == ("library", "kernel", "shared")
    assert chosen(nnz=167772) == ("library", "delta", "delta")
    assert chosen(nnz=167772, mixed_values=True, mixed_lora=True) == ("library", "delta", "delta")
    assert chosen(nnz=838860) == ("library", "delta", "delta")
    assert chosen(nnz=838860, dropout="x") == ("library", "kernel", "shared")
    assert chosen(T=4) == ("library", "library", "")
    assert heuristics.choose_sddmm(SDDMMCall(4096, 4096, 4096, 335544), H100) == "library"
    assert heuristics.choose_sddmm(SDDMMCall(4096, 4096, 4096, 16777), H100) == "entries_transposed"
