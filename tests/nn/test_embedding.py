"""RoSAEmbedding: whole token rows and a low-rank part over a frozen table."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rosa_kernels as rk

VOCABULARY, DIM, PADDING = 30, 8, 0
ROWS = torch.tensor([3, 7, 29])


def make_layer(r=2, dtype=torch.float32, padding_idx=PADDING):
    base = nn.Embedding(VOCABULARY, DIM, padding_idx=padding_idx, dtype=dtype)
    return rk.nn.RoSAEmbedding(base, r, 4, pattern=rk.CSRPattern.from_rows(ROWS, (VOCABULARY, DIM)))


def randomise(layer):
    """Factors and values as training might leave them: nothing at the padding row."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        if layer.r and layer.padding_idx is not None:
            layer.lora_embedding_A["default"][:, layer.padding_idx] = 0
    return layer


IDS = torch.tensor([[0, 3, 4], [29, 3, 7]])


@pytest.mark.parametrize("r", [0, 2])
def test_a_fresh_adapter_changes_no_bit(r):
    base = nn.Embedding(VOCABULARY, DIM, padding_idx=PADDING)
    for density in (0.1, 0.0) if r else (0.1,):
        assert torch.equal(rk.nn.RoSAEmbedding(copy.deepcopy(base), r, 4, density)(IDS), base(IDS))
    layer = make_layer(r)
    assert torch.equal(layer(IDS), layer.base_layer(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("r", [0, 2])
def test_output_is_a_look_up_in_base_plus_delta(r, dtype):
    layer = randomise(make_layer(r, dtype))
    expected = F.embedding(IDS, layer.weight.double() + layer.delta_weight().double())
    torch.testing.assert_close(layer(IDS).double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert layer(IDS).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("r", [0, 2])
def test_many_tokens_are_adapted_as_few_are(r, dtype):
    """More tokens than rows, so that the rows are adapted: outputs and gradients against those of each token alone."""
    layer = randomise(make_layer(r, dtype))
    ids = torch.arange(2 * VOCABULARY).remainder(VOCABULARY - 2).view(4, -1)
    dy = torch.randn(*ids.shape, DIM, dtype=dtype)
    trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y = layer(ids)
    gradients = torch.autograd.grad(y, trainable, dy)
    apart = torch.stack([layer(line) for line in ids])
    tolerance = {"rtol": 2**-7, "atol": 2**-5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y, apart, **tolerance)
    for gradient, expected in zip(gradients, torch.autograd.grad(apart, trainable, dy)):
        torch.testing.assert_close(gradient, expected, **tolerance)
    of_name = dict(zip([name for name, parameter in layer.named_parameters() if parameter.requires_grad], gradients))
    assert r == 0 or of_name["lora_embedding_A.default"][:, PADDING].abs().sum() == 0


def test_many_tokens_meet_the_hooks_of_the_base():
    layer = randomise(make_layer())
    ids = torch.arange(2 * VOCABULARY) % VOCABULARY
    y, base = layer(ids), layer.base_layer(ids)
    layer.base_layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(layer(ids), y + base)


def test_autocast_leaves_many_tokens_as_they_are():
    layer = randomise(make_layer())
    ids = torch.arange(2 * VOCABULARY) % VOCABULARY
    y = layer(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(ids), y)


def test_tokens_without_a_row_are_untouched_and_others_train():
    layer = make_layer(r=0)
    layer(IDS).sum().backward()
    gradient = layer.sparse_values.grad.view(3, DIM)
    assert torch.equal(gradient[:, 0], torch.tensor([2.0, 1.0, 1.0]))  # token 3 comes twice
    assert layer.weight.grad is None
    randomise(layer)
    assert torch.equal(layer(torch.tensor([4, 0])), layer.base_layer(torch.tensor([4, 0])))


def test_nan_in_another_token_does_not_spread():
    layer = make_layer(r=0)
    layer.sparse_values.data[:DIM] = float("nan")
    assert torch.isfinite(layer(torch.tensor([4, 7, 29, 0]))).all()


def test_the_padding_row_gets_no_adapter_and_no_gradient():
    layer = make_layer()
    layer(torch.tensor([0, 0, 5])).sum().backward()
    assert layer.lora_embedding_A["default"].grad[:, PADDING].abs().sum() == 0
    assert layer.lora_embedding_A["default"].grad[:, 5].abs().sum() > 0
    with pytest.raises(ValueError, match="padding_idx 0"):
        layer.place_pattern(rk.CSRPattern.from_rows(torch.tensor([0, 1]), (VOCABULARY, DIM)))


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("times", [1, 20], ids=["few", "many"])
def test_gradients_at_the_padding_row_are_those_of_the_formula(times, r):
    """A factor there may be another than 0: it takes part in the output, and gets no gradient itself, as in PEFT."""
    torch.manual_seed(0)
    layer = make_layer(r)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    ids = IDS.repeat(times, 1)
    S = torch.zeros(VOCABULARY, DIM).index_put((ROWS,), layer.sparse_values.view(-1, DIM))
    plain = layer.base_layer(ids) + F.embedding(ids, S, PADDING)
    if r:
        A, B = layer.low_rank_factors()
        plain = plain + layer.scaling * F.embedding(ids, A.T, PADDING) @ B.T
    trainable = [p for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(layer(ids), plain)
    got, right = (torch.autograd.grad(y.square().sum(), trainable) for y in (layer(ids), plain))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging(dtype):
    layer = randomise(make_layer(dtype=dtype))
    weight, y = layer.weight.clone(), layer(IDS)
    layer.merge()
    torch.testing.assert_close(layer(IDS), y)
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(IDS), y)


def test_shapes_are_those_of_peft():
    shapes = {name: tuple(p.shape) for name, p in make_layer().named_parameters()}
    assert shapes["lora_embedding_A.default"] == (2, VOCABULARY) and shapes["lora_embedding_B.default"] == (DIM, 2)
    assert shapes["values.default"] == (3 * DIM,)


def test_what_it_refuses():
    class Scaled(nn.Embedding):
        pass

    with pytest.raises(TypeError, match="Scaled"):
        rk.nn.RoSAEmbedding(Scaled(4, 4), 1, 1)
    with pytest.raises(ValueError, match="max_norm"):
        rk.nn.RoSAEmbedding(nn.Embedding(4, 4, max_norm=1.0), 1, 1)
    with pytest.raises(ValueError, match="whole rows"):
        rk.nn.RoSAEmbedding(nn.Embedding(4, 4), 1, 1, pattern=rk.CSRPattern.random((4, 4), 0.3, 0))


def test_state_dict_and_compile():
    layer = randomise(make_layer())
    other = rk.nn.RoSAEmbedding(nn.Embedding(VOCABULARY, DIM, padding_idx=PADDING), 2, 4, density=0.01)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(IDS), layer(IDS))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), layer(IDS))
