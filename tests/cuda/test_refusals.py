"""torch.ops.rosa_kernels_cuda.* refuses in words what would take a kernel out of its tensors: each argument of each op
in turn is made one that does not fit. The emulated build has the same checks, but for the device.
"""

import os

import pytest
import torch

import cuda_kernels
import large_tensors
from rosa_kernels.backends.gpu.sizes import MOST_LENGTH

pytestmark = pytest.mark.skipif(
    "CUDA_EMULATED" not in os.environ, reason="runs where CUDA_EMULATED is set: test_emulation.py starts it"
)
FP32, BF16, INT32 = torch.float32, torch.bfloat16, torch.int32
T, PADDED, K, N, R, NNZ = 5, cuda_kernels.TOKEN_PADDING, 24, 20, 16, 40
kernels = torch.ops.rosa_kernels_cuda


def matrix(rows, columns, dtype=BF16):
    return torch.ones(rows, columns, dtype=dtype)


def indices(count):
    return torch.zeros(count, dtype=INT32)


def crow_indices():
    crow = torch.full((N + 1,), NNZ, dtype=INT32)
    crow[:2] = torch.tensor([0, 20])
    return crow


def col_indices():
    return torch.arange(20, dtype=INT32).repeat(2)


ROW_OF_S = {"crow": crow_indices, "col": col_indices}
NO_DROPOUT = {"seed": lambda: None, "threshold": lambda: 0, "scale": lambda: 1.0}
VALID = {
    "transpose": {"out": lambda: matrix(K, PADDED), "x": lambda: matrix(T, K)},
    "gather_columns": {
        "out": lambda: matrix(T, 3), "x": lambda: matrix(T, K), "col": lambda: indices(3), "crow": lambda: None,
        "row_length": lambda: 0,
    },
    "pack_entries": {
        "packed_entries": lambda: torch.zeros(NNZ + cuda_kernels.ENTRY_PADDING, dtype=torch.int64), "col": col_indices,
        "permutation": lambda: indices(NNZ), "values": lambda: torch.ones(NNZ),
    },
    "split_terms": {
        "out": lambda: torch.ones(3 * N * K, dtype=BF16), "matrix": lambda: matrix(N, K, FP32), "row_stride": lambda: K,
        "term_stride": lambda: N * K,
    },
    "shrink": {
        "H": lambda: matrix(T, R), "x": lambda: matrix(T, K), "A": lambda: matrix(3, K), **NO_DROPOUT,
        "parts": lambda: torch.zeros(2, T, R),
    },
    "lora_grad": {
        "out": lambda: matrix(K, 3), "z": lambda: matrix(T, K), "H": lambda: matrix(T, R), "scaling": lambda: 1.0,
        **NO_DROPOUT, "parts": lambda: torch.zeros(2, K, R),
    },
    "epilogue": {
        "y": lambda: matrix(T, N), "accumulate": lambda: True, "bias": lambda: torch.ones(N, dtype=BF16),
        "H": lambda: matrix(T, R), "B": lambda: matrix(N, 3),
        "scaling": lambda: 1.0, **NO_DROPOUT, "crow": crow_indices,
        "packed_entries": lambda: torch.zeros(NNZ + cuda_kernels.ENTRY_PADDING, dtype=torch.int64),
        "x": lambda: matrix(T, K), "x_transposed": lambda: None, "row_products": lambda: None,
        "row_terms": lambda: 1,
        "in_features": lambda: K, "multiprocessors": lambda: 8,
    },
    "sddmm": {
        "out": lambda: torch.zeros(NNZ), "dy_transposed": lambda: matrix(N, PADDED),
        "x_transposed": lambda: matrix(K, PADDED), **ROW_OF_S, "parts": lambda: torch.zeros(2, NNZ),
    },
    "gather_entries": {"out": lambda: torch.zeros(NNZ, dtype=BF16), "matrix": lambda: matrix(N, K), **ROW_OF_S},
    "densify": {
        "out": lambda: matrix(N, K), "weight": lambda: matrix(N, K), "values": lambda: torch.ones(NNZ), **ROW_OF_S,
    },
}  # fmt: skip
READS_INDICES = {"gather_columns", "pack_entries", "epilogue", "sddmm", "gather_entries", "densify"}


def call(op: str, **changed):
    arguments = {name: make() for name, make in VALID[op].items()} | changed
    if op in READS_INDICES:
        arguments.setdefault("indices_checked", True)
    return getattr(kernels, op)(**arguments)


@pytest.mark.parametrize("op", VALID)
def test_what_fits_runs(op):
    call(op)


@pytest.mark.parametrize("op", sorted(READS_INDICES))
def test_unchecked_indices_are_refused(op):
    message = rf"rosa_kernels_cuda\.{op}: call torch\.ops\.rosa_kernels\.\*, which checks the indices"
    with pytest.raises(RuntimeError, match=message):
        call(op, indices_checked=False)
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, op)(**{name: make() for name, make in VALID[op].items()})


def misfits(tensor: torch.Tensor):
    """(what is wrong, a tensor like the given one but for that)."""
    yield "no dimensions", tensor.flatten()[0]
    yield "another dtype", tensor.to(torch.float64)
    yield "a number for two", tensor.to(torch.uint8)
    yield "on meta", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "empty", tensor[:0]
    for axis in range(tensor.dim()):
        yield f"shorter along {axis}", tensor.narrow(axis, 0, tensor.shape[axis] - 1).contiguous()
    if tensor.dim() == 2:
        yield "three dimensions", tensor[None]
        yield "every other column", torch.cat([tensor, tensor], 1)[:, ::2]
    else:
        yield "every other element", torch.cat([tensor, tensor], -1)[..., ::2]


FITTING = {
    "transpose x empty", "transpose x shorter along 0", "shrink A shorter along 0", "shrink parts shorter along 0",
    "lora_grad out shorter along 1", "lora_grad out every other column", "lora_grad parts shorter along 0",
    "epilogue B shorter along 1", "epilogue B every other column", "sddmm parts shorter along 0",
    "split_terms matrix empty", "split_terms matrix shorter along 0", "split_terms matrix shorter along 1",
    "split_terms matrix every other column",
}  # fmt: skip
"""Other sizes or strides of an argument that are right beside the others."""
FITTING_OTHER_INDICES = {
    "gather_columns x shorter along 1", "gather_entries matrix shorter along 1", "sddmm x_transposed shorter along 0",
    "sddmm x_transposed empty", "epilogue packed_entries shorter along 0",
}  # fmt: skip
"""Whether these are right is a matter of the indices: an op that did not ask for checked ones would have to refuse."""
CASES = [
    pytest.param(op, name, what, id=f"{op} {name} {what}")
    for op, arguments in VALID.items()
    for name, make in arguments.items()
    if isinstance(tensor := make(), torch.Tensor)
    for what, _ in misfits(tensor)
    if f"{op} {name} {what}" not in FITTING | FITTING_OTHER_INDICES
]


@pytest.mark.parametrize("op,name,what", CASES)
def test_an_argument_that_does_not_fit_is_refused(op, name, what):
    wrong = dict(misfits(VALID[op][name]()))[what]
    with pytest.raises(RuntimeError, match=rf"rosa_kernels_cuda\.{op}: \w+: expected "):
        call(op, **{name: wrong})


@pytest.mark.parametrize("case", sorted(FITTING))
def test_other_sizes_that_fit_run(case):
    op, name, what = case.split(" ", 2)
    call(op, **{name: dict(misfits(VALID[op][name]()))[what]})


MISALIGNED = matrix(T * R + 1, 1).flatten()[1:].view(T, R)


@pytest.mark.parametrize(
    "op,changed,message",
    [
        (
            "transpose",
            {"x": large_tensors.zeros(MOST_LENGTH + 1, 1, dtype=BF16)},
            "x: expected at most 2146435072 rows",
        ),
        ("gather_columns", {"row_length": -1}, "row_length: expected 0 to 2146435072"),
        ("gather_columns", {"col": None}, "col and crow: expected one of them"),
        ("gather_columns", {"crow": indices(9)}, "col and crow: expected one of them"),
        ("gather_columns", {"col": None, "crow": indices(0)}, "crow: expected at least one element"),
        ("shrink", {"A": matrix(3, K, torch.float16)}, "A: expected the dtype of x or float32"),
        ("shrink", {"A": matrix(3, K, FP32)}, "H: expected the dtype of A"),
        ("shrink", {"H": MISALIGNED}, "H: expected memory that begins at a multiple of 16 bytes"),
        ("shrink", {"parts": torch.zeros(0, T, R)}, "parts: expected 1 to 65535 splits"),
        ("shrink", {"seed": torch.zeros(2, dtype=torch.int64)}, "seed: expected 1 elements"),
        ("shrink", {"seed": torch.zeros(1)}, "seed: expected int64"),
        ("lora_grad", {"H": MISALIGNED}, "H: expected memory that begins at a multiple of 16 bytes"),
        ("lora_grad", {"H": matrix(T, R, FP32)}, "out: expected the dtype of H"),
        ("epilogue", {"H": None}, "H and B: expected both or neither"),
        ("epilogue", {"H": matrix(T, R, FP32)}, "H: expected the dtype of B"),
        ("epilogue", {"crow": None}, "crow: expected a tensor beside packed_entries"),
        ("epilogue", {"x": None}, "x and x_transposed: expected one of them"),
        ("epilogue", {"x": None, "x_transposed": matrix(K, T)}, "x_transposed: expected rows that begin at multiples"),
        ("epilogue", {"x": None, "x_transposed": matrix(K, 8)}, "x_transposed: expected a multiple of 64 columns"),
        ("epilogue", {"x": matrix(T, K, FP32)}, "x: expected the dtype of y"),
        ("epilogue", {"row_products": matrix(T, 2)}, "row_products: expected float32"),
        ("epilogue", {"row_products": matrix(T + 1, 2, FP32)}, "row_products: expected 5 rows"),
        ("epilogue", {"row_products": matrix(T, 2, FP32)}, "row_products: expected none beside packed_entries"),
        ("epilogue", {"in_features": 0}, "in_features: expected 1 to"),
        ("epilogue", {"in_features": 2 * K}, "x: expected 48 columns"),
        ("epilogue", {"multiprocessors": 0}, "multiprocessors: expected 1 to 65535"),
        (
            "sddmm",
            {"x_transposed": matrix(K, 8), "dy_transposed": matrix(N, 8)},
            "x_transposed: expected a multiple of",
        ),
        ("gather_entries", {"out": torch.zeros(NNZ)}, "out: expected the dtype of matrix"),
        ("densify", {"weight": matrix(N, K, FP32)}, "weight: expected the dtype of out"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(op, changed, message):
    with pytest.raises(RuntimeError, match=rf"rosa_kernels_cuda\.{op}: {message}"):
        call(op, **changed)


def test_ranks_beyond_the_second_axis_of_a_grid_are_refused_by_the_launch():
    r = 2**20 + 1
    with pytest.raises(RuntimeError, match="CUDA refused to launch shrink: invalid configuration argument"):
        call("shrink", x=matrix(1, 1, FP32), A=matrix(r, 1, FP32), H=matrix(1, r + 15, FP32), parts=None)


LINEAR = {
    "x": lambda: matrix(T, K), "weight": lambda: matrix(N, K), "bias": lambda: torch.ones(N, dtype=BF16),
    "lora_A": lambda: matrix(3, K), "lora_B": lambda: matrix(N, 3), "scaling": lambda: 2.0,
    "values": lambda: torch.ones(NNZ), "crow": crow_indices, "col": col_indices, "structure": lambda: 0,
    "seed": lambda: None, "threshold": lambda: 0, "keep_scale": lambda: 1.0, "base": lambda: 1, "low_rank": lambda: 1,
    "sparse": lambda: 1, "keep_H": lambda: True, "multiprocessors": lambda: 8, "indices_checked": lambda: True,
}  # fmt: skip
BACKWARD = {name: make for name, make in LINEAR.items() if name not in ("bias", "keep_H")} | {
    "dy": lambda: matrix(T, N), "ccol": lambda: torch.cat([2 * torch.arange(20), torch.full((5,), NNZ)]).to(INT32),
    "row": lambda: torch.tensor([0, 1], dtype=INT32).repeat(20), "permutation": lambda: indices(NNZ),
    "H": lambda: matrix(T, R), "needs": lambda: 0b111001, "sddmm": lambda: 1,
}  # fmt: skip


def composed(arguments, op, **changed):
    return getattr(kernels, op)(**{name: make() for name, make in arguments.items()} | changed)


@pytest.mark.parametrize("op,arguments", [("linear", LINEAR), ("linear_backward", BACKWARD)])
def test_composed_ops_run_what_fits(op, arguments):
    assert all(result.isfinite().all() for result in composed(arguments, op) if result is not None)


@pytest.mark.parametrize(
    "op,changed,message",
    [
        ("linear", {"indices_checked": False}, "which checks the indices"),
        ("linear", {"base": 3}, "base: expected 0 to 2, got 3"),
        ("linear", {"low_rank": -1}, "low_rank: expected 0 to 3, got -1"),
        ("linear", {"sparse": 6}, "sparse: expected 0 to 5, got 6"),
        ("linear", {"values": torch.ones(NNZ - 1)}, "values: expected one for each index"),
        ("linear", {"col": None}, "crow and col: expected beside values"),
        ("linear", {"structure": 1}, "in whole rows or columns"),
        ("linear", {"weight": matrix(N, K + 1)}, ""),
        ("linear", {"lora_A": matrix(3, K + 1)}, ""),
        ("linear", {"bias": torch.ones(N - 1, dtype=BF16)}, ""),
        ("linear", {"x": matrix(T, K).to("meta")}, ""),
        ("linear_backward", {"indices_checked": False}, "which checks the indices"),
        ("linear_backward", {"H": matrix(T, 2)}, "H: expected"),
        ("linear_backward", {"H": matrix(T - 1, R)}, "H: expected"),
        ("linear_backward", {"H": matrix(T, R, FP32)}, ""),
        ("linear_backward", {"ccol": None}, "ccol, row and permutation: expected beside values"),
        ("linear_backward", {"sddmm": 3}, "sddmm_algorithm: expected 0 to 2, got 3"),
        ("linear_backward", {"dy": matrix(T, N + 1)}, ""),
        ("linear_backward", {"lora_A": None}, "lora_A and lora_B: expected both or neither"),
        ("linear_backward", {"lora_A": None, "lora_B": None, "needs": 0}, "lora_A and lora_B: expected beside H"),
        ("linear_backward", {"weight": None, "needs": 1}, "base: expected no base, as weight is None"),
        (
            "linear_backward",
            {"lora_B": matrix(N, 1 << 12), "H": None},
            "lora_A and lora_B: expected",
        ),
        ("linear_backward", {"dy": matrix(T + 1, N), "needs": 2}, "dy: expected as many tokens as x"),
        ("linear_backward", {"col": None, "values": None, "needs": 32}, "values, crow and col: expected beside"),
        ("linear_backward", {"row": indices(3)}, "ccol, row and permutation: expected in_features"),
        ("linear", {"lora_A": None, "lora_B": None}, "low_rank: expected none, as lora_A is None"),
        ("linear", {"lora_A": None, "low_rank": 0}, "lora_A and lora_B: expected both or neither"),
        ("linear", {"lora_B": matrix(N, 1 << 12), "low_rank": 2}, "lora_A and lora_B: expected"),
        ("linear", {"lora_B": matrix(N, 3)[None]}, ""),
        ("linear", {"weight": None}, "base: expected no base, as weight is None"),
        ("linear", {"base": 2}, "base: expected something to merge, in float32"),
        ("linear", {"values": None}, "sparse: expected none, as S has no entries"),
        ("linear", {"sparse": 4}, "sparse: expected whole rows"),
        ("linear", {"sparse": 5}, "sparse: expected whole columns"),
        ("linear", {"low_rank": 3}, "low_rank: expected sparse beside it"),
        (
            "linear",
            {"lora_A": None, "lora_B": None, "low_rank": 0, "sparse": 0, "values": None},
            "keep_H: expected false, as lora_A is None",
        ),
    ],
)
def test_composed_ops_refuse_what_does_not_fit(op, changed, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        composed(LINEAR if op == "linear" else BACKWARD, op, **changed)


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"dy": matrix(T, 0), "crow": indices(1), "structure": 2, "sddmm": 0}, "no entries of a matrix without any"),
        ({"crow": indices(N)}, "crow: expected out_features"),
        ({"dy": matrix(T + 1, N)}, "dy: expected as many tokens as x"),
        ({"sddmm": 0}, "structure: expected whole rows or columns"),
        ({"indices_checked": False}, "which checks the indices"),
    ],
)
def test_whole_sddmm_refuses_what_does_not_fit(changed, message):
    arguments = {
        "dy": matrix(T, N), "x": matrix(T, K), "crow": crow_indices(), "col": col_indices(), "structure": 0, "sddmm": 1,
        "multiprocessors": 8, "indices_checked": True,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        kernels.whole_sddmm(**arguments | changed)
