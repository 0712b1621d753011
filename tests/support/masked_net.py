"""A small model for select_masks, and a rank that selects. It lies here because spawned processes import it."""

import torch
from torch import nn

import rosa_kernels as rk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 6, padding_idx=0)
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.second(self.first(self.embedding(ids)).tanh()).tanh()).mean(1)


BATCHES = [torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
TARGETS = ["first", "second"]


def loss_fn(model, ids):
    return nn.functional.cross_entropy(model(ids), torch.tensor([0, 1, 0]))


def make(**fields):
    fields = {"r": 2, "density": 0.2, "target_modules": TARGETS, "modules_to_save": ["head"]} | fields
    return rk.add_adapters(Net(), rk.RoSAConfig(**fields))


def select_on_one_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(rank)  # what follows differs from rank to rank, as the data do
    found = rk.select_masks(model, BATCHES[2 * rank : 2 * rank + 2], loss_fn)
    other = rk.select_masks(make(mask="random"))
    results.put((rank, [{name: p.col_indices.tolist() for name, p in ps.items()} for ps in (found, other)]))
    torch.distributed.destroy_process_group()
