"""Autograd: gradcheck, who gets a gradient, what is saved, in-place checks, checkpointing, autocast, NaN and Inf."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from cases import LinearCase, LinearInputs, make_inputs

NAMES = LinearInputs.DIFFERENTIABLE
SIZES = pytest.mark.parametrize("tokens", [6, 66], ids=["unmerged", "merged"])


def rosa(t, pattern, scaling=0.75, dropout_p=0.0):
    """rosa_linear on a dict of tensors; the same dropout mask at every call."""
    torch.manual_seed(7)
    return rk.rosa_linear(
        t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"], scaling, t["values"], pattern, dropout_p=dropout_p
    )


class TestGradcheck:
    """Finite differences in float64, on the reference."""

    @pytest.fixture(autouse=True)
    def _reference(self):
        with rk.use_backend("reference"):
            yield

    @pytest.mark.parametrize("pattern", ["none", "half", "empty_rows", "rows", "columns"])
    @pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
    def test_rosa_linear(self, leading, pattern):
        inputs = make_inputs(LinearCase(leading, 5, 7, 2, pattern), torch.float64)
        leaves = inputs.leaves()
        call = lambda *tensors: rosa(dict(zip(NAMES, tensors)), inputs.pattern)
        assert torch.autograd.gradcheck(call, tuple(leaves.values()))

    @pytest.mark.parametrize("dropout_p", [0.4, 1.0])
    def test_rosa_linear_with_dropout(self, dropout_p):
        inputs = make_inputs(LinearCase((3,), 5, 7, 2, "half"), torch.float64)
        leaves = inputs.leaves()
        call = lambda *tensors: rosa(dict(zip(NAMES, tensors)), inputs.pattern, dropout_p=dropout_p)
        assert torch.autograd.gradcheck(call, tuple(leaves.values()))

    @pytest.mark.parametrize("leaves_out", ["lora", "sparse", "neither"])
    def test_rosa_delta(self, leaves_out):
        inputs = make_inputs(LinearCase((3,), 5, 7, 2, "half"), torch.float64)
        t = inputs.leaves(needing=("x", "lora_A", "lora_B", "values"))
        if leaves_out == "lora":
            call = lambda x, v: rk.rosa_delta(x, None, None, 1.0, v, inputs.pattern)
            assert torch.autograd.gradcheck(call, (t["x"], t["values"]))
        elif leaves_out == "sparse":
            call = lambda x, A, B: rk.rosa_delta(x, A, B, 0.5, None, None)
            assert torch.autograd.gradcheck(call, (t["x"], t["lora_A"], t["lora_B"]))
        else:
            call = lambda x, A, B, v: rk.rosa_delta(x, A, B, 0.5, v, inputs.pattern)
            assert torch.autograd.gradcheck(call, (t["x"], t["lora_A"], t["lora_B"], t["values"]))

    def test_sparse_ops(self):
        inputs = make_inputs(LinearCase((2, 3), 5, 7, 2, "half"), torch.float64)
        t, dy, p = inputs.leaves(), inputs.dy.requires_grad_(), inputs.pattern
        assert torch.autograd.gradcheck(lambda x, v: rk.spmm(x, v, p), (t["x"], t["values"]))
        assert torch.autograd.gradcheck(lambda dy, x: rk.sddmm(dy, x, p), (dy, t["x"]))
        assert torch.autograd.gradcheck(lambda W, v: rk.csr_add(W, v, p), (t["weight"], t["values"]))


@SIZES
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["random", "rows"])
def test_every_combination_of_needed_gradients(backend, dtype, device, tokens, pattern, dropout_p):
    """Those asked for are the same, up to the order of sums, whatever else is asked for; the others stay None."""
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4, pattern), dtype, device)
    leaves = inputs.leaves()
    rosa(leaves, inputs.pattern, dropout_p=dropout_p).backward(inputs.dy)
    complete = {name: leaf.grad for name, leaf in leaves.items()}
    tolerance = 8 * torch.finfo(dtype).eps
    for count in range(1, len(NAMES)):
        for needing in itertools.combinations(NAMES, count):
            leaves = inputs.leaves(needing)
            rosa(leaves, inputs.pattern, dropout_p=dropout_p).backward(inputs.dy)
            for name, leaf in leaves.items():
                if name not in needing:
                    assert leaf.grad is None, f"{name} got a gradient when only {needing} need one"
                else:
                    scale = float(complete[name].abs().max())
                    torch.testing.assert_close(leaf.grad, complete[name], rtol=0, atol=tolerance * scale)


def test_nothing_needed_makes_no_graph(backend, device):
    inputs = make_inputs(LinearCase(), torch.float32, device)
    t = inputs.tensors()
    assert rosa(t, inputs.pattern).grad_fn is None
    with torch.no_grad():
        assert rosa(inputs.leaves(), inputs.pattern).grad_fn is None
    with torch.inference_mode():
        assert rosa(t, inputs.pattern).is_inference()


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_spmm_rounds_a_gradient_to_its_own_dtype_alone(backend, x_dtype):
    """fp32 values beside a 16-bit x: their gradient has fp32's digits."""
    pattern = rk.CSRPattern.random((20, 30), 0.2, seed=0)
    with rk.use_backend(backend if x_dtype == torch.bfloat16 else "auto"):
        x, dy = torch.randn(50, 30).to(x_dtype), torch.randn(50, 20).to(x_dtype)
        values = torch.randn(pattern.nnz, requires_grad=True)
        (got,) = torch.autograd.grad(rk.spmm(x, values, pattern), values, dy)
    right = (dy.double().T @ x.double())[pattern.row_of_entry(), pattern.col_indices.long()]
    torch.testing.assert_close(got.double(), right, atol=2e-5, rtol=2e-6)


@SIZES
def test_an_upstream_gradient_of_stride_zero(backend, dtype, device, tokens):
    """y.sum().backward() hands over one element, expanded."""
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4), dtype, device)
    leaves, copies = inputs.leaves(), inputs.leaves()
    rosa(leaves, inputs.pattern).sum().backward()
    y = rosa(copies, inputs.pattern)
    y.backward(torch.ones_like(y))
    for name in NAMES:
        torch.testing.assert_close(leaves[name].grad, copies[name].grad)


@SIZES
@pytest.mark.parametrize("name", ["x", "lora_A", "lora_B", "values", "weight"])
def test_changing_a_saved_tensor_in_place_is_an_error(backend, device, tokens, name):
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4), torch.float32, device)
    leaves = inputs.leaves()
    y = rosa(leaves, inputs.pattern)
    with torch.no_grad():
        leaves[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(inputs.dy)


@SIZES
def test_backward_reads_nothing_but_what_autograd_saved(backend, device, tokens):
    """Poison every input behind autograd's back; what went through saved_tensors_hooks has copies to go on with."""
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4), torch.float32, device)
    whole = inputs.leaves()
    rosa(whole, inputs.pattern, dropout_p=0.3).backward(inputs.dy)
    leaves = inputs.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = rosa(leaves, inputs.pattern, dropout_p=0.3)
    for leaf in leaves.values():
        leaf.data.fill_(float("nan"))
    y.backward(inputs.dy)
    for name in NAMES:
        assert torch.equal(leaves[name].grad, whole[name].grad), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@SIZES
def test_saves_little_beside_its_inputs(backend, dtype, device, tokens, dropout_p):
    """No copy of x in another layout or dtype, no materialised mask: at most H in fp32, whose columns
    a GPU pads to 16, and a seed."""
    inputs = make_inputs(LinearCase((tokens,), 330, 200, 4, lora_dtype=torch.float32), dtype, device)
    leaves = inputs.leaves()
    pattern = inputs.pattern
    known = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *pattern.transpose())}
    known |= {t.untyped_storage().data_ptr() for t in (pattern.crow_indices, pattern.col_indices)}
    new_bytes = 0

    def pack(tensor):
        nonlocal new_bytes
        if tensor.untyped_storage().data_ptr() not in known:
            new_bytes += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rosa(leaves, pattern, dropout_p=dropout_p)
    assert new_bytes <= tokens * 16 * 4 + 8


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_tokens_and_the_gradient_of_a_sum(backend, device, leading):
    """As an expert without tokens gets: dy is one number, expanded to nothing."""
    inputs = make_inputs(LinearCase(leading, 64, 48, 4, lora_dtype=torch.float32), torch.bfloat16, device)
    leaves = inputs.leaves()
    rosa(leaves, inputs.pattern, dropout_p=0.3).sum().backward()
    for name in ("lora_A", "lora_B", "values"):
        assert leaves[name].grad.shape == leaves[name].shape and not leaves[name].grad.any(), name
    assert leaves["x"].grad.shape == leaves["x"].shape


@SIZES
def test_one_mask_where_a_checkpoint_draws_another_seed(backend, device, tokens):
    """preserve_rng_state=False: the recomputed forward drops other elements, and all gradients are of that mask."""
    inputs = make_inputs(LinearCase((tokens,), 64, 48, 4, None), torch.float32, device)
    leaves = inputs.leaves()
    x, W, A, B = (leaves[name] for name in ("x", "weight", "lora_A", "lora_B"))

    def layer(x):
        return rk.lora_linear(x, W, None, A, B, 2.0, dropout_p=0.5)

    y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    dy = torch.randn_like(y)
    dx, dA, dB = (gradient.double() for gradient in torch.autograd.grad(y, (x, A, B), dy))
    dH = 2.0 * dy.double() @ B.double()
    dropped = dx - dy.double() @ W.double()  # 2 (dH A) where kept, 0 elsewhere
    kept = (dropped / (dH @ A.double())).round()
    x_hat = x.double() * kept
    torch.testing.assert_close(dA, dH.T @ x_hat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dB, 2.0 * dy.double().T @ (x_hat @ A.double().T), rtol=1e-3, atol=1e-3)


@SIZES
@pytest.mark.parametrize(
    "use_reentrant,x_needs_grad",  # PyTorch's re-entrant kind gives no gradients unless its input requires one
    [(True, True), (False, True), (False, False)],
    ids=["reentrant", "non-reentrant", "non-reentrant, x without gradient"],
)
def test_checkpointing(backend, device, tokens, use_reentrant, x_needs_grad):
    """Adapters train under both kinds, and dropout's mask is the same when the forward runs again."""
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4), torch.float32, device)
    needing = NAMES if x_needs_grad else NAMES[1:]
    plain, leaves = inputs.leaves(needing), inputs.leaves(needing)

    def layer(x, t):
        return rk.rosa_linear(
            x, t["weight"], t["bias"], t["lora_A"], t["lora_B"], 0.75, t["values"], inputs.pattern, dropout_p=0.3
        )

    torch.manual_seed(3)
    layer(plain["x"], plain).backward(inputs.dy)
    torch.manual_seed(3)
    y = checkpoint(lambda x: layer(x, leaves), leaves["x"], use_reentrant=use_reentrant)
    torch.randint(9, (1,), device=device)  # moves the generator between the two forwards
    y.backward(inputs.dy)
    for name in needing:
        assert torch.equal(leaves[name].grad, plain[name].grad), name


@SIZES
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_linear_does(backend, device, tokens, adapters):
    """x, weight and bias go to bf16, adapters stay, gradients come back in each tensor's own dtype."""
    inputs = make_inputs(
        LinearCase((tokens,), 33, 20, 4, lora_dtype=adapters, values_dtype=adapters), torch.float32, device
    )
    leaves, casts = inputs.leaves(), inputs.leaves()
    with torch.autocast(device.type, torch.bfloat16):
        y = rosa(leaves, inputs.pattern, dropout_p=0.3)
        assert y.dtype == F.linear(leaves["x"], leaves["weight"]).dtype == torch.bfloat16
    cast = {name: t.to(torch.bfloat16) if name in ("x", "weight", "bias") else t for name, t in casts.items()}
    expected = rosa(cast, inputs.pattern, dropout_p=0.3)
    assert torch.equal(y, expected)
    dy = inputs.dy.to(torch.bfloat16)
    y.backward(dy)
    expected.backward(dy)
    for name in NAMES:
        assert leaves[name].grad.dtype == leaves[name].dtype
        assert torch.equal(leaves[name].grad, casts[name].grad), name


def test_autocast_leaves_float64_alone():
    inputs = make_inputs(LinearCase(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = rosa(inputs.tensors(), inputs.pattern)
    assert torch.equal(y, rosa(inputs.tensors(), inputs.pattern)) and y.dtype == torch.float64


@SIZES
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", [*NAMES, "dy"])
def test_nan_and_inf_reach_every_result_they_should(backend, dtype, device, tokens, poison, where):
    """A result is not finite just where float64 arithmetic on the entries of S alone is not finite."""
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4, "half"), dtype, device)
    target = getattr(inputs, where)
    target[(target.shape[0] // 2,) + (0,) * (target.dim() - 1)] = poison
    leaves = inputs.leaves()
    y = rosa(leaves, inputs.pattern)
    y.backward(inputs.dy)
    wide = {name: t.detach().cpu().double().requires_grad_() for name, t in inputs.tensors().items()}
    rows, cols = inputs.pattern.to("cpu").to_mask().nonzero(as_tuple=True)
    S = torch.zeros(inputs.pattern.shape, dtype=torch.float64).index_put((rows, cols), wide["values"])
    exact = F.linear(wide["x"], wide["weight"] + S, wide["bias"])
    exact = exact + 0.75 * (wide["x"] @ wide["lora_A"].T) @ wide["lora_B"].T
    exact.backward(inputs.dy.cpu().double())
    assert torch.equal(y.isfinite().cpu(), exact.isfinite()), "y"
    for name in NAMES:
        assert torch.equal(leaves[name].grad.isfinite().cpu(), wide[name].grad.isfinite()), name


@pytest.mark.parametrize("tokens", [3, 70])
def test_nan_in_the_sparse_ops(backend, dtype, device, tokens):
    inputs = make_inputs(LinearCase((tokens,), 33, 20, 4, "half"), dtype, device)
    mask = inputs.pattern.to("cpu").to_mask()
    dy = inputs.dy.clone()
    dy[1, 4] = float("nan")
    assert torch.equal(rk.sddmm(dy, inputs.x, inputs.pattern).isnan().cpu(), mask.nonzero()[:, 0] == 4)
    values = inputs.values.clone()
    values[9] = float("nan")
    row, col = mask.nonzero()[9].tolist()
    expected = torch.zeros(20, 33, dtype=torch.bool)
    expected[row, col] = True
    assert torch.equal(rk.csr_add(inputs.weight, values, inputs.pattern).isnan().cpu(), expected)
    y = rk.spmm(inputs.x, values, inputs.pattern)
    assert bool(y[:, row].isnan().all()) and int(y.isnan().sum()) == tokens
