"""torch.ops.rosa_kernels.* called by anybody: an error in words for what does not fit, the right numbers elsewhere."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rosa_kernels as rk
from plain_formulas import PATTERNS, SCALING, SHAPE
from rosa_kernels import op_checks
from rosa_kernels.pattern import BLOCK, BLOCK16, COLUMN, ROW, STRUCTURE_NUMBERS, UNSTRUCTURED

OPS = torch.ops.rosa_kernels
OUT_FEATURES, IN_FEATURES = SHAPE
T, R = 3, 2


def arguments(op: str, pattern=PATTERNS["unstructured"]) -> dict:
    """A call of the op that fits."""
    crow, col = pattern.crow_indices, pattern.col_indices
    out_features, in_features = pattern.shape
    ccol, row, permutation = pattern.transpose()
    by_columns = {"ccol": ccol, "row": row, "permutation": permutation}
    x, dy, values = torch.randn(T, in_features), torch.randn(T, out_features), torch.randn(pattern.nnz)
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    factors = {"lora_A": torch.randn(R, in_features), "lora_B": torch.randn(out_features, R), "scaling": SCALING}
    sparse = {"values": values, "crow": crow, "col": col}
    numbers = {"structure": pattern.structure, "dropout_p": 0.0, "seed": None}
    match op:
        case "rosa_linear":
            return {"x": x, "weight": weight, "bias": bias} | factors | sparse | numbers | by_columns
        case "rosa_linear_backward":
            first = {"dy": dy, "x": x, "weight": weight}
            return first | factors | sparse | by_columns | numbers | {"needs": [True] * 6}
        case "spmm":
            return {"x": x} | sparse | {"structure": pattern.structure} | by_columns
        case "sddmm":
            return {"dy": dy, "x": x, "crow": crow, "col": col, "structure": pattern.structure} | by_columns
        case "csr_add":
            return {"weight": weight} | sparse


EVERY_OP = pytest.mark.parametrize("op", ["rosa_linear", "rosa_linear_backward", "spmm", "sddmm", "csr_add"])


def changed(tensor: torch.Tensor, at: int, value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def hostile_values(old):
    """What may stand in an argument's place; at least one of them is the argument's own kind."""
    if old is None or isinstance(old, (int, float, list)):
        return [-1, 2**40, float("nan"), True]
    shape = tuple(old.shape)
    if old.dtype == torch.int32:
        wrong = [changed(old, at, value) for at in (0, -1) for value in (-1, 10**9, 3)] if old.numel() else []
        return [*wrong, old.flip(0), old[:-1], old.repeat(2), old.repeat(2)[::2], old.long(), old[None], old.float()]
    return [
        torch.randn(2, 3, 4), torch.randn(()), torch.randn(0), torch.randn(*shape, 1), torch.randn(shape[1:]),
        torch.randn(*shape[:-1], shape[-1] + 1), torch.randn(*shape[:-1], 10**6)[..., :1], old.double(),
        old.to(torch.complex64), old.int(), old.to("meta"), torch.zeros(shape).to_sparse(),
        torch.zeros(shape).to_mkldnn(),
    ]  # fmt: skip


@EVERY_OP
def test_no_call_reads_what_is_not_there(op, backend):
    """Each argument in turn becomes something else. An error names it, or the call is right after all."""
    right = arguments(op)
    refused = 0
    for name, old in right.items():
        for value in (*hostile_values(old), None):
            try:
                getattr(OPS, op)(*(right | {name: value}).values())
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                assert str(error)
                refused += 1
    assert refused > 20
    getattr(OPS, op)(*right.values())


FAULTS = {
    "a column past the end": ("col", lambda p: changed(p.col_indices, 0, IN_FEATURES), "col_indices.*in_features"),
    "a column far away": ("col", lambda p: changed(p.col_indices, -1, 2**31 - 1), "col_indices"),
    "a negative column": ("col", lambda p: changed(p.col_indices, 0, -1), "col_indices"),
    "columns that fall": ("col", lambda p: p.col_indices.flip(0), "rise within each row"),
    "a row that starts behind its end": ("crow", lambda p: changed(p.crow_indices, 1, 10**6), "crow_indices.*fall"),
    "an end behind the last entry": ("crow", lambda p: changed(p.crow_indices, -1, 10**6), "crow_indices.*nnz"),
    "a start in front of the first": ("crow", lambda p: changed(p.crow_indices, 0, -4), "crow_indices.*start at 0"),
    "no rows at all": ("crow", lambda p: p.crow_indices[:0], "crow"),
    "64-bit indices": ("col", lambda p: p.col_indices.long(), "col: expected.*int32"),
    "indices with gaps": ("col", lambda p: p.col_indices.repeat_interleave(2)[::2], "col: expected contiguous"),
    "another permutation": ("permutation", lambda p: p.transpose()[2].flip(0), "permutation"),
    "rows out of range": ("row", lambda p: changed(p.transpose()[1], 0, 99), "row"),
    "another ccol": ("ccol", lambda p: changed(p.transpose()[0], 1, 77), "ccol"),
    "a structure that is not so": ("structure", lambda p: ROW, "structure"),
    "a structure without a meaning": ("structure", lambda p: 17, "structure"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("how", ["in inference", "in training", "under vmap", "under torch.func.grad", "under jvp"])
@EVERY_OP
def test_hostile_indices_are_refused_by_name(op, how, fault, backend):
    """The forward refuses them, even where the backward alone would read them."""
    pattern = PATTERNS["unstructured"]
    name, make, message = FAULTS[fault]
    call = arguments(op)
    if name not in call:
        pytest.skip(f"{op} has no {name}")
    call[name] = make(pattern)
    if how == "in training":
        call = {name: requiring_a_gradient(value) for name, value in call.items()}
    first, *others = call.values()
    run = lambda first: getattr(OPS, op)(first, *others)
    with pytest.raises(ValueError, match=message):
        match how:
            case "under vmap":
                torch.vmap(run)(first[None])
            case "under torch.func.grad":
                torch.func.grad(lambda first: torch.utils._pytree.tree_leaves(run(first))[0].sum())(first)
            case "under jvp":
                torch.func.jvp(run, (first,), (first,))
            case _:
                run(first)


def requiring_a_gradient(value):
    is_number = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.detach().requires_grad_() if is_number else value


@EVERY_OP
@pytest.mark.parametrize("how", ["in training", "under vmap"])
def test_sizes_are_checked_however_it_is_called(op, how):
    """Plain PyTorch would broadcast what the kernels refuse."""
    right = arguments(op)
    for name in {"dy", "weight", "bias", "lora_B", "values"} & right.keys():
        first, *others = (right | {name: right[name][:1]}).values()
        with pytest.raises(ValueError):
            if how == "in training":
                getattr(OPS, op)(first.requires_grad_(), *others)
            else:
                torch.vmap(getattr(OPS, op), (0, *(None for _ in others)))(first[None], *others)


def test_a_backward_checks_what_its_forward_could_not_read():
    """A mode of the dispatcher is open in the forward, and no number may be looked at there."""
    call = {name: requiring_a_gradient(value) for name, value in arguments("spmm").items()}
    with FlopCounterMode(display=False):
        y = OPS.spmm(*(call | {"permutation": call["permutation"].flip(0)}).values())
    with pytest.raises(ValueError, match="permutation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["crow_indices", "col_indices", "ccol_indices", "row_indices", "permutation"])
def test_an_exported_program_with_hostile_buffers_is_refused(name):
    pattern = rk.CSRPattern.random(SHAPE, 0.4, seed=0)
    layer = rk.nn.RoSALinear(nn.Linear(IN_FEATURES, OUT_FEATURES), 2, 4, pattern=pattern)
    x = torch.randn(T, IN_FEATURES, requires_grad=True)
    exported = torch.export.export(layer, (x.detach(),)).module()
    exported(x).sum().backward()
    (buffer,) = [buffer for key, buffer in exported.named_buffers() if key.split(".")[-1] == name]
    with torch.no_grad():
        buffer.fill_(10**9)
    with pytest.raises(ValueError, match="indices|col|row|permutation"):
        exported(x).sum().backward()


def test_a_seed_and_a_share_are_checked():
    call = arguments("rosa_linear")
    for seed in (torch.zeros(2, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match="seed: expected one int64"):
            OPS.rosa_linear(*(call | {"seed": seed, "dropout_p": 0.5}).values())
    for dropout_p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout_p"):
            OPS.rosa_linear(*(call | {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": dropout_p}).values())


@pytest.mark.parametrize("structure", STRUCTURE_NUMBERS)
@pytest.mark.parametrize("kind", [*PATTERNS, "blocks of 16", "full"])
def test_a_structure_is_believed_where_it_is_true(kind, structure, backend):
    """A kernel relies on rows, columns and blocks of 16; a claim of these must be true of the indices."""
    shape = (40, 24)
    pattern = {
        "unstructured": lambda: rk.CSRPattern.random(shape, 0.2, seed=0),
        "rows": lambda: rk.CSRPattern.from_rows(torch.tensor([1, 17]), shape),
        "columns": lambda: rk.CSRPattern.from_columns(torch.tensor([0, 20]), shape),
        "blocks": lambda: rk.CSRPattern.from_blocks(torch.eye(5, 3, dtype=torch.bool), 8, shape),
        "no entries": lambda: rk.CSRPattern.random(shape, 0.0, seed=0),
        "blocks of 16": lambda: rk.CSRPattern.from_blocks(torch.eye(3, 2, dtype=torch.bool), 16, shape),
        "full": lambda: rk.CSRPattern.random(shape, 1.0, seed=0),
    }[kind]()
    true_of = {
        UNSTRUCTURED: True,
        BLOCK: True,
        ROW: kind in ("rows", "no entries", "full"),
        COLUMN: kind in ("columns", "no entries", "full"),
        BLOCK16: kind in ("blocks of 16", "no entries", "full"),
    }[structure]
    call = arguments("spmm", pattern) | {"structure": structure}
    if not true_of:
        with pytest.raises(ValueError, match="structure"):
            OPS.spmm(*call.values())
        return
    right = call["x"].double() @ pattern.to_mask().double().masked_scatter(pattern.to_mask(), call["values"].double()).T
    torch.testing.assert_close(OPS.spmm(*call.values()).double(), right, atol=1e-5, rtol=0)


class TestIndicesAreReadOnce:
    """Reading them waits for a GPU, so that tensors which passed are known, until somebody writes to them."""

    @pytest.fixture
    def readings(self, monkeypatch):
        calls, check = [], op_checks._check_indices
        monkeypatch.setattr(op_checks, "_check_indices", lambda *args: (calls.append(args), check(*args)))
        return calls

    def fresh(self):
        pattern = PATTERNS["unstructured"]
        call = arguments("spmm")
        return call | {"crow": pattern.crow_indices.clone(), "col": pattern.col_indices.clone()}

    def test_for_one_set_of_tensors(self, readings):
        call = self.fresh()
        for _ in range(3):
            OPS.spmm(*call.values())
        OPS.spmm(*(call | {"ccol": None, "row": None, "permutation": None}).values())
        assert len(readings) == 1
        OPS.spmm(*(call | {"col": call["col"].clone()}).values())
        assert len(readings) == 2

    @pytest.mark.parametrize("name", ["crow", "col"])
    def test_until_one_is_written_to(self, name, readings):
        call = self.fresh()
        OPS.spmm(*call.values())
        call[name][-1] = 10**6
        with pytest.raises(ValueError, match="_indices"):
            OPS.spmm(*call.values())

    @pytest.mark.parametrize("name", ["crow", "col"])
    def test_until_one_gets_other_memory(self, name, readings):
        call = self.fresh()
        OPS.spmm(*call.values())
        call[name].data = torch.full_like(call[name], 10**9)
        with pytest.raises(ValueError, match="_indices"):
            OPS.spmm(*call.values())
        call[name].data = call[name][:2].clone()
        with pytest.raises(ValueError):
            OPS.spmm(*call.values())

    def test_each_time_where_nothing_counts_the_writes(self, readings):
        with torch.inference_mode():
            call = self.fresh()
            OPS.spmm(*call.values())
            call["col"][-1] = 10**6
            with pytest.raises(ValueError, match="col_indices"):
                OPS.spmm(*call.values())

    def test_never_while_a_cuda_graph_is_captured(self, readings, monkeypatch):
        """A host that reads them would end the capture. Sizes and dtypes are checked all the same."""
        monkeypatch.setattr(op_checks, "_captures_a_graph", lambda device: True)
        call = self.fresh()
        OPS.spmm(*call.values())
        with pytest.raises(ValueError, match="col"):
            OPS.spmm(*(call | {"col": call["col"].long()}).values())
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert op_checks._captures_a_graph(torch.device("cuda", 0)) and not readings
        assert not op_checks._captures_a_graph(torch.device("cpu"))

    def test_and_their_memory_is_let_go(self):
        call = self.fresh()
        OPS.spmm(*call.values())
        known = len(op_checks._known)
        del call
        gc.collect()
        assert len(op_checks._known) < known


@pytest.mark.parametrize("kind", ["sparse_csr", "sparse_coo", "mkldnn"])
def test_an_x_that_is_not_dense_is_refused(kind):
    """nn.Linear of such an x is another computation, which no kernel here serves."""
    dense = torch.randn(4, IN_FEATURES)
    x = {"sparse_csr": dense.to_sparse_csr, "sparse_coo": dense.to_sparse, "mkldnn": dense.to_mkldnn}[kind]()
    layer = rk.nn.LoRALinear(nn.Linear(IN_FEATURES, OUT_FEATURES), 2, 4)
    pattern = PATTERNS["unstructured"]
    values = torch.randn(pattern.nnz)
    calls = [layer, lambda x: rk.spmm(x, values, pattern), lambda x: rk.rosa_delta(x, None, None, 1.0, values, pattern)]
    for call in calls:
        with pytest.raises(ValueError, match="x: expected a dense tensor"):
            call(x)


def test_a_weight_that_is_not_dense_is_refused():
    x, weight = torch.randn(3, IN_FEATURES), torch.randn(OUT_FEATURES, IN_FEATURES)
    A, B = torch.randn(2, IN_FEATURES), torch.randn(OUT_FEATURES, 2)
    for sparse in (weight.to_sparse_csr(), weight.to_sparse(), weight.to_mkldnn()):
        with pytest.raises(ValueError, match="weight: expected a dense tensor"):
            rk.lora_linear(x, sparse, None, A, B, 1.0)


@EVERY_OP
def test_meta_tensors_give_shapes(op):
    on_meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments(op).items()
    }
    got, right = getattr(OPS, op)(*on_meta.values()), getattr(OPS, op)(*arguments(op).values())
    for a, b in zip(*(([y] if isinstance(y, torch.Tensor) else y) for y in (got, right)), strict=True):
        assert a.is_meta and a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_it_belongs(value, backend, dtype):
    """An output is NaN or infinite only where S has an entry for the feature that is."""
    pattern = PATTERNS["unstructured"]
    x, values = torch.randn(3, IN_FEATURES).to(dtype), torch.rand(pattern.nnz).to(dtype) + 0.5
    x[1, 2] = value
    touched = pattern.to_mask()[:, 2]
    right = x.double()[:, :, None] * pattern.to_mask().double().masked_scatter(pattern.to_mask(), values.double()).T
    right = right.masked_fill(~pattern.to_mask().T, 0).sum(1)
    for y in (rk.spmm(x, values, pattern), rk.rosa_delta(x, None, None, 1.0, values, pattern)):
        assert torch.equal(y.isfinite(), right.isfinite()) and torch.equal(~y[1].isfinite(), touched)
        torch.testing.assert_close(y.double(), right, atol=0.02, rtol=0.02, equal_nan=True)
    dy = torch.randn(3, OUT_FEATURES).to(dtype)
    dy[2, 1] = value
    x = torch.zeros(3, IN_FEATURES, dtype=dtype, requires_grad=True)
    for y in (rk.spmm(x, values, pattern), rk.rosa_delta(x, None, None, 1.0, values, pattern)):
        (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(~dx[2].isfinite(), pattern.to_mask()[1]) and dx[:2].isfinite().all()


class TestFlopCounter:
    def counted(self, run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    @pytest.mark.parametrize("config", [rk.LoRAConfig(r=4), rk.RoSAConfig(r=4, density=0.25, mask="random")])
    @pytest.mark.parametrize("x_needs_gradient", [False, True])
    def test_a_layer(self, config, x_needs_gradient):
        layer = nn.Sequential(nn.Linear(16, 8))
        rk.add_adapters(layer, config)
        if isinstance(config, rk.RoSAConfig):
            rk.select_masks(layer)
        x = torch.randn(2, 5, 16, requires_grad=x_needs_gradient)
        tokens, W, A, B = 10, 16 * 8, 4 * 16, 8 * 4
        nnz = 32 if isinstance(config, rk.RoSAConfig) else 0
        forward = 2 * tokens * (W + A + B + nnz)
        backward = 2 * tokens * (B + A + B + nnz) + x_needs_gradient * 2 * tokens * (W + A + nnz)  # dH dA dB dS; dx
        assert self.counted(lambda: layer(x)) == forward
        assert self.counted(lambda: layer(x).sum().backward()) == forward + backward

    def test_lora_counts_what_its_formula_in_plain_pytorch_counts(self):
        W, A, B = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
        x = torch.randn(10, 16, requires_grad=True)
        linear = nn.functional.linear
        ours = self.counted(lambda: rk.lora_linear(x, W, None, A, B, 2.0).sum().backward())
        plain = self.counted(lambda: (linear(x, W) + 2.0 * linear(linear(x, A), B)).sum().backward())
        assert ours == plain

    def test_the_sparse_products(self):
        pattern = PATTERNS["unstructured"]
        x, dy, values = torch.randn(10, IN_FEATURES), torch.randn(10, OUT_FEATURES), torch.randn(pattern.nnz)
        assert self.counted(lambda: rk.spmm(x, values, pattern)) == 2 * pattern.nnz * 10
        assert self.counted(lambda: rk.sddmm(dy, x, pattern)) == 2 * pattern.nnz * 10
        values.requires_grad_()
        assert self.counted(lambda: rk.spmm(x, values, pattern).sum().backward()) == 4 * pattern.nnz * 10
