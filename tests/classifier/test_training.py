"""Ten steps of training under each optimiser that bypasses version counters: nothing in the package may go stale."""

import socket

import pytest
import torch
import torch.distributed as dist

from training_steps import FEATURES, OPTIMISERS, TOKENS, DenseLayer, adamw_foreach, make_model, train, train_sharded


def assert_same_training(got, expected):
    """Rounding differs and Adam amplifies it where a gradient is nearly zero; a step on stale values is far outside."""
    (losses, parameters), (expected_losses, expected_parameters) = got, expected
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected_parameters[name].detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [5, TOKENS], ids=["unmerged", "merged"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_ten_steps_equal_those_of_plain_pytorch(backend, optimiser, tokens):
    model = make_model()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    got = train(model, optimiser, tokens)
    expected = train(make_model(DenseLayer), optimiser, tokens)
    assert_same_training(got, expected)
    assert all(parameter.detach().any() for parameter in got[1].values()), "a part did not train"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), f"frozen {name} changed"


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_what_was_trained_is_what_serves(backend, optimiser):
    """Right after a step, without grad and with: y from the parameters as they are now."""
    model = make_model()
    train(model, optimiser)
    dense = make_model(DenseLayer)
    dense.load_state_dict(model.state_dict())
    x = torch.randn(TOKENS, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_fp32_adapters_over_a_bf16_base_take_steps_that_bf16_would_lose(backend):
    model = make_model()
    for layer in (model[0], model[2]):
        layer.weight = layer.weight.bfloat16()
    x, target = (torch.randn(TOKENS, FEATURES).bfloat16() for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).sign() * 0.125)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (model(x) - target).float().square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    for parameter, old in zip(model.parameters(), before):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.detach(), old - 1e-3 * parameter.grad)
        moved = parameter.detach() != old
        assert moved.float().mean() > 0.9 and bool((parameter.detach().bfloat16() == old.bfloat16())[moved].any())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.exhaustive
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_fsdp2_on_one_process_trains_as_without(backend, tmp_path):
    """fully_shard frees and gathers parameters again around each forward and backward, behind the version counters."""
    path = tmp_path / "sharded.pt"
    torch.multiprocessing.spawn(train_sharded, args=(_free_port(), backend, path), nprocs=1)
    sharded = torch.load(path, weights_only=True)
    assert_same_training((sharded["losses"], sharded["parameters"]), train(make_model(), adamw_foreach))
