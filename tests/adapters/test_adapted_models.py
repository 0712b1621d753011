"""A model with adapters: counting, merging, disabling, and training it as any other model."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rosa_kernels as rk
from small_classifier import IDS, ROSA, Classifier, adapted, train


def test_counts(capsys):
    model = rk.add_adapters(Classifier(), rk.LoRAConfig(r=2, target_modules=["query"]))
    base = sum(p.numel() for p in Classifier().parameters())
    expected = {"trainable": 128, "total": base + 128, "percent": 100 * 128 / (base + 128)}
    assert rk.trainable_parameters(model) == expected
    rk.merge_adapters(model)
    assert rk.trainable_parameters(model) == expected
    rk.print_trainable_parameters(model)
    assert f"128 of {base + 128:,}" in capsys.readouterr().out


@pytest.fixture(params=[rk.LoRAConfig(r=2), ROSA], ids=["lora", "rosa"])
def trained(request):
    model = rk.add_adapters(Classifier(), request.param)
    if request.param is ROSA:
        rk.select_masks(model)
    train(model)
    return model


def test_merging_a_model(backend, trained):
    y = trained(IDS)
    state = copy.deepcopy(trained.state_dict())
    rk.merge_adapters(trained)
    torch.testing.assert_close(trained(IDS), y)
    rk.merge_adapters(trained)
    assert all(torch.equal(value, state[key]) for key, value in trained.state_dict().items())
    rk.unmerge_adapters(trained)
    assert torch.equal(trained(IDS), y)


def test_merge_and_unload(trained):
    y = trained(IDS)
    plain = rk.merge_and_unload(copy.deepcopy(trained))
    assert not adapted(plain) and set(plain.state_dict()) == set(Classifier().state_dict())
    torch.testing.assert_close(plain(IDS), y)
    rk.add_adapters(plain, rk.LoRAConfig(r=2))  # and again
    with pytest.raises(ValueError, match="no adapters"):
        rk.merge_adapters(Classifier())


@pytest.mark.parametrize("merged", [False, True])
def test_disabling(trained, merged):
    base = Classifier()
    state = trained.state_dict()
    base.load_state_dict({key.replace("base_layer.", ""): state[key] for key in state if "default" not in key})
    if merged:
        rk.merge_adapters(trained)
    y = trained(IDS)
    with pytest.raises(KeyError), rk.disable_adapters(trained):
        assert torch.equal(trained(IDS), base(IDS))
        raise KeyError("whatever happens inside")
    assert torch.equal(trained(IDS), y) and not torch.equal(y, base(IDS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_train(trained, reentrant):
    def gradients(run):
        trained.zero_grad()
        x = trained.embedding(IDS)
        x = x if x.requires_grad else x.detach().requires_grad_()  # enable_input_require_grads
        for block in trained.blocks:
            x = run(block, x)
        x.square().sum().backward()
        return {name: p.grad.clone() for name, p in trained.blocks.named_parameters() if p.requires_grad}

    expected = gradients(lambda block, x: block(x))
    found = gradients(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert expected and all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_compiled_model_equals_eager(trained):
    compiled = torch.compile(trained, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), trained(IDS))


def test_adapters_go_into_a_compiled_model():
    model = Classifier()
    compiled = torch.compile(model, backend="aot_eager")
    rk.add_adapters(compiled, rk.LoRAConfig(r=2, target_modules=["blocks.0.query"]))
    assert adapted(model) == ["blocks.0.query"]
    with torch.no_grad():
        model.blocks[0].query.lora_B["default"].normal_()
    torch.testing.assert_close(compiled(IDS), model(IDS))


def test_copies_and_dtypes(trained):
    y = trained(IDS)
    duplicate = copy.deepcopy(trained)
    assert torch.equal(duplicate(IDS), y)
    duplicate.to(torch.bfloat16)
    torch.testing.assert_close(duplicate(IDS).float(), y, rtol=0.1, atol=0.1)
    assert torch.equal(trained(IDS), y)


@pytest.mark.parametrize("config", [rk.LoRAConfig(r=2), ROSA], ids=["lora", "rosa"])
def test_fsdp2_trains_the_same(backend, one_process_group, tmp_path, config):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = rk.add_adapters(Classifier(), config)
    if config is ROSA:
        rk.select_masks(model)
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(model, 10), train(sharded, 10)
    found = {name: parameter.full_tensor() for name, parameter in sharded.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter)
    with pytest.raises(ValueError, match="sharded over ranks"):
        rk.save_adapters(sharded, tmp_path / "saved")
    with pytest.raises(RuntimeError, match="DTensor"):
        rk.merge_adapters(sharded)
