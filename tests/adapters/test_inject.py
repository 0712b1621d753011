"""add_adapters: which modules it finds, what it freezes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import rosa_kernels as rk
from small_classifier import IDS, Classifier, adapted, train


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


ALL = ["blocks.0.query", "blocks.0.value", "blocks.0.ff.0", "blocks.0.ff.2"]
ALL += [name.replace("0", "1", 1) for name in ALL]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, [*ALL, "head"]),
        ({"modules_to_save": ["head"]}, ALL),
        ({"exclude_modules": ["ff.0", "head", "blocks.1.value"]}, [ALL[i] for i in (0, 1, 3, 4, 7)]),
        ({"exclude_modules": r".*\.ff\.\d|head"}, [name for name in ALL if "ff" not in name]),
        ({"target_modules": ["query"]}, ["blocks.0.query", "blocks.1.query"]),
        ({"target_modules": ("blocks.1.query", "ff.2")}, ["blocks.0.ff.2", "blocks.1.query", "blocks.1.ff.2"]),
        ({"target_modules": r"blocks\.0\.(query|value)"}, ["blocks.0.query", "blocks.0.value"]),
        ({"target_modules": r"embedding|head|blocks"}, ["embedding", "head"]),
        ({"target_modules": ["embedding", "head"]}, ["embedding", "head"]),
    ],
)
def test_targets(fields, expected):
    model = rk.add_adapters(Classifier(), rk.LoRAConfig(r=2, **fields))
    assert adapted(model) == expected


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"target_modules": ["query", "valeu"]}, "target_modules: no module is called 'valeu'; near it: value"),
        ({"target_modules": ["blocks.0.kvery"]}, "near it: blocks.0.query"),
        ({"target_modules": ["uery"]}, "'uery'"),  # not a dotted part
        ({"target_modules": "query"}, r"\['query'\] would match the ends"),
        ({"target_modules": r"blocks\.7\..*"}, "matches no module"),
        ({"target_modules": "blocks|norm"}, "leaves no nn.Linear"),
        ({"target_modules": ["norm"]}, "norm is a LayerNorm"),
        ({"target_modules": ["query"], "exclude_modules": ["kwery"]}, "exclude_modules: no module is called 'kwery'"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "leaves no"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: no module is called 'haed'; near it: head"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, "inside modules_to_save"),
        ({"rank_pattern": {"kwery": 4}}, "rank_pattern: 'kwery'"),
        ({"alpha_pattern": {"norm": 4}}, "alpha_pattern: 'norm'"),
    ],
)
def test_what_matches_nothing_is_named_and_the_model_left_alone(fields, text):
    model = Classifier()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        rk.add_adapters(model, rk.LoRAConfig(**fields))
    assert not adapted(model) and trainable(model) == set(dict(model.named_parameters()))
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_exactly_the_adapters_and_the_head_train():
    model = rk.add_adapters(
        Classifier(), rk.RoSAConfig(r=2, density=0.1, target_modules=["query", "embedding"], modules_to_save=["head"])
    )
    expected = {"head.weight", "head.bias", "embedding.values.default"}
    expected |= {f"embedding.lora_embedding_{factor}.default" for factor in "AB"}
    expected |= {f"blocks.{i}.query.{kind}.default" for i in (0, 1) for kind in ("lora_A", "lora_B", "values")}
    assert trainable(model) == expected
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    head = model.head.weight.clone()
    train(model)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in base.items())
    assert not torch.equal(model.head.weight, head), "a frozen head is the quietest of failures"


@pytest.mark.parametrize("config", [rk.LoRAConfig(r=2), rk.RoSAConfig(r=2, target_modules=["query", "embedding"])])
def test_a_fresh_adapter_changes_nothing(backend, config):
    model = Classifier()
    y = model(IDS)
    tolerance = 1e-5 if backend == "cpu" else 0  # whose kernels may multiply the base too
    torch.testing.assert_close(rk.add_adapters(model, config)(IDS), y, rtol=tolerance, atol=tolerance)


def test_patterns_override_per_layer():
    config = rk.RoSAConfig(
        r=2,
        lora_alpha=4,
        density=0.1,
        modules_to_save=["head"],
        rank_pattern={"query": 5, r"blocks\.1\.ff\.\d": 0},
        alpha_pattern={"query": 10},
        density_pattern={"value": 0, "blocks.0.query": 0.5},
    )
    model = rk.add_adapters(Classifier(), config)
    first, second = model.blocks
    assert (first.query.r, first.query.scaling, first.value.r, first.value.scaling) == (5, 2, 2, 2)
    assert second.ff[0].r == 0 and not hasattr(second.ff[0], "lora_A") and second.ff[0].has_sparse
    assert not first.value.has_sparse
    assert (first.query.sparse_values.numel(), second.query.sparse_values.numel()) == (128, 26)


def test_an_embedding_can_be_row_sparse_beside_lora_on_the_rest():
    config = rk.RoSAConfig(
        r=2,
        density=0,
        density_pattern={"embedding": 0.2},
        rank_pattern={"embedding": 0},
        target_modules=["embedding", "query"],
    )
    model = rk.add_adapters(Classifier(), config)
    assert trainable(model) == {"embedding.values.default"} | {
        f"blocks.{i}.query.lora_{factor}.default" for i in (0, 1) for factor in "AB"
    }


# What cannot be adapted


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["out_proj"]}])
def test_linears_that_a_parent_reads_are_refused(fields):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "ff": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"attention\.out_proj cannot be adapted: MultiheadAttention reads its weight"):
        rk.add_adapters(model, rk.LoRAConfig(**fields))
    rk.add_adapters(model, rk.LoRAConfig(exclude_modules=["out_proj"]))
    assert adapted(model) == ["ff"]


def test_the_encoder_layer_with_a_fast_path_is_refused():
    with pytest.raises(ValueError, match="linear1 cannot be adapted: TransformerEncoderLayer"):
        rk.add_adapters(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), rk.LoRAConfig(target_modules=["linear1"]))


def test_a_second_adapter_is_refused():
    model = rk.add_adapters(Classifier(), rk.LoRAConfig(r=2))
    for name in ("default", "other"):
        with pytest.raises(ValueError, match="already carries adapters"):
            rk.add_adapters(model, rk.LoRAConfig(r=2), name)


def test_a_bare_layer_is_refused():
    with pytest.raises(ValueError, match=r"rosa_kernels\.nn"):
        rk.add_adapters(nn.Linear(2, 2), rk.LoRAConfig())


def test_sharded_and_wrapped_models_are_refused(one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match="DDP or FSDP"):
        rk.add_adapters(nn.parallel.DistributedDataParallel(Classifier()), rk.LoRAConfig())
    with pytest.raises(ValueError, match="DDP or FSDP"):
        rk.add_adapters(fully_shard(Classifier(), mesh=mesh), rk.LoRAConfig())
    model = Classifier()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh))
    with pytest.raises(ValueError, match="head: base_layer: expected a whole weight, got a DTensor"):
        rk.add_adapters(model, rk.LoRAConfig())
    assert model.blocks[0].query.weight.requires_grad, "a refused model is left as it was"


# Shared modules and weights


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.table = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        return self.out(self.again(self.first(self.table(ids))))


def test_a_module_with_two_names_gets_one_adapter():
    model = rk.add_adapters(Shared(), rk.LoRAConfig(r=2, target_modules=["again"]))
    assert model.first is model.again and isinstance(model.first, rk.nn.LoRALinear)
    rk.merge_and_unload(model)
    assert model.first is model.again and type(model.first) is nn.Linear


def test_excluding_one_of_two_names_excludes_the_module():
    model = rk.add_adapters(Shared(), rk.LoRAConfig(r=2, exclude_modules=["again"]))
    assert adapted(model) == ["out"]


def test_tied_weights_keep_one_owner_unadapted():
    model = rk.add_adapters(Shared(), rk.LoRAConfig(r=2, target_modules=["out"]))
    with torch.no_grad():
        model.out.lora_B["default"].normal_()
    table, y = model.table(IDS).clone(), model(IDS)
    rk.merge_adapters(model)
    assert torch.equal(model.table(IDS), table)
    torch.testing.assert_close(model(IDS), y)
    rk.unmerge_adapters(model)
    assert model.out.weight is model.table.weight and torch.equal(model(IDS), y)


def test_a_weight_that_trains_whole_elsewhere_is_no_target():
    with pytest.raises(ValueError, match="table shares its weight with modules_to_save"):
        rk.add_adapters(Shared(), rk.LoRAConfig(r=2, target_modules=["table"], modules_to_save=["out"]))
