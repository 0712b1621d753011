"""Ten steps of training under each optimiser that bypasses version counters: nothing in the package may go stale."""

import pytest
import torch
import torch.nn.functional as F

import rosa_kernels as rk

STEPS = 10
TOKENS, FEATURES, HIDDEN, RANK = 90, 24, 40, 4  # above merging: I O / (I + O) = 15 tokens


class AdaptedLayer(torch.nn.Module):
    """A frozen layer with both adapters, straight on rk.rosa_linear."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.pattern = rk.CSRPattern.random((out_features, in_features), 0.1, seed=2)
        self.register_buffer("weight", torch.randn(out_features, in_features) * in_features**-0.5)
        self.lora_A = torch.nn.Parameter(torch.randn(RANK, in_features) * in_features**-0.5)
        self.lora_B = torch.nn.Parameter(torch.zeros(out_features, RANK))
        self.values = torch.nn.Parameter(torch.zeros(self.pattern.nnz))

    def forward(self, x):
        return rk.rosa_linear(x, self.weight, None, self.lora_A, self.lora_B, 2.0, self.values, self.pattern)


class DenseLayer(AdaptedLayer):
    """The same in plain PyTorch ops, S dense."""

    def forward(self, x):
        S = torch.zeros_like(self.weight).index_put(self.pattern.to_mask().nonzero(as_tuple=True), self.values)
        return F.linear(x, self.weight + S + 2.0 * self.lora_B @ self.lora_A)


def make_model(layer=AdaptedLayer):
    torch.manual_seed(0)
    return torch.nn.Sequential(layer(FEATURES, HIDDEN), torch.nn.GELU(), layer(HIDDEN, FEATURES))


def adamw_foreach(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, foreach=True).step


def adamw_fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, fused=True).step


def sgd_through_data(parameters):
    def step():
        for parameter in parameters:
            parameter.data = parameter.data - 0.02 * parameter.grad  # a new storage, as well as no new version

    return step


def sgd_in_data(parameters):
    def step():
        for parameter in parameters:
            parameter.data.add_(parameter.grad, alpha=-0.02)

    return step


OPTIMISERS = [adamw_foreach, adamw_fused, sgd_through_data, sgd_in_data]


def train(model, optimiser, tokens=TOKENS):
    """The loss of each step and the parameters after the last; the same batches for every model."""
    generator = torch.Generator().manual_seed(1)
    step = optimiser(list(model.parameters()))
    losses = []
    for _ in range(STEPS):
        x, target = (torch.randn(tokens, FEATURES, generator=generator) for _ in range(2))
        for parameter in model.parameters():
            parameter.grad = None
        loss = (model(x) - target).square().mean()
        loss.backward()
        step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses), dict(model.named_parameters())


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
