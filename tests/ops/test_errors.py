"""Each wrong argument is a ValueError (a TypeError for a wrong Python type) whose message names it; never a crash."""

import pytest
import torch

import rosa_kernels as rk

I, O, R, T = 6, 5, 2, 3
PATTERN = rk.CSRPattern.random((O, I), 0.4, seed=0)
NNZ = PATTERN.nnz


def good(**changes):
    arguments = {
        "x": torch.randn(T, I),
        "weight": torch.randn(O, I),
        "bias": torch.randn(O),
        "lora_A": torch.randn(R, I),
        "lora_B": torch.randn(O, R),
        "scaling": 1.0,
        "values": torch.randn(NNZ),
        "pattern": PATTERN,
    }
    return arguments | changes


LINEAR_FAULTS = {
    "no adapter": ("lora_A", {"lora_A": None, "lora_B": None, "values": None, "pattern": None}),
    "x 0-D": ("x", {"x": torch.tensor(1.0)}),
    "x features": ("x", {"x": torch.randn(T, I + 1)}),
    "x integer": ("x", {"x": torch.ones(T, I, dtype=torch.int64)}),
    "x complex": ("x", {"x": torch.ones(T, I, dtype=torch.complex64)}),
    "x bool": ("x", {"x": torch.ones(T, I, dtype=torch.bool)}),
    "x float8": ("x", {"x": torch.ones(T, I).to(torch.float8_e4m3fn)}),
    "weight 1-D": ("weight", {"weight": torch.randn(I)}),
    "weight 3-D": ("weight", {"weight": torch.randn(1, O, I)}),
    "weight dtype": ("weight", {"weight": torch.randn(O, I, dtype=torch.float64)}),
    "weight device": ("weight", {"weight": torch.randn(O, I, device="meta")}),
    "bias shape": ("bias", {"bias": torch.randn(O + 1)}),
    "bias 2-D": ("bias", {"bias": torch.randn(1, O)}),
    "bias dtype": ("bias", {"bias": torch.randn(O).half()}),
    "bias device": ("bias", {"bias": torch.randn(O, device="meta")}),
    "lora_A 1-D": ("lora_A", {"lora_A": torch.randn(I)}),
    "lora_A features": ("lora_A", {"lora_A": torch.randn(R, I - 1)}),
    "lora_A r = 0": ("lora_A", {"lora_A": torch.randn(0, I), "lora_B": torch.randn(O, 0)}),
    "lora_A integer": ("lora_A", {"lora_A": torch.ones(R, I, dtype=torch.int32)}),
    "lora_A device": ("lora_A", {"lora_A": torch.randn(R, I, device="meta")}),
    "lora_B rank": ("lora_B", {"lora_B": torch.randn(O, R + 1)}),
    "lora_B features": ("lora_B", {"lora_B": torch.randn(O + 1, R)}),
    "lora_B 0-D": ("lora_B", {"lora_B": torch.tensor(1.0)}),
    "lora_B 1-D": ("lora_B", {"lora_B": torch.randn(O)}),
    "lora_B transposed": ("lora_B", {"lora_B": torch.randn(R, O)}),
    "lora_B integer": ("lora_B", {"lora_B": torch.ones(O, R, dtype=torch.int32)}),
    "lora_B device": ("lora_B", {"lora_B": torch.randn(O, R, device="meta")}),
    "lora_A without lora_B": ("lora_A", {"lora_B": None}),
    "values length": ("values", {"values": torch.randn(NNZ + 1)}),
    "values 2-D": ("values", {"values": torch.randn(NNZ, 1)}),
    "values integer": ("values", {"values": torch.ones(NNZ, dtype=torch.int64)}),
    "values device": ("values", {"values": torch.randn(NNZ, device="meta")}),
    "values without pattern": ("pattern", {"pattern": None}),
    "pattern shape": ("pattern", {"pattern": rk.CSRPattern.random((I, O), 0.4, seed=0)}),
    "pattern device": ("pattern", {"pattern": PATTERN.to("meta")}),
    "dropout_p negative": ("dropout_p", {"dropout_p": -0.1}),
    "dropout_p above one": ("dropout_p", {"dropout_p": 1.1}),
    "dropout_p nan": ("dropout_p", {"dropout_p": float("nan")}),
}


@pytest.mark.parametrize("fault", LINEAR_FAULTS)
def test_rosa_linear(backend, fault):
    argument, changes = LINEAR_FAULTS[fault]
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        rk.rosa_linear(**good(**changes))


@pytest.mark.parametrize("fault", LINEAR_FAULTS)
def test_the_other_linear_functions(backend, fault):
    """lora_linear, sparse_linear and rosa_delta check the same arguments, where they have them."""
    argument, changes = LINEAR_FAULTS[fault]
    arguments = good(**changes)
    dropout = {"dropout_p": arguments.pop("dropout_p")} if "dropout_p" in arguments else {}
    base = [arguments[name] for name in ("x", "weight", "bias")]
    lora = [arguments[name] for name in ("lora_A", "lora_B", "scaling")]
    sparse = [arguments[name] for name in ("values", "pattern")]
    calls = []
    if not {"values", "pattern"} & changes.keys():
        calls.append(lambda: rk.lora_linear(*base, *lora, **dropout))
    if not {"lora_A", "lora_B", "dropout_p"} & changes.keys():
        calls.append(lambda: rk.sparse_linear(*base, *sparse))
    if not {"weight", "bias"} & changes.keys() and fault not in ("x features", "lora_B features", "pattern shape"):
        calls.append(lambda: rk.rosa_delta(base[0], *lora, *sparse, **dropout))
    for call in calls:
        with pytest.raises(ValueError, match=rf"\b{argument}\b"):
            call()


@pytest.mark.parametrize("wrong", [{"x": torch.randn(T, I + 1)}, {"lora_B": torch.randn(O + 1, R)},
                                   {"pattern": rk.CSRPattern.random((O + 1, I), 0.0, 0), "values": torch.randn(0)}],
                         ids=["x features", "lora_B features", "pattern shape"])  # fmt: skip
def test_rosa_delta_whose_parts_disagree(wrong):
    """Without a weight no part says which one is right: any of them may be named."""
    arguments = good(**wrong)
    del arguments["weight"], arguments["bias"]
    with pytest.raises(ValueError, match="x|lora_A|lora_B|pattern"):
        rk.rosa_delta(**arguments)


def test_tensors_without_a_device_to_run_on():
    """Tensors on "meta" get the shape of the result, through the full check too."""
    x, weight, values = (torch.empty(size, device="meta") for size in ((T, I), (O, I), (NNZ,)))
    y = rk.sparse_linear(x, weight, None, values, PATTERN.to("meta"))
    assert y.shape == (T, O) and y.is_meta


def test_rosa_delta_of_nothing():
    with pytest.raises(ValueError, match="lora_A"):
        rk.rosa_delta(torch.randn(T, I), None, None, 1.0, None, None)


SPARSE_FAULTS = {
    "spmm x features": ("x", lambda: rk.spmm(torch.randn(T, I + 1), torch.randn(NNZ), PATTERN)),
    "spmm x 0-D": ("x", lambda: rk.spmm(torch.tensor(0.0), torch.randn(NNZ), PATTERN)),
    "spmm x integer": ("x", lambda: rk.spmm(torch.ones(T, I).long(), torch.randn(NNZ), PATTERN)),
    "spmm values": ("values", lambda: rk.spmm(torch.randn(T, I), torch.randn(NNZ - 1), PATTERN)),
    "spmm values integer": ("values", lambda: rk.spmm(torch.randn(T, I), torch.ones(NNZ).int(), PATTERN)),
    "spmm values device": ("values", lambda: rk.spmm(torch.randn(T, I), torch.randn(NNZ, device="meta"), PATTERN)),
    "spmm pattern device": ("pattern", lambda: rk.spmm(torch.randn(T, I), torch.randn(NNZ), PATTERN.to("meta"))),
    "sddmm dy features": ("dy", lambda: rk.sddmm(torch.randn(T, O + 1), torch.randn(T, I), PATTERN)),
    "sddmm x features": ("x", lambda: rk.sddmm(torch.randn(T, O), torch.randn(T, I + 1), PATTERN)),
    "sddmm tokens": ("dy", lambda: rk.sddmm(torch.randn(T + 1, O), torch.randn(T, I), PATTERN)),
    "sddmm leading": ("dy", lambda: rk.sddmm(torch.randn(1, T, O), torch.randn(T, I), PATTERN)),
    "sddmm dtype": ("dy", lambda: rk.sddmm(torch.randn(T, O).double(), torch.randn(T, I), PATTERN)),
    "sddmm dy device": ("dy", lambda: rk.sddmm(torch.randn(T, O, device="meta"), torch.randn(T, I), PATTERN)),
    "sddmm pattern device": ("pattern", lambda: rk.sddmm(torch.randn(T, O), torch.randn(T, I), PATTERN.to("meta"))),
    "csr_add shape": ("weight", lambda: rk.csr_add(torch.randn(I, O), torch.randn(NNZ), PATTERN)),
    "csr_add integer": ("weight", lambda: rk.csr_add(torch.ones(O, I).long(), torch.randn(NNZ), PATTERN)),
    "csr_add values": ("values", lambda: rk.csr_add(torch.randn(O, I), torch.randn(NNZ, 1), PATTERN)),
    "csr_add values device": (
        "values",
        lambda: rk.csr_add(torch.randn(O, I), torch.randn(NNZ, device="meta"), PATTERN),
    ),
}


@pytest.mark.parametrize("fault", SPARSE_FAULTS)
def test_sparse_ops(backend, fault):
    argument, call = SPARSE_FAULTS[fault]
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        call()


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


PATTERN_FAULTS = {
    "crow length": ("crow_indices", lambda: rk.CSRPattern(ints(0, 1), ints(0), (2, 3))),
    "crow empty": ("crow_indices", lambda: rk.CSRPattern(ints(), ints(), (2, 3))),
    "crow start": ("crow_indices", lambda: rk.CSRPattern(ints(1, 1, 2), ints(0, 1), (2, 3))),
    "crow end short": ("crow_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(0, 1), (2, 3))),
    "crow end long": ("crow_indices", lambda: rk.CSRPattern(ints(0, 1, 3), ints(0, 1), (2, 3))),
    "crow falls": ("crow_indices", lambda: rk.CSRPattern(ints(0, 2, 1, 2), ints(0, 1), (3, 3))),
    "crow negative": ("crow_indices", lambda: rk.CSRPattern(ints(0, -1, 2), ints(0, 1), (2, 3))),
    "crow float": ("crow_indices", lambda: rk.CSRPattern(torch.zeros(3), ints(), (2, 3))),
    "crow 2-D": ("crow_indices", lambda: rk.CSRPattern(ints(0, 1, 2)[None], ints(0, 1), (2, 3))),
    "col float": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), torch.zeros(1), (2, 3))),
    "col 2-D": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(0)[None], (2, 3))),
    "col bool": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), torch.ones(1, dtype=torch.bool), (2, 3))),
    "col too large": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(3), (2, 3))),
    "col negative": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(-1), (2, 3))),
    "col wraps in 32 bits": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(2**32), (2, 3))),
    "col duplicate": ("col_indices", lambda: rk.CSRPattern(ints(0, 2, 2), ints(1, 1), (2, 3))),
    "col unsorted": ("col_indices", lambda: rk.CSRPattern(ints(0, 0, 2), ints(2, 1), (2, 3))),
    "col device": ("col_indices", lambda: rk.CSRPattern(ints(0, 1, 1), ints(0).to("meta"), (2, 3))),
    "shape 1-D": ("shape", lambda: rk.CSRPattern(ints(0), ints(), (0,))),
    "shape negative": ("shape", lambda: rk.CSRPattern(ints(0), ints(), (-1, 3))),
    "shape too large": ("shape", lambda: rk.CSRPattern(ints(0), ints(), (0, 2**31))),
    "mask dtype": ("mask", lambda: rk.CSRPattern.from_mask(torch.ones(2, 3))),
    "mask 1-D": ("mask", lambda: rk.CSRPattern.from_mask(torch.ones(3, dtype=torch.bool))),
    "rows out of range": ("rows", lambda: rk.CSRPattern.from_rows(ints(2), (2, 3))),
    "rows negative": ("rows", lambda: rk.CSRPattern.from_rows(ints(-1), (2, 3))),
    "rows twice": ("rows", lambda: rk.CSRPattern.from_rows(ints(1, 1), (2, 3))),
    "rows float": ("rows", lambda: rk.CSRPattern.from_rows(torch.ones(1), (2, 3))),
    "rows 2-D": ("rows", lambda: rk.CSRPattern.from_rows(ints(1)[None], (2, 3))),
    "cols out of range": ("cols", lambda: rk.CSRPattern.from_columns(ints(3), (2, 3))),
    "cols twice": ("cols", lambda: rk.CSRPattern.from_columns(ints(0, 0), (2, 3))),
    "block_size": ("block_size", lambda: rk.CSRPattern.from_blocks(torch.ones(1, 1).bool(), 0, (2, 3))),
    "block_mask shape": ("block_mask", lambda: rk.CSRPattern.from_blocks(torch.ones(1, 1).bool(), 2, (2, 3))),
    "block_mask dtype": ("block_mask", lambda: rk.CSRPattern.from_blocks(torch.ones(1, 2), 2, (2, 3))),
    "density above one": ("density", lambda: rk.CSRPattern.random((2, 3), 1.5, 0)),
    "density negative": ("density", lambda: rk.CSRPattern.random((2, 3), -0.5, 0)),
    "density nan": ("density", lambda: rk.CSRPattern.random((2, 3), float("nan"), 0)),
}


@pytest.mark.parametrize("fault", PATTERN_FAULTS)
def test_pattern(fault):
    argument, build = PATTERN_FAULTS[fault]
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        build()


TYPE_FAULTS = {
    "crow list": ("crow_indices", lambda: rk.CSRPattern([0, 1, 1], ints(0), (2, 3))),
    "mask list": ("mask", lambda: rk.CSRPattern.from_mask([[True]])),
    "x list": ("x", lambda: rk.rosa_linear(**good(x=[[1.0] * I]))),
    "x None": ("x", lambda: rk.rosa_linear(**good(x=None))),
    "weight array": ("weight", lambda: rk.rosa_linear(**good(weight=torch.randn(O, I).numpy()))),
    "lora_A number": ("lora_A", lambda: rk.rosa_linear(**good(lora_A=1.0))),
    "pattern mask": ("pattern", lambda: rk.rosa_linear(**good(pattern=PATTERN.to_mask()))),
    "spmm pattern mask": ("pattern", lambda: rk.spmm(torch.randn(T, I), torch.randn(NNZ), PATTERN.to_mask())),
    "sddmm dy None": ("dy", lambda: rk.sddmm(None, torch.randn(T, I), PATTERN)),
    "csr_add values list": ("values", lambda: rk.csr_add(torch.randn(O, I), [0.0] * NNZ, PATTERN)),
}
NUMBER_FAULTS = {
    "shape of floats": lambda: rk.CSRPattern.random((2.0, 3), 0.5, 0),
    "block_size float": lambda: rk.CSRPattern.from_blocks(torch.ones(1, 2).bool(), 2.0, (2, 3)),
    "scaling string": lambda: rk.rosa_linear(**good(scaling="big")),
    "scaling None": lambda: rk.rosa_linear(**good(scaling=None)),
    "dropout_p string": lambda: rk.rosa_linear(**good(dropout_p="0.1")),
}


@pytest.mark.parametrize("fault", TYPE_FAULTS)
def test_wrong_python_types(fault):
    argument, call = TYPE_FAULTS[fault]
    with pytest.raises(TypeError, match=rf"^{argument}: expected a "):
        call()


@pytest.mark.parametrize("fault", NUMBER_FAULTS)
def test_what_is_no_number(fault):
    with pytest.raises((TypeError, ValueError)):
        NUMBER_FAULTS[fault]()


def test_a_gradient_may_be_wrong_in_no_way_that_crashes(backend):
    """autograd itself checks dy's shape and dtype before the package sees it."""
    x = torch.randn(T, I, requires_grad=True)
    y = rk.rosa_linear(**good(x=x))
    with pytest.raises(RuntimeError, match="grad|shape"):
        y.backward(torch.randn(T + 1, O))
