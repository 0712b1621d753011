"""A small model of embedding, blocks and head, and a few steps of its training, for the tests of whole models."""

import torch
from torch import nn

import rosa_kernels as rk


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.query(x).sigmoid() * self.value(x)
        return x + self.ff(x)


class Classifier(nn.Module):
    def __init__(self, width=16, vocabulary=20, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


IDS = torch.arange(40).view(4, 10) % 20
ROSA = rk.RoSAConfig(r=2, density=0.1, mask="random", target_modules=["embedding", "ff.0"])


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, rk.nn.AdapterLayer)]


def train(model, steps=3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(IDS), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
