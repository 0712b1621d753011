"""Merging rounds once, and unmerging loses nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rosa_kernels as rk
from small_layers import ALPHA, IN, OUT, R, make_base, trained_layer


@pytest.mark.parametrize("kind", ["lora", "rosa", "sparse", "rosa-unselected"])
def test_unmerging_restores_every_bit(dtype_of_merge, kind):
    layer = trained_layer(kind, dtype_of_merge)
    weight = layer.weight.clone()
    x = torch.randn(4, IN, dtype=dtype_of_merge)
    y = layer(x)
    for _ in range(20):
        layer.merge()
        assert layer.merged
        layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), y) and not layer.merged


@pytest.fixture(params=["fp32", "bf16", "fp16", "fp64"])
def dtype_of_merge(request):
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[request.param]


@pytest.mark.parametrize("kind", ["lora", "rosa", "sparse"])
def test_merging_rounds_once(dtype_of_merge, kind):
    layer = trained_layer(kind, dtype_of_merge)
    before = layer.weight.detach().clone()
    delta = layer.delta_weight()
    wide = torch.float64 if dtype_of_merge == torch.float64 else torch.float32
    assert delta.dtype == wide and delta.shape == (OUT, IN)
    layer.merge()
    assert torch.equal(layer.weight, (before.to(wide) + delta).to(dtype_of_merge))
    assert torch.equal(layer.weight, layer.base_layer.weight)
    x = torch.randn(4, IN, dtype=dtype_of_merge)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_merging_twice_adds_once():
    layer = trained_layer()
    layer.merge()
    weight = layer.weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(layer.weight, weight)
    layer.unmerge()
    with pytest.warns(UserWarning, match="not merged"):
        layer.unmerge()


def test_a_merged_state_dict_is_the_unmerged_one():
    layer = trained_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.merge()
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(RuntimeError, match="merged"):
        layer.load_state_dict(before)


def test_merging_leaves_whoever_shares_the_weight_alone():
    layer = trained_layer()
    tied = nn.Linear(IN, OUT)
    tied.weight = layer.weight
    before = tied.weight.clone()
    layer.merge()
    assert torch.equal(tied.weight, before) and not torch.equal(layer.weight, before)
    layer.unmerge()
    assert layer.weight is tied.weight


def test_a_merged_layer_moves_and_copies():
    layer = trained_layer()
    weight = layer.weight.clone()
    layer.merge()
    moved = copy.deepcopy(layer).to(torch.float64)
    moved.unmerge()
    assert torch.equal(moved.weight, weight.double())


def test_training_a_merged_layer_warns():
    layer = trained_layer().eval()
    layer.merge()
    with pytest.warns(UserWarning, match="will not train"):
        layer.train()


def test_only_ordinary_weights_merge():
    layer = rk.nn.LoRALinear(make_base(), R, ALPHA)
    layer.base_layer.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RuntimeError, match="int8"):
        layer.merge()
