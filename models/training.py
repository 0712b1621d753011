"""Train a review classifier, keep its best epoch, measure it."""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Batch, EncodedReviews
from step_graphs import StepGraphs

WARM_UP_SHARE = 0.05  # the learning rate rises during this share of all steps, then falls linearly to 0
GRADIENT_NORM = 1.0  # a longer gradient is cut to this length
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TrainingSettings:
    epochs: int
    batch_size: int
    learning_rate: float
    sparse_learning_rate: float  # it is for the adapters' sparse values; other parameters take learning_rate
    weight_decay: float
    dtype: str  # "fp32", or "bf16": autocast computes linear layers in bfloat16, and parameters stay float32
    seed: int
    cuda_graph: bool = False  # replay the steps as CUDA graphs


@dataclass(frozen=True)
class TrainingRun:
    best_epoch: int  # epochs count from 1
    validation_accuracy: float  # what the best epoch reached
    seconds: float
    reviews_per_second: float  # in training steps, validation left out
    graphed_steps: int  # that many of the steps were replays of CUDA graphs


def review_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy, a float32 scalar."""
    return F.cross_entropy(model(batch.tokens, batch.is_token).float(), batch.labels)


def autocast(model: nn.Module, dtype: str):
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


@torch.no_grad()
def confusion_matrix(model: nn.Module, reviews: EncodedReviews, dtype: str) -> Tensor:
    """Count how many reviews of class i (row) the model calls class j (column): (C, C) int64 on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    with autocast(model, dtype):
        predictions = [
            (batch.labels, model(*batch.to(device)[:2]).argmax(dim=1).cpu())
            for batch in reviews.batches(EVALUATION_BATCH)
        ]
    labels, predicted = (torch.cat(part) for part in zip(*predictions))
    classes = model.config.classes
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def accuracy(confusion: Tensor) -> float:
    return confusion.diagonal().sum().item() / confusion.sum().item()


def macro_f1(confusion: Tensor) -> float:
    """Return the mean over the classes of F1 = 2 tp / (2 tp + fp + fn).

    A class that neither occurs nor is predicted counts 0.
    """
    hits = confusion.diagonal().double()
    return (2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp(min=1)).mean().item()


def train(
    model: nn.Module,
    training: EncodedReviews,
    validation: EncodedReviews,
    settings: TrainingSettings,
    title: str,
    before_step: Callable[[int], bool] = lambda step: False,
) -> TrainingRun:
    """Train the parameters that require gradients. The model ends with those of its best epoch on `validation`.

    The best epoch has the highest accuracy; among equals it is the first. before_step is called with each step's
    number, from 0, and returns whether it has changed the model. Progress goes to stderr: a bar on a terminal, and a
    line an epoch elsewhere.
    """
    device = next(model.parameters()).device
    steps = settings.epochs * -(-len(training) // settings.batch_size)
    optimizer = make_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    run_step = training_step(model, optimizer, settings.dtype)
    graphs = StepGraphs(run_step, settings.batch_size, model.config.max_tokens) if settings.cuda_graph else None
    best = BestEpoch(model)
    step, training_seconds, began = 0, 0.0, time.perf_counter()
    with progress_bar(title, settings.epochs * len(training)) as bar:
        for epoch in range(1, settings.epochs + 1):
            model.train()
            epoch_began, loss_sum = time.perf_counter(), 0.0
            for batch in training.batches(settings.batch_size, shuffle_seed=(settings.seed, epoch)):
                batch = batch.to(device)
                if before_step(step) and graphs:
                    graphs.forget()
                loss = finite(graphs(batch) if graphs else run_step(*batch))
                scheduler.step()
                step += 1
                loss_sum += loss * len(batch.labels)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(len(batch.labels))
            epoch_seconds = time.perf_counter() - epoch_began
            training_seconds += epoch_seconds
            score = accuracy(confusion_matrix(model, validation, settings.dtype))
            best.offer(epoch, score)
            bar.write(
                f"{title}: epoch {epoch}/{settings.epochs}, loss {loss_sum / len(training):.3f}, validation "
                f"{score:.3f}, {len(training) / epoch_seconds:,.0f} reviews/s",
                file=sys.stderr,
            )
    best.restore()
    seconds = time.perf_counter() - began
    reviews_per_second = settings.epochs * len(training) / training_seconds
    return TrainingRun(best.epoch, best.score, seconds, reviews_per_second, graphs.replays if graphs else 0)


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: str) -> Callable[..., Tensor]:
    """Make the function that trains on a batch's tensors, on the model's device, and returns the loss.

    It never waits for a GPU, so a CUDA graph can be made of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(*batch: Tensor) -> Tensor:
        with autocast(model, dtype):
            loss = review_loss(model, Batch(*batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
        optimizer.step()
        return loss.detach()

    return step


def finite(loss: Tensor) -> float:
    """Read the loss. The training stops where it is no number."""
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss became {value}; a lower --lr or --base-lr may help")
    return value


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Make AdamW for what trains. Sparse values have their own learning rate, and only matrices have weight decay.

    For a CUDA graph the learning rates are tensors, which the scheduler fills and each replay reads.
    """
    sparse, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = sparse if ".values." in name else matrices if parameter.ndim > 1 else vectors
            group.append(parameter)
    groups = [
        {"params": sparse, "lr": settings.sparse_learning_rate, "weight_decay": 0.0},
        {"params": matrices, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": vectors, "lr": settings.learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.cuda_graph:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return torch.optim.AdamW(groups, fused=True, capturable=settings.cuda_graph)


def learning_rate_share(step: int, steps: int) -> float:
    warm_up = max(1, round(WARM_UP_SHARE * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


class BestEpoch:
    """Keeps a copy of the trained parameters as they were after the best epoch so far."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.epoch, self.score = 0, -1.0

    def offer(self, epoch: int, score: float) -> None:
        if score > self.score:
            self.epoch, self.score = epoch, score
            self._parameters = [p.detach().clone() for p in self._model.parameters() if p.requires_grad]

    @torch.no_grad()
    def restore(self) -> None:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        for parameter, kept in zip(trained, self._parameters, strict=True):
            parameter.copy_(kept)


def progress_bar(title: str, reviews: int) -> tqdm:
    return tqdm(
        desc=title, total=reviews, unit=" reviews", unit_scale=True, dynamic_ncols=True, leave=False,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
