"""CSRPattern: its constructors, its transpose, its structure, and the index ranges where narrow types wrap."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rosa_kernels as rk
from cases import PATTERNS

SHAPES = [(20, 33), (1, 1), (1, 40), (40, 1), (65, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_mask_round_trip(name, shape):
    pattern = PATTERNS[name](shape)
    mask = pattern.to_mask()
    assert mask.shape == shape and mask.dtype == torch.bool
    assert pattern.nnz == int(mask.sum()) and pattern.density == pytest.approx(pattern.nnz / mask.numel())
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32
    again = rk.CSRPattern.from_mask(mask)
    assert again == pattern
    assert rk.CSRPattern(pattern.crow_indices.long(), pattern.col_indices.short(), shape) == pattern


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_transpose(name, shape):
    pattern = PATTERNS[name](shape)
    ccol, row, permutation = pattern.transpose()
    assert ccol.dtype == row.dtype == permutation.dtype == torch.int32
    assert rk.CSRPattern(ccol, row, (shape[1], shape[0])) == rk.CSRPattern.from_mask(pattern.to_mask().T)
    # Entry numbers carried through the permutation land at the transposed places: every entry kept, zeros too.
    rows, cols = pattern.to_mask().nonzero(as_tuple=True)
    assert torch.equal(rows[permutation], row.long())
    assert torch.equal(cols[permutation], torch.arange(shape[1]).repeat_interleave(ccol.diff()))
    assert all(a is b for a, b in zip(pattern.transpose(), (ccol, row, permutation))), "not cached"


def test_keeps_its_own_indices():
    """Else an index changed after the check would lead a kernel out of bounds."""
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    pattern = rk.CSRPattern(crow, col, (2, 2))
    crow.fill_(10**6), col.fill_(10**6)
    assert torch.equal(pattern.to_mask(), torch.eye(2, dtype=torch.bool))


def test_from_rows_and_columns():
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[[0, 3]] = True
    assert torch.equal(rk.CSRPattern.from_rows(torch.tensor([3, 0]), (5, 4)).to_mask(), mask)
    mask = torch.zeros(5, 4, dtype=torch.bool)
    mask[:, [1, 2]] = True
    assert torch.equal(rk.CSRPattern.from_columns(torch.tensor([2, 1]), (5, 4)).to_mask(), mask)
    for build in (rk.CSRPattern.from_rows, rk.CSRPattern.from_columns):
        assert build(torch.tensor([], dtype=torch.int64), (5, 4)).nnz == 0


def test_from_blocks_cuts_the_edges():
    blocks = torch.tensor([[True, False, True], [False, False, True]])
    mask = rk.CSRPattern.from_blocks(blocks, 4, (7, 10)).to_mask()
    expected = torch.zeros(7, 10, dtype=torch.bool)
    expected[:4, :4] = expected[:, 8:] = True
    assert torch.equal(mask, expected)


def test_random_is_reproducible_and_has_the_density():
    shape = (50, 60)
    first, again, other = (rk.CSRPattern.random(shape, 0.03, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert first.nnz == round(0.03 * 50 * 60)
    assert rk.CSRPattern.random(shape, 0.0, 0).nnz == 0 and rk.CSRPattern.random(shape, 1.0, 0).nnz == 3000
    before = torch.get_rng_state()
    rk.CSRPattern.random(shape, 0.5, 3)
    assert torch.equal(torch.get_rng_state(), before), "took numbers from the global generator"


@pytest.mark.parametrize(
    "name,structure",
    [("rows", "row"), ("full", "row"), ("columns", "column"), ("blocks", "block"), ("random", "unstructured"),
     ("almost_full", "unstructured"), ("last_entry", "unstructured"), ("none", "unstructured")],
)  # fmt: skip
def test_structure_is_detected(name, structure):
    assert PATTERNS[name]((40, 50)).structure_name == structure


def test_to_keeps_everything():
    pattern = PATTERNS["rows"]((6, 5))
    assert pattern.to("cpu") is pattern
    pattern.transpose()
    moved = pattern.to("meta")
    assert moved.device.type == "meta" and moved.shape == pattern.shape and moved.structure == pattern.structure
    assert all(t.device.type == "meta" for t in moved.transpose())


@pytest.mark.parametrize("shape", [(4, 40_000), (40_000, 4)], ids=str)
def test_indices_beyond_16_bits(backend, shape):
    """int16 indices would wrap at 32,768."""
    mask = torch.zeros(shape, dtype=torch.bool)
    where = torch.tensor([0, 32_767, 32_768, 32_769, 39_999])
    (mask[1] if shape[1] > shape[0] else mask[:, 1])[where] = True
    pattern = rk.CSRPattern.from_mask(mask)
    values = torch.arange(1.0, 6.0)
    S = torch.zeros(shape)
    S[mask] = values
    assert torch.equal(rk.csr_add(torch.zeros(shape), values, pattern), S)
    for tokens in (1, 70):
        x, dy = torch.randn(tokens, shape[1], requires_grad=True), torch.randn(tokens, shape[0])
        y = rk.spmm(x, values, pattern)
        torch.testing.assert_close(y, x @ S.T)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ S)
        torch.testing.assert_close(rk.sddmm(dy, x.detach(), pattern), (dy.T @ x.detach())[mask])


@pytest.mark.exhaustive
def test_entries_beyond_the_integers_of_fp32(backend):
    """A permutation counted in fp32 would repeat itself above 2**24 entries."""
    shape = (2, 2**23 + 3)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, 5] = False  # one hole, so that no row structure short-cuts the entries
    pattern = rk.CSRPattern.from_mask(mask)
    assert pattern.nnz > 2**24 and pattern.structure_name == "unstructured"
    _, row, permutation = pattern.transpose()
    entries = permutation.sort().values
    assert torch.equal(entries, torch.arange(pattern.nnz, dtype=torch.int32))
    assert permutation[-2:].tolist() == [2**23 + 1, pattern.nnz - 1] and row[-2:].tolist() == [0, 1]
    values = torch.zeros(pattern.nnz)
    values[-3:] = torch.tensor([1.0, 2.0, 3.0])
    x = torch.ones(1, shape[1], requires_grad=True)
    y = rk.spmm(x, values, pattern)
    assert y.tolist() == [[0.0, 6.0]]
    (dx,) = torch.autograd.grad(y, x, torch.ones(1, 2))
    assert dx[0, -4:].tolist() == [0.0, 1.0, 2.0, 3.0] and int(dx.count_nonzero()) == 3


class TestItsTransposeIsKept:
    """A pattern may meet a trace or a transform first; what it keeps must serve every later call."""

    SHAPE = (5, 7)

    def spmm_in(self, how, pattern):
        values = torch.randn(pattern.nnz, requires_grad=True)
        call = lambda x: rk.spmm(x, values, pattern).square().sum()
        x = torch.randn(3, 7, requires_grad=True)
        match how:
            case "export":
                module = torch.nn.Module()
                module.forward = lambda x: rk.spmm(x, values, pattern)
                torch.export.export(module, (x.detach(),))
            case "fake tensors":
                with FakeTensorMode(allow_non_fake_inputs=True):
                    call(torch.empty(3, 7, requires_grad=True))
            case "inference":
                with torch.inference_mode(), torch.profiler.profile():
                    call(x)
            case "vmap of grad":
                torch.vmap(torch.func.grad(lambda x: call(x[None])))(x.detach())
            case _:
                transform = {"grad": torch.func.grad, "hessian": torch.func.hessian, "jvp": None}[how]
                transform(call)(x.detach()) if transform else torch.func.jvp(call, (x.detach(),), (x.detach(),))

    @pytest.mark.parametrize("how", ["export", "fake tensors", "inference", "vmap of grad", "grad", "hessian", "jvp"])
    def test_as_plain_tensors_alone(self, how):
        pattern = rk.CSRPattern.random(self.SHAPE, 0.4, seed=0)
        self.spmm_in(how, pattern)
        for again in ("grad", "vmap of grad", "jvp"):
            self.spmm_in(again, pattern)
        copied = copy.deepcopy(pattern)
        values = torch.randn(pattern.nnz, requires_grad=True)
        x = torch.randn(3, 7, requires_grad=True)
        for p in (pattern, copied):
            dx, dvalues = torch.autograd.grad(rk.spmm(x, values, p).sum(), (x, values))
            assert type(dx) is type(dvalues) is torch.Tensor
            assert all(type(indices) is torch.Tensor for indices in p.transpose())
            assert p.transpose() is p.transpose()
