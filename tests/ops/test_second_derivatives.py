"""Second derivatives are those of the plain formula: gradient penalties, several layers, checkpointing, dropout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from derivative_checks import (
    BOTH_CONFIGS,
    EVERY_OP,
    EVERY_PATTERN,
    adapted_net,
    assert_close,
    called_directly,
    factors_of,
    leaves,
)
from plain_formulas import OPS, PATTERNS, SCALING, dense, plain_dropout, tensors_for


def penalty_gradients(call, tensors, dy_needs_gradient):
    """Gradients of |d(sum of y)/dx|² or |d(sum of y²)/dx|², as a gradient penalty has them, for every tensor."""
    y = call(*tensors)
    (dx,) = torch.autograd.grad((y.square() if dy_needs_gradient else y).sum(), tensors[0], create_graph=True)
    if not dx.requires_grad:  # the op is linear in all of its arguments together
        return [None] * len(tensors)
    return torch.autograd.grad(dx.square().sum(), tensors, allow_unused=True)


def filled(gradients, tensors):
    """A gradient of zero, where autograd has None: both mean that nothing depends on the tensor."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, tensors, strict=True)]


class TestSecondDerivatives:
    @EVERY_PATTERN
    @EVERY_OP
    def test_by_finite_differences(self, name, pattern):
        op = OPS[name]
        inputs = leaves(tensors_for(op, pattern, torch.float64))
        assert torch.autograd.gradgradcheck(lambda *tensors: op.call(pattern, *tensors), inputs)

    @EVERY_PATTERN
    @EVERY_OP
    @pytest.mark.parametrize("dy_needs_gradient", [False, True])
    def test_a_gradient_penalty(self, name, pattern, dy_needs_gradient, backend, dtype):
        op = OPS[name]
        tensors = tensors_for(op, pattern, dtype, tokens=(4, 3))
        inputs, wide = leaves(tensors), leaves([t.double() for t in tensors])
        got = penalty_gradients(lambda *t: op.call(pattern, *t), inputs, dy_needs_gradient)
        right = penalty_gradients(lambda *t: op.plain(pattern, *t), wide, dy_needs_gradient)
        assert_close(filled(got, inputs), filled(right, wide), dtype)

    def test_of_some_tensors_alone(self, backend):
        """What needs no gradient gets none, and the others get theirs."""
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        tensors = tensors_for(op, pattern, torch.float32)
        for needing in ({0, 3}, {0, 4, 5}, {0, 1}):
            inputs, wide = leaves(tensors, needing), leaves([t.double() for t in tensors], needing)
            for call, t in ((op.call, inputs), (op.plain, wide)):
                (dx,) = torch.autograd.grad(call(pattern, *t).square().sum(), t[0], create_graph=True)
                dx.square().sum().backward()
            assert [t.grad is None for t in inputs] == [i not in needing for i in range(len(inputs))]
            assert_close([t.grad for t in inputs], [t.grad for t in wide], torch.float32)

    @pytest.mark.parametrize("dropout_p", [0.3, 1.0])
    def test_with_dropout_at_a_fixed_seed(self, dropout_p, backend):
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        tensors = tensors_for(op, pattern, torch.float32, tokens=(6,))

        def call(x, W, b, A, B, v):
            torch.manual_seed(3)
            return rk.rosa_linear(x, W, b, A, B, SCALING, v, pattern, dropout_p=dropout_p)

        def plain(x, W, b, A, B, v):
            torch.manual_seed(3)
            dropped = plain_dropout(x, dropout_p, rk.dropout.new_seed(x.device))
            return F.linear(x, W + dense(v, pattern), b) + SCALING * F.linear(F.linear(dropped, A), B)

        inputs, wide = leaves(tensors), leaves([t.double() for t in tensors])
        got, right = (penalty_gradients(f, t, True) for f, t in ((call, inputs), (plain, wide)))
        assert_close(filled(got, inputs), filled(right, wide), torch.float32)

    @pytest.mark.parametrize("through_checkpoint", [False, True])
    @BOTH_CONFIGS
    def test_through_several_layers(self, config, through_checkpoint, backend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        plain = copy.deepcopy(model).double()
        adapted_net(model, config)
        parameters = [parameter for layer in model[::2] for parameter in factors_of(layer)]
        x = torch.randn(3, 7, requires_grad=True)
        run = (lambda x: checkpoint(model, x, use_reentrant=False)) if through_checkpoint else model
        (dx,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        got = torch.autograd.grad(dx.square().sum(), parameters)

        factors = [[f.detach().double().requires_grad_() for f in factors_of(layer)] for layer in model[::2]]
        wide = x.detach().double().requires_grad_()
        h = wide
        for i, (layer, adapted) in enumerate(zip(plain[::2], model[::2])):
            h = torch.tanh(h) if i else h
            A, B, *values = factors[i]
            W = layer.weight + adapted.scaling * B @ A
            h = F.linear(h, W + dense(values[0], adapted.sparse_pattern()) if values else W, layer.bias)
        (dx,) = torch.autograd.grad(h.sum(), wide, create_graph=True)
        right = torch.autograd.grad(dx.square().sum(), [f for layer in factors for f in layer])
        assert_close(got, right, torch.float32)

    def test_the_third(self, backend):
        op, pattern = OPS["rosa_linear"], PATTERNS["columns"]
        tensors = tensors_for(op, pattern, torch.float32)
        inputs, wide = leaves(tensors), leaves([t.double() for t in tensors])
        results = []
        for call, t in ((op.call, inputs), (op.plain, wide)):
            (first,) = torch.autograd.grad(call(pattern, *t).pow(3).sum(), t[3], create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), t[4], create_graph=True)
            results.append(torch.autograd.grad(second.square().sum(), (t[0], t[3], t[5])))
        assert_close(*results, torch.float32)

    def test_the_first_ones_are_kernels(self, backend, monkeypatch):
        """Only a graph of the backward is worth plain PyTorch's time."""
        op, pattern = OPS["rosa_linear"], PATTERNS["unstructured"]
        inputs = leaves(tensors_for(op, pattern, torch.float32))
        module = rk.dispatch.BACKENDS[backend]
        calls, backward = [], module.rosa_linear_backward
        monkeypatch.setattr(module, "rosa_linear_backward", lambda *args: (calls.append(1), backward(*args))[1])
        op.call(pattern, *inputs).sum().backward()
        assert calls == [1]

    @pytest.mark.parametrize("name", ["rosa_linear", "spmm", "sddmm", "csr_add"])
    def test_are_those_of_the_op_called_directly(self, name):
        """torch.ops.rosa_kernels is what an exported program calls."""
        op, pattern = OPS[name], PATTERNS["unstructured"]
        tensors = tensors_for(op, pattern, torch.float32)
        inputs, wide = leaves(tensors), leaves([t.double() for t in tensors])
        got = penalty_gradients(lambda *t: called_directly(name, pattern, *t), inputs, True)
        right = penalty_gradients(lambda *t: op.plain(pattern, *t), wide, True)
        assert_close(filled(got, inputs), filled(right, wide), torch.float32)
