"""The review classifier's own properties: padding, pooling, dropout, shapes, compilation, and what adapters reach."""

import pytest
import torch
from torch import nn

from transformer import ClassifierConfig, ReviewClassifier, masked_mean

SMALL = {"vocabulary": 50, "max_tokens": 12, "width": 16, "layers": 2, "heads": 4, "feed_forward": 24}


def make_model(**changes) -> ReviewClassifier:
    torch.manual_seed(1)
    return ReviewClassifier(ClassifierConfig(**{**SMALL, **changes}))


def make_batch(lengths, longest=None):
    tokens = torch.randint(1, 50, (len(lengths), longest or max(lengths)))
    is_token = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
    return tokens * is_token, is_token


@pytest.mark.parametrize("classes", [2, 5])
def test_one_score_a_class(classes):
    assert make_model(classes=classes)(*make_batch([3, 7])).shape == (2, classes)


def test_more_padding_changes_no_score():
    model = make_model().double().eval()
    tokens, is_token = make_batch([1, 4, 8], longest=8)
    expected = model(tokens, is_token)
    for padding in (1, 4):
        padded = nn.functional.pad(tokens, (0, padding), value=7), nn.functional.pad(is_token, (0, padding))
        torch.testing.assert_close(model(*padded), expected, rtol=0, atol=1e-12)


def test_neighbours_in_a_batch_change_no_score():
    model = make_model().double().eval()
    tokens, is_token = make_batch([3, 9, 5])
    together = model(tokens, is_token)
    for row, length in enumerate((3, 9, 5)):
        alone = model(tokens[row : row + 1, :length], is_token[row : row + 1, :length])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-12)


def test_a_token_and_its_place_count():
    model = make_model().eval()
    tokens, is_token = make_batch([6])
    scores = model(tokens, is_token)
    assert not torch.equal(scores, model(tokens.flip(1), is_token))
    other = tokens.clone()
    other[0, 3] += 1
    assert not torch.equal(scores, model(other, is_token))


def test_masked_mean():
    x = torch.arange(12.0).view(2, 3, 2)
    is_token = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(masked_mean(x, is_token), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))


def test_dropout_acts_in_training_alone():
    model = make_model(token_dropout=0.3, dropout=0.3)
    batch = make_batch([8, 5])
    assert not torch.equal(model(*batch), model(*batch))
    model.eval()
    assert torch.equal(model(*batch), model(*batch))


def test_token_dropout_keeps_the_first_token_and_adds_none():
    model = make_model(token_dropout=0.9)
    _, is_token = make_batch([1, 6, 12] * 50)
    kept = model._drop_tokens(is_token)
    assert kept[:, 0].all() and not (kept & ~is_token).any()
    assert 0.05 < kept[2::3, 1:].float().mean() < 0.15
    assert model(*make_batch([1, 2])).isfinite().all()


def test_a_batch_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="at most 12 tokens, got 13"):
        make_model()(*make_batch([13]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "multiple of heads"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_impossible_sizes_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_model(**change)


def test_every_projection_is_a_linear_layer():
    names = {name for name, module in make_model().named_modules() if isinstance(module, nn.Linear)}
    block = {f"attention.{name}_proj" for name in "qkv"} | {"attention.out_proj"}
    block |= {"feed_forward.up_proj", "feed_forward.down_proj"}
    assert names == {f"blocks.{i}.{name}" for i in range(2) for name in block} | {"head"}
    matrices = {name for name, parameter in make_model().named_parameters() if parameter.ndim > 1}
    assert matrices == {f"{name}.weight" for name in names | {"token_embedding", "position_embedding"}}


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_compiles_as_one_graph(training):
    model = make_model(token_dropout=0.3).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 7], [9, 2, 5]):
        batch = make_batch(lengths)
        torch.manual_seed(5)
        expected = model(*batch)
        torch.manual_seed(5)
        torch.testing.assert_close(compiled(*batch), expected)
