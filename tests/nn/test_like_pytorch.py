"""Adapted layers take the place of PyTorch's: by the same names, in the same tools, with ragged batches."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import rosa_kernels as rk

RAGGED = (2, 5, 1)


def adapted_linear(config=None, base=None):
    torch.manual_seed(0)
    model = nn.Sequential(base or nn.Linear(8, 6))
    rk.add_adapters(model, config or rk.RoSAConfig(r=2, density=0.2, mask="random"))
    if any(layer.has_sparse for layer in model):
        rk.select_masks(model)
    return with_numbers(model)[0]


def adapted_embedding(padding_idx=None):
    torch.manual_seed(0)
    layer = rk.nn.RoSAEmbedding(nn.Embedding(7, 4, padding_idx=padding_idx), 2, 4, density=0.3)
    layer.place_pattern(rk.CSRPattern.from_rows(torch.tensor([2, 5]), (7, 4)))
    return with_numbers(layer)


def with_numbers(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return module


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


LAYERS = {
    "lora": lambda: adapted_linear(rk.LoRAConfig(r=2)),
    "rosa": adapted_linear,
    "sparse": lambda: adapted_linear(rk.RoSAConfig(r=0, density=0.2, mask="random")),
    "embedding": adapted_embedding,
    "lora embedding": lambda: rk.nn.RoSAEmbedding(nn.Embedding(7, 4), 2, 4, density=0.0),
    "masks not chosen": lambda: rk.nn.RoSALinear(nn.Linear(8, 6), 2, 4, density=0.2),
}


class TestTools:
    @pytest.mark.parametrize("kind", LAYERS)
    def test_every_attribute_can_be_asked_for(self, kind):
        """Debuggers and tools call hasattr and inspect.getmembers, which pass on all but an AttributeError."""
        layer = LAYERS[kind]()
        members = dict(inspect.getmembers(layer))
        assert all(hasattr(layer, name) == (name in members) for name in dir(layer))
        assert ("sparse_values" in members) == layer.has_sparse
        assert layer.masks_selected == (layer.sparse_pattern() is not None)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_the_argument_has_the_name_that_pytorch_gives_it(self, kind):
        layer = LAYERS[kind]()
        example = torch.tensor([[1, 2, 5]]) if "embedding" in kind else torch.randn(3, 8)
        assert torch.equal(layer(input=example), layer(example))
        assert list(inspect.signature(layer.forward).parameters) == ["input"]

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_a_trace_computes_the_same(self, kind):
        layer = LAYERS[kind]().eval()
        examples = (
            [torch.tensor([[1, 2, 5]]), torch.tensor([[0, 2, 6]])] if "embedding" in kind else torch.randn(2, 3, 8)
        )
        traced = torch.jit.trace(layer, (examples[0],))
        torch.testing.assert_close(traced(examples[1]), layer(examples[1]))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("strict", [False, True])
    def test_an_exported_program_trains_as_the_layer(self, kind, strict):
        layer = LAYERS[kind]()
        example = torch.tensor([[1, 2, 5]]) if "embedding" in kind else torch.randn(3, 8)
        with torch.no_grad() if strict else torch.enable_grad():
            program = torch.export.export(layer, (example,), strict=strict)
        exported = program.module()
        for _ in range(2):
            exported(example).square().sum().backward()
            layer(example).square().sum().backward()
        got, right = gradients(exported), gradients(layer)
        for name, gradient in right.items():
            if gradient is None:  # values whose masks are not chosen take no part, and strict export leaves them out
                assert got.get(name) is None
            else:
                torch.testing.assert_close(got[name], gradient)

    def test_an_exported_program_is_saved_and_trained(self, tmp_path):
        layer = adapted_linear()
        x = torch.randn(3, 8)
        torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
        loaded(x).square().sum().backward()
        layer(x).square().sum().backward()
        for got, right in zip(gradients(loaded).values(), gradients(layer).values(), strict=True):
            torch.testing.assert_close(got, right)

    def test_compiled_transforms(self):
        layer = adapted_linear()
        trainable = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
        x = torch.randn(3, 8)
        loss = lambda parameters: torch.func.functional_call(layer, parameters, (x,)).square().sum()
        got = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(trainable)
        for name, right in torch.func.grad(loss)(trainable).items():
            torch.testing.assert_close(got[name], right)


def ragged(parts, **kwargs):
    return torch.nested.nested_tensor(parts, layout=torch.jagged, **kwargs)


class TestRaggedBatches:
    """Nested tensors of layout torch.jagged: each part as by itself."""

    @pytest.fixture(params=["plain", "with a hook", "merged", "disabled"])
    def layer(self, request):
        layer = adapted_linear()
        if request.param == "with a hook":
            layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
        if request.param == "merged":
            layer.merge()
        layer.adapter_enabled = request.param != "disabled"
        return layer

    def test_a_linear_layer(self, layer, backend):
        parts = [torch.randn(n, 8) for n in RAGGED]
        y = layer(ragged(parts))
        assert y.is_nested and y.layout is torch.jagged
        for got, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(got, layer(part))

    @pytest.mark.parametrize("kind", ["lora", "rosa", "sparse"])
    def test_gradients_and_what_is_added(self, kind, backend):
        """The result has the input's raggedness, so that the two can be added, and gradients flow to both."""
        parts = [torch.randn(n, 8) for n in RAGGED]
        layer = adapted_linear(LAYERS[kind]().r and None, nn.Linear(8, 8)) if kind == "rosa" else LAYERS[kind]()
        x = ragged(parts, requires_grad=True)
        y = layer(x)
        total = y + x if kind == "rosa" else y
        total.values().square().sum().backward()
        got, dx = gradients(copy.copy(layer)), x.grad
        layer.zero_grad()
        alone = [part.clone().requires_grad_() for part in parts]
        sum((layer(p) + p if kind == "rosa" else layer(p)).square().sum() for p in alone).backward()
        for name, right in gradients(layer).items():
            torch.testing.assert_close(got[name], right)
        for a, part in zip(dx.unbind(), alone, strict=True):
            torch.testing.assert_close(a, part.grad)

    @pytest.mark.parametrize("kind", ["lora", "rosa", "sparse", "embedding"])
    def test_second_derivatives(self, kind, backend):
        """A gradient penalty, whose gradients are those of all tokens in one plain tensor."""
        layer = LAYERS[kind]()
        tokens = torch.arange(8) % 7 if kind == "embedding" else torch.randn(8, 8)
        trainable = [p for p in layer.parameters() if p.requires_grad]
        results = []
        for x in (ragged(tokens.split(RAGGED)), tokens):
            y = layer(x)
            y = y.values() if x.is_nested else y
            first = torch.autograd.grad(y.pow(3).sum(), trainable, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), trainable))
        for got, right in zip(*results, strict=True):
            torch.testing.assert_close(got, right)

    def test_second_derivatives_of_x(self, backend):
        layer = adapted_linear()
        tokens = torch.randn(8, 8)
        x, plain = ragged(tokens.split(RAGGED), requires_grad=True), tokens.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).values().pow(3).sum(), x, create_graph=True)
        (right,) = torch.autograd.grad(layer(plain).pow(3).sum(), plain, create_graph=True)
        dx.values().square().sum().backward()
        right.square().sum().backward()
        torch.testing.assert_close(x.grad.values(), plain.grad)

    def test_the_longest_part_stays_known(self):
        """Attention asks for it, and on a GPU it would wait for it."""
        x = ragged([torch.randn(n, 8) for n in RAGGED])
        assert adapted_linear()(x)._maybe_max_seqlen == x._maybe_max_seqlen == max(RAGGED)

    def test_compiled(self):
        x, layer = ragged([torch.randn(n, 8) for n in RAGGED]), adapted_linear()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x).values(), layer(x).values())

    def test_further_sizes_behind_the_ragged_one(self, backend):
        parts = [torch.randn(n, 3, 8) for n in RAGGED]
        layer = adapted_linear()
        for got, part in zip(layer(ragged(parts)).unbind(), parts, strict=True):
            torch.testing.assert_close(got, layer(part))

    def test_spmm(self, backend):
        pattern = rk.CSRPattern.random((6, 8), 0.3, seed=0)
        parts, values = [torch.randn(n, 8) for n in RAGGED], torch.randn(pattern.nnz)
        for got, part in zip(rk.spmm(ragged(parts), values, pattern).unbind(), parts, strict=True):
            torch.testing.assert_close(got, rk.spmm(part, values, pattern))

    @pytest.mark.parametrize("lengths", [RAGGED, (40, 30)], ids=["few", "many"])
    def test_an_embedding(self, lengths):
        parts = [torch.randint(7, (n,)) for n in lengths]
        layer = adapted_embedding(padding_idx=1)
        y = layer(ragged(parts))
        y.values().square().sum().backward()
        got = gradients(copy.copy(layer))
        layer.zero_grad()
        for a, part in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(a, layer(part))
        layer(torch.cat(parts)).square().sum().backward()
        for name, right in gradients(layer).items():
            torch.testing.assert_close(got[name], right)

    def test_under_autocast(self, backend):
        parts = [torch.randn(n, 8) for n in RAGGED]
        layer = adapted_linear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(ragged(parts))
            assert y.dtype == torch.bfloat16
            for got, part in zip(y.unbind(), parts, strict=True):
                torch.testing.assert_close(got, layer(part), atol=0.05, rtol=0.05)

    def test_what_is_ragged_in_its_features_is_refused(self):
        x = ragged([torch.randn(n, 8) for n in RAGGED]).transpose(1, 2)
        with pytest.raises(ValueError, match="x: expected shape .*ragged in its features"):
            adapted_linear()(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls this layout a prototype
            strided = torch.nested.nested_tensor([torch.randn(2, 8)])
        with pytest.raises(ValueError, match="x: expected.*torch.jagged"):
            adapted_linear()(strided)
