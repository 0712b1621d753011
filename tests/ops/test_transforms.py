"""Forward mode and the transforms of torch.func give what they give of the plain formula, under autocast too."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rosa_kernels as rk
from derivative_checks import (
    BOTH_CONFIGS,
    EVERY_OP,
    EVERY_PATTERN,
    adapted_net,
    assert_close,
    called_directly,
    leaves,
    trained,
)
from plain_formulas import OPS, PATTERNS, SCALING, SHAPE, plain_dropout, tensors_for


class TestForwardMode:
    @EVERY_PATTERN
    @EVERY_OP
    @pytest.mark.parametrize("needs_gradient", [False, True])
    def test_dual_numbers(self, name, pattern, needs_gradient, backend, dtype):
        """The tangent is that of the plain formula, with each argument's tangent alone and with all."""
        op = OPS[name]
        tensors = tensors_for(op, pattern, dtype)
        tangents = tensors_for(op, pattern, dtype, seed=1)
        for chosen in (*({i} for i in range(len(tensors))), set(range(len(tensors)))):
            results = []
            for call, cast in ((op.call, lambda t: t), (op.plain, lambda t: t.double())):
                with fwAD.dual_level():
                    duals = [
                        fwAD.make_dual(cast(t).requires_grad_(needs_gradient), cast(d)) if i in chosen else cast(t)
                        for i, (t, d) in enumerate(zip(tensors, tangents))
                    ]
                    results.append(list(fwAD.unpack_dual(call(pattern, *duals))))
            assert_close(*results, dtype)

    @EVERY_OP
    def test_by_finite_differences(self, name):
        op, pattern = OPS[name], PATTERNS["rows"]
        inputs = leaves(tensors_for(op, pattern, torch.float64))
        assert torch.autograd.gradcheck(
            lambda *tensors: op.call(pattern, *tensors), inputs, check_forward_ad=True, check_batched_grad=True
        )

    def test_forward_over_reverse(self, backend):
        """A Hessian times a vector: dual numbers through a backward."""
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        tensors, tangents = (tensors_for(op, pattern, torch.float32, seed=seed) for seed in (0, 1))
        results = []
        for call, cast in ((op.call, lambda t: t), (op.plain, lambda t: t.double())):
            with fwAD.dual_level():
                duals = [fwAD.make_dual(cast(t).requires_grad_(), cast(d)) for t, d in zip(tensors, tangents)]
                gradients = torch.autograd.grad(call(pattern, *duals).pow(3).sum(), duals)
                results.append([fwAD.unpack_dual(gradient).tangent for gradient in gradients])
        assert_close(*results, torch.float32)

    def test_the_functional_interface(self, backend):
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        x, *others = tensors_for(op, pattern, torch.float32)
        for vectorize in (False, True):
            jacobian = torch.autograd.functional.jacobian(
                lambda x: op.call(pattern, x, *others), x, strategy="forward-mode" if vectorize else "reverse-mode",
                vectorize=vectorize,
            )  # fmt: skip
            assert_close([jacobian], [jacobian_of_plain(op, pattern, x, *others)], torch.float32)

    def test_with_dropout(self, backend):
        """The tangent passes the mask that the number passes."""
        x, t = torch.randn(50, 7), torch.randn(50, 7)
        A, B = torch.randn(2, 7), torch.randn(5, 2)
        torch.manual_seed(4)
        seed = rk.dropout.new_seed(x.device)
        with fwAD.dual_level():
            torch.manual_seed(4)
            y = rk.rosa_delta(fwAD.make_dual(x, t), A, B, SCALING, None, None, dropout_p=0.4)
            got = fwAD.unpack_dual(y)
        right = [SCALING * plain_dropout(z, 0.4, seed) @ A.T @ B.T for z in (x, t)]
        assert_close([got.primal, got.tangent], right, torch.float32)


def jacobian_of_plain(op, pattern, x, *others):
    wide = [t.double() for t in others]
    return torch.autograd.functional.jacobian(lambda x: op.plain(pattern, x, *wide), x.double())


class TestTransforms:
    """torch.func, as PEFT's LoRA serves it."""

    @pytest.fixture(params=OPS)
    def op(self, request):
        return OPS[request.param]

    @pytest.fixture(params=["unstructured", "blocks"])
    def pattern(self, request):
        return PATTERNS[request.param]

    def check(self, op, pattern, transform, dtype=torch.float32):
        """transform(f)(*tensors) of the op and of the plain formula."""
        tensors = tensors_for(op, pattern, dtype)
        wide = [t.double() for t in tensors]
        results = []
        for call, t in ((op.call, tensors), (op.plain, wide)):
            result = transform(partial(call, pattern))(*t)
            results.append(torch.utils._pytree.tree_leaves(result))
        assert_close(*results, dtype)

    def test_grad(self, op, pattern, backend):
        self.check(op, pattern, lambda f: grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(op.names)))))

    def test_vjp(self, op, pattern, backend):
        def transform(f):
            def run(*t):
                y, pullback = vjp(f, *t)
                return y, pullback(torch.ones_like(y))

            return run

        self.check(op, pattern, transform)

    def test_jvp(self, op, pattern, backend):
        self.check(op, pattern, lambda f: lambda *t: jvp(f, t, tuple(u + 1 for u in t)))

    def test_jacobians(self, op, pattern, backend):
        every = tuple(range(len(op.names)))
        self.check(op, pattern, partial(jacrev, argnums=every))
        self.check(op, pattern, partial(jacfwd, argnums=every))

    def test_hessian(self, op, pattern, backend):
        self.check(op, pattern, lambda f: hessian(lambda *t: f(*t).pow(3).sum(), argnums=(0, len(op.names) - 1)))

    def test_vmap_over_every_tensor(self, op, pattern, backend):
        """Over each tensor alone, over all, and with the gradient of each example."""
        several = [torch.stack([t, 2 * t, -t]) for t in tensors_for(op, pattern, torch.float32)]
        for batched in (*({i} for i in range(len(several))), set(range(len(several)))):
            tensors = [t if i in batched else t[0] for i, t in enumerate(several)]
            in_dims = tuple(0 if i in batched else None for i in range(len(several)))
            loss = lambda *t: op.call(pattern, *t).square().sum()
            for f in (lambda *t: op.call(pattern, *t), grad(loss, argnums=tuple(range(len(several))))):
                got = torch.utils._pytree.tree_leaves(vmap(f, in_dims)(*tensors))
                one_by_one = [f(*(t[n] if i in batched else t for i, t in enumerate(tensors))) for n in range(3)]
                right = [torch.stack(results) for results in zip(*map(torch.utils._pytree.tree_leaves, one_by_one))]
                assert_close(got, right, torch.float32)

    def test_vmap_of_what_requires_a_gradient(self, backend):
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        x, *others = leaves(tensors_for(op, pattern, torch.float32))
        y = vmap(lambda x: op.call(pattern, x, *others))(x)
        assert_close([y], [op.call(pattern, x, *others)], torch.float32)
        got = torch.autograd.grad(y.square().sum(), (x, *others))
        assert_close(got, torch.autograd.grad(op.call(pattern, x, *others).square().sum(), (x, *others)), torch.float32)

    def test_linearize(self, op, pattern, backend):
        """It traces the tangents, and no number may be looked at in a trace."""
        tensors = tensors_for(op, pattern, torch.float32)
        call = partial(op.call, pattern)
        y, tangent_of = torch.func.linearize(call, *tensors)
        right = jvp(call, tensors, tuple(t + 1 for t in tensors))
        assert_close([y, tangent_of(*(t + 1 for t in tensors))], right, torch.float32)

    def test_many_upstream_gradients_at_once(self, backend):
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        inputs = leaves(tensors_for(op, pattern, torch.float32))
        y = op.call(pattern, *inputs)
        upstream = torch.randn(4, *y.shape)
        got = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)
        right = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in upstream]
        assert_close(got, [torch.stack(one) for one in zip(*right)], torch.float32)

    def test_dropout_under_vmap_asks_for_its_randomness(self):
        """As PyTorch's own dropout: an error, one mask for all, or one for each."""
        x, A, B = torch.randn(4, 30, 7), torch.randn(2, 7), torch.randn(5, 2)
        call = lambda x: rk.rosa_delta(x, A, B, 1.0, None, None, dropout_p=0.5)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(call)(x)
        x = x[:1].expand(4, 30, 7)
        same, different = (vmap(call, randomness=randomness)(x) for randomness in ("same", "different"))
        assert (same == same[0]).all() and not (different == different[0]).all()

    @BOTH_CONFIGS
    def test_functional_call_of_a_model(self, config, backend):
        torch.manual_seed(0)
        model = adapted_net(nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)), config)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        x = torch.randn(5, 7)
        loss = lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()
        got = grad(loss)(trainable, x)
        loss(trainable, x).backward()
        assert_close(got.values(), [p.grad for p in trainable.values()], torch.float32)
        per_example = vmap(grad(loss), in_dims=(None, 0))(trainable, x)
        assert_close([g.sum(0) for g in per_example.values()], [p.grad for p in trainable.values()], torch.float32)

    @pytest.mark.parametrize("padding_idx", [None, 1])
    def test_an_embedding(self, padding_idx):
        torch.manual_seed(0)
        layer = rk.nn.RoSAEmbedding(nn.Embedding(*SHAPE, padding_idx=padding_idx), 2, 4, density=0.4)
        layer.place_pattern(rk.CSRPattern.from_rows(torch.tensor([0, 3]), SHAPE))
        with torch.no_grad():
            for parameter in trained(layer):
                parameter.normal_()
        trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        ids = torch.randint(5, (4, 6))
        loss = lambda parameters, ids: functional_call(layer, parameters, (ids,)).square().sum()
        per_example = vmap(grad(loss), in_dims=(None, 0))(trainable, ids)
        loss(trainable, ids).backward()
        assert_close([g.sum(0) for g in per_example.values()], [p.grad for p in trainable.values()], torch.float32)
        if padding_idx is not None:  # forward mode of F.embedding knows no padding_idx
            return
        tangents = {name: torch.randn_like(p) for name, p in trainable.items()}
        _, got = jvp(lambda parameters: loss(parameters, ids), (trainable,), (tangents,))
        right = sum((p.grad * tangents[name]).sum() for name, p in trainable.items())
        assert_close([got], [right], torch.float32)


class TestUnderAutocast:
    """Autocast casts x and weight of a linear call, and nothing that an op computes: not its derivatives either."""

    @pytest.mark.parametrize("name", ["spmm", "sddmm", "csr_add", "rosa_delta"])
    @pytest.mark.parametrize("how", [vmap, jacfwd], ids=["vmap", "jacfwd"])
    def test_transforms(self, name, how):
        op, pattern = OPS[name], PATTERNS["unstructured"]
        first, *others = tensors_for(op, pattern, torch.bfloat16 if name == "rosa_delta" else torch.float32)
        first = first[None] if how is vmap else first
        run = how(lambda first: op.call(pattern, first, *others))
        with torch.autocast("cpu", torch.bfloat16):
            got = run(first)
        assert torch.equal(got, run(first))

    @pytest.mark.parametrize("name", ["spmm", "sddmm", "csr_add"])
    def test_an_op_called_directly(self, name):
        pattern = PATTERNS["unstructured"]
        tensors = tensors_for(OPS[name], pattern, torch.float32)

        def run():
            with fwAD.dual_level():
                y = called_directly(name, pattern, *map(fwAD.make_dual, tensors, tensors))
                return list(fwAD.unpack_dual(y))

        with torch.autocast("cpu", torch.bfloat16):
            got = run()
        assert all(map(torch.equal, got, run()))

    def test_a_graph_of_the_backward(self):
        op, pattern = OPS["rosa_delta"], PATTERNS["unstructured"]
        inputs = leaves(tensors_for(op, pattern, torch.bfloat16))
        dy = torch.full((3, SHAPE[0]), 0.1, dtype=torch.bfloat16, requires_grad=True)
        y = op.call(pattern, *inputs)
        right = torch.autograd.grad(y, inputs, dy, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y, inputs, dy, create_graph=True)
        assert all(map(torch.equal, got, right))

    def test_many_upstream_gradients_at_once(self):
        op, pattern = OPS["rosa_delta"], PATTERNS["unstructured"]
        inputs = leaves(tensors_for(op, pattern, torch.bfloat16))
        y = op.call(pattern, *inputs)
        upstream = torch.randn(4, *y.shape, dtype=y.dtype)
        right = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True)
        assert all(map(torch.equal, got, right))
