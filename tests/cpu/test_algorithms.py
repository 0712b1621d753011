"""Each of the CPU's algorithms, forced in turn over strips and chunks of a few elements, gives the right numbers; the
heuristics choose the algorithms that their costs are meant to choose."""

import pytest
import torch

import rosa_kernels as rk
from cases import LinearCase, make_inputs
from linear_checks import check_linear, run_linear
from oracle import dense
from rosa_kernels.backends.cpu import base_gemm, heuristics
from rosa_kernels.backends.cpu import ops as cpu_ops
from rosa_kernels.backends.cpu.heuristics import Algorithm
from rosa_kernels.pattern import ROW, UNSTRUCTURED

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)
FP32, BF16 = torch.float32, torch.bfloat16

CASES = [
    LinearCase((25,), 66, 35, 3, "random"),
    LinearCase((25,), 66, 35, 17, None, bias=False),
    LinearCase((25,), 66, 35, 0, "empty_rows"),
    LinearCase((5, 7), 66, 35, 8, "rows", x_layout="transposed", dy_layout="padded"),
    LinearCase((25,), 35, 66, 8, "columns", weight_layout="transposed", adapter_layout="transposed"),
    LinearCase((25,), 70, 35, 4, "almost_full", weight_layout="padded"),
    LinearCase((25,), 70, 35, 4, "full", lora_dtype=FP32, values_dtype=FP32),
    LinearCase((25,), 300, 40, 4, "random", lora_dtype=FP32, values_dtype=FP32),
    LinearCase((1,), 66, 35, 4, "random"),
    LinearCase((0,), 66, 35, 4, "random"),
    LinearCase((25,), 66, 35, 4, "random", dropout_p=0.3),
    LinearCase((25,), 66, 35, 4, None, dropout_p=0.3, lora_dtype=FP32),
    LinearCase((25,), 66, 35, 4, "random", base=False),
    LinearCase((2, 65), 75, 96, 5, "random", dropout_p=0.3, x_layout="padded", weight_layout="padded"),
    LinearCase((130,), 96, 75, 33, "blocks", bias=False, lora_dtype=FP32, dy_layout="strided"),
]


@pytest.fixture
def small_pieces(monkeypatch):
    """Several strips of every weight and several chunks of every batch."""
    monkeypatch.setattr(heuristics, "STRIP_ELEMENTS", 640)
    monkeypatch.setattr(base_gemm, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(heuristics, "WIDENED_TOKENS", 0)


@pytest.fixture
def force(monkeypatch):
    """force(algorithm) -> the list of the algorithms taken: that one where it is legal, else the heuristics'."""

    def install(algorithm):
        taken = []
        monkeypatch.setattr(cpu_ops, "_decode_tokens", lambda *_: -1)
        for function in ("forward_algorithm", "dx_algorithm"):
            chosen = getattr(heuristics, function)

            def choose(x, weight, lora_A, lora_B, values, structure, seed, widened, our_gemm, chosen=chosen):
                call = x, weight, lora_A, lora_B, values
                legal = algorithm in heuristics.legal_algorithms(*call, seed, widened, our_gemm)
                taken.append(algorithm if legal else chosen(*call, structure, seed, widened, our_gemm))
                return taken[-1]

            monkeypatch.setattr(heuristics, function, choose)
        return taken

    return install


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize(
    "dtype,fast_bfloat16", [(FP32, True), (BF16, True), (BF16, False)], ids=["fp32", "bf16", "widened"]
)
def test_linear_by_algorithm(monkeypatch, small_pieces, force, case, algorithm, dtype, fast_bfloat16):
    monkeypatch.setattr(cpu_ops, "fast_bfloat16", lambda: fast_bfloat16)
    taken = force(algorithm)
    with rk.use_backend("cpu"):
        check_linear("cpu", case, dtype)
    assert len(taken) == 2


@pytest.mark.parametrize("algorithm", [Algorithm.MERGED, Algorithm.KERNELS], ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        LinearCase((150,), 90, 1300, 5, "random"),  # several blocks of tokens and chunks of x's features
        LinearCase((130,), 2070, 33, 3, "rows", bias=False, x_layout="padded", dy_layout="strided"),
        LinearCase((300,), 47, 61, 0, "almost_full", weight_layout="transposed"),
    ],
    ids=lambda case: case.id,
)
def test_linear_by_our_gemm(monkeypatch, force, case, algorithm):
    """On any processor, whichever GEMM its heuristics prefer."""
    monkeypatch.setattr(cpu_ops, "uses_our_gemm", lambda dtype: dtype == FP32)
    monkeypatch.setattr(cpu_ops, "_decode_tokens", lambda dtype, with_weight: 0)
    monkeypatch.setattr(heuristics, "STRIP_ELEMENTS", 40_000)
    force(algorithm)
    with rk.use_backend("cpu"):
        check_linear("cpu", case, FP32)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.tokens <= 64 and case.weight_layout != "transposed"],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_linear_as_decode(monkeypatch, case, dtype):
    monkeypatch.setattr(cpu_ops, "_decode_tokens", lambda *_: 64)
    monkeypatch.setattr(heuristics, "forward_algorithm", None)
    with rk.use_backend("cpu"):
        check_linear("cpu", case, dtype)


@pytest.mark.parametrize("algorithm", list(Algorithm), ids=lambda algorithm: algorithm.name)
def test_each_algorithm_is_legal_somewhere(force, algorithm):
    dtype = BF16 if algorithm is Algorithm.FUSED else FP32
    if algorithm is Algorithm.FUSED and not cpu_ops.uses_our_gemm(dtype):
        pytest.skip(f"kernels for {cpu_ops.instruction_set()} do not multiply the base layer's weight")
    taken = force(algorithm)
    with rk.use_backend("cpu"):
        check_linear("cpu", LinearCase((25,), 66, 35, 3, None), dtype)
    assert taken == [algorithm, algorithm]


@pytest.mark.parametrize("algorithm", [Algorithm.MERGED, Algorithm.KERNELS], ids=lambda algorithm: algorithm.name)
def test_small_deltas_survive_the_widening_of_bf16(monkeypatch, small_pieces, force, algorithm):
    """Deltas of 2^-10 of W's entries, which bf16 (unit roundoff 2^-8) would round away, move y by their sum."""
    monkeypatch.setattr(cpu_ops, "fast_bfloat16", lambda: False)
    force(algorithm)
    x, weight = torch.ones(16, 512, dtype=BF16), torch.zeros(8, 512, dtype=BF16)
    weight[:, ::2], weight[:, 1::2] = 1.0, -1.0
    pattern = rk.CSRPattern.from_mask(torch.ones(8, 512, dtype=torch.bool))
    with rk.use_backend("cpu"):
        y = rk.sparse_linear(x, weight, None, torch.full((8 * 512,), 2.0**-10, dtype=BF16), pattern)
    assert torch.equal(y, torch.full((16, 8), 0.5, dtype=BF16))


def test_bf16_gradient_of_a_trainable_weight_is_summed_in_fp32(monkeypatch, small_pieces):
    monkeypatch.setattr(cpu_ops, "fast_bfloat16", lambda: False)
    case = LinearCase((300,), 40, 35, 3, "random")
    inputs = make_inputs(case, BF16)
    with rk.use_backend("cpu"):
        got = run_linear(case, inputs)["weight"].double()
    exact = inputs.dy.double().T @ inputs.x.double()
    assert ((got - exact).abs() <= 2.0**-8 * exact.abs() + 1e-3).all()


def chosen(
    tokens,
    out_features,
    in_features,
    r=16,
    density=0.01,
    dtype=FP32,
    structure=UNSTRUCTURED,
    widened=False,
    our_gemm=False,
):
    """(algorithm for y, algorithm for dx) of meta tensors: no memory is touched."""
    x, dy = (torch.empty(tokens, features, dtype=dtype, device="meta") for features in (in_features, out_features))
    weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    A, B = (torch.empty(*size, dtype=dtype, device="meta") for size in ((r, in_features), (out_features, r)))
    nnz = int(density * weight.numel())
    values = torch.empty(nnz, device="meta") if nnz else None
    adapter = (A, B) if r else (None, None)
    arguments = (weight, *adapter, values, structure, None, widened, our_gemm)
    return heuristics.forward_algorithm(x, *arguments), heuristics.dx_algorithm(dy, *arguments)


def test_many_tokens_merge_in_fp32_and_in_widened_bf16_alone():
    for O, I in ((768, 768), (3072, 768), (4096, 4096)):
        one_strip = O * I <= heuristics.STRIP_ELEMENTS  # more make the GEMMs read x again and again
        assert chosen(4096, O, I) == (2 * (Algorithm.MERGED,) if one_strip else 2 * (Algorithm.KERNELS,))
        assert chosen(4096, O, I, dtype=BF16, widened=True) == (Algorithm.MERGED, Algorithm.MERGED)
        assert chosen(4096, O, I, dtype=BF16) == (Algorithm.KERNELS, Algorithm.KERNELS)
        assert chosen(16, O, I) == (Algorithm.KERNELS, Algorithm.KERNELS)


def test_the_more_entries_the_sooner_it_merges():
    fewest = [
        min(t for t in range(1, 5000) if chosen(t, 1024, 1024, density=d, structure=s)[0] is Algorithm.MERGED)
        for d, s in ((0.1, UNSTRUCTURED), (0.02, UNSTRUCTURED), (0.02, ROW), (0.001, UNSTRUCTURED))
    ]
    assert fewest == sorted(fewest) and len(set(fewest)) == 4


def test_lora_alone_goes_through_the_library_until_it_merges():
    assert chosen(64, 1024, 1024, density=0.0)[0] is Algorithm.GEMMS
    assert chosen(8192, 1024, 1024, density=0.0)[0] is Algorithm.MERGED
    assert chosen(8192, 4096, 4096, density=0.0)[0] is Algorithm.GEMMS
    assert chosen(2048, 768, 768, density=0.0, dtype=BF16) == (Algorithm.GEMMS, Algorithm.GEMMS)


def test_our_gemm_merges_sooner():
    for density in (0.0, 0.01):
        assert chosen(512, 768, 768, density=density, our_gemm=True) == (Algorithm.MERGED, Algorithm.MERGED)
        assert chosen(2048, 4096, 4096, density=density, our_gemm=True) == (Algorithm.MERGED, Algorithm.MERGED)
    assert chosen(128, 2048, 2048, our_gemm=True) == (Algorithm.KERNELS, Algorithm.KERNELS)
    assert chosen(128, 768, 768, r=256, our_gemm=True) == (Algorithm.KERNELS, Algorithm.KERNELS)
    assert chosen(16, 2048, 2048, density=0.0, our_gemm=True)[1] is Algorithm.GEMMS


def test_bf16_are_fused_where_tokens_outnumber_features():
    for density in (0.0, 0.01):
        assert chosen(4096, 768, 768, density=density, dtype=BF16, our_gemm=True) == (Algorithm.FUSED, Algorithm.FUSED)
        assert chosen(1024, 3072, 768, density=density, dtype=BF16, our_gemm=True) == (
            Algorithm.FUSED,
            Algorithm.KERNELS,
        )
        assert chosen(256, 768, 768, density=density, dtype=BF16, our_gemm=True) == (
            Algorithm.KERNELS,
            Algorithm.KERNELS,
        )
        assert chosen(8192, 4096, 4096, density=density, dtype=BF16, our_gemm=True) == (
            Algorithm.KERNELS,
            Algorithm.KERNELS,
        )
    assert chosen(4096, 768, 768, r=0, dtype=BF16, our_gemm=True) == (Algorithm.FUSED, Algorithm.FUSED)
    assert chosen(4096, 768, 768, r=0, structure=ROW, dtype=BF16, our_gemm=True) == (
        Algorithm.KERNELS,
        Algorithm.KERNELS,
    )


def test_lora_alone_in_bf16_goes_through_the_kernels_unless_one_thread_would_sweep_a_large_adapter():
    for tokens, features in ((16, 768), (64, 4096), (2048, 4096)):
        assert chosen(tokens, features, features, density=0.0, dtype=BF16, our_gemm=True) == (
            Algorithm.KERNELS,
            Algorithm.KERNELS,
        )
    assert chosen(16, 4096, 4096, density=0.0, dtype=BF16, our_gemm=True) == (Algorithm.KERNELS, Algorithm.GEMMS)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens,dropout_p", [(3, 0.0), (3, 0.3), (8, 0.0)])
def test_decode_whose_A_and_B_are_shared_among_threads(tokens, dropout_p, dtype):
    with rk.use_backend("cpu"):
        check_linear("cpu", LinearCase((tokens,), 1100, 1050, 64, "sparse", dropout_p=dropout_p), dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tokens", [3, 40, 200])  # one at a time; a block shared among threads; several blocks
@pytest.mark.parametrize("pattern", ["none", "empty_rows", "rows", "columns", "blocks"])
def test_spmm_writes_every_element_of_y(pattern, tokens, dtype):
    inputs = make_inputs(LinearCase((tokens,), 300, 610, 0, pattern), dtype)
    expected = inputs.x.detach().double() @ dense(inputs.values, inputs.pattern).T
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
    try:
        with rk.use_backend("cpu"), torch.no_grad():
            y = rk.spmm(inputs.x, inputs.values, inputs.pattern)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8 if dtype == BF16 else 0, atol=1e-5)
