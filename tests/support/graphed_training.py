"""Trainings of the small classifier with dropout, for the tests of rk.graphed on recorded calls."""

import torch
import torch.nn.functional as F
from torch import nn

import rosa_kernels as rk
from small_classifier import IDS, Classifier

LABELS = torch.tensor([0, 1, 2, 0])
CALLS = 8  # three warm-ups, the recording, and more replays
CONFIGS = {
    "lora": rk.LoRAConfig(r=2, lora_dropout=0.3, target_modules=["embedding", "ff.0", "query"]),
    "rosa": rk.RoSAConfig(r=2, density=0.1, lora_dropout=0.3, mask="random", target_modules=["embedding", "ff.0"]),
    "rows": rk.RoSAConfig(r=0, density=0.2, structure="row", mask="random", target_modules=["ff.0", "ff.2"]),
}


def make_model(config=CONFIGS["rosa"], masks=True):
    torch.manual_seed(0)
    model = rk.add_adapters(Classifier(), config)
    if masks and isinstance(config, rk.RoSAConfig):
        rk.select_masks(model)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.3 * torch.randn_like(parameter))  # where lora_B is zero, dropout changes nothing
    return model


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model, lr=0.02):
    return torch.optim.AdamW(trainable(model), lr=torch.tensor(lr), fused=True, capturable=True)


def sgd(model):
    return torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)


class Training:
    """A model, its optimizer and a step; `zero` says where the step clears gradients."""

    def __init__(self, config=CONFIGS["rosa"], make_optimizer=adamw, zero="before", masks=True):
        self.model = make_model(config, masks)
        self.optimizer = make_optimizer(self.model)
        self.zero = zero

    def step(self, ids, labels):
        if self.zero in ("before", "before, in place"):
            self.optimizer.zero_grad(set_to_none=self.zero == "before")
        loss = F.cross_entropy(self.model(ids), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable(self.model), 1.0)
        self.optimizer.step()
        if self.zero == "after":
            self.optimizer.zero_grad()
        return loss

    def graphed(self):
        return rk.graphed(self.step, IDS, LABELS)

    def recorded(self):
        """The step after its recording."""
        run = self.graphed()
        for _ in range(CALLS):
            run(IDS, LABELS)
        return run


def batches(calls=CALLS):
    return [((IDS + number) % 20, (LABELS + number) % 3) for number in range(calls)]


def outcome(training, run, after_each=lambda: None):
    """What a training has come to: losses, parameters, gradients, and where the random numbers are."""
    torch.manual_seed(1)
    losses = []
    for batch in batches():
        losses.append(run(*batch).detach())
        after_each()
    parameters = [parameter.detach() for parameter in trainable(training.model)]
    gradients = [parameter.grad for parameter in trainable(training.model)]
    return torch.stack(losses), *parameters, *gradients, torch.get_rng_state()


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for mine, other in zip(got, expected):
        assert (mine is None and other is None) or torch.equal(mine, other)
