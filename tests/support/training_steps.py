"""Ten steps of a small adapted model under several optimisers. It lies here because spawned processes import it."""

import os

import torch
import torch.distributed as dist
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


def train_sharded(rank, port, backend, path):
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    with rk.use_backend(backend):
        model = make_model()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses, parameters = train(model, adamw_foreach)
    whole = {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}
    torch.save({"losses": losses, "parameters": whole}, path)
    dist.destroy_process_group()
