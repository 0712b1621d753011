"""The train steps of the review classifier that the models' races compare: one adapted model in several forms.

ours               models/adaptation.add_adapter
reference          the same on the reference backend
csr, dense, addmm  a hand-written nn.Module (hand_written.py) in place of each adapted layer, for RoSA or for LoRA
peft               PEFT's LoRA
full               every parameter trains, and the adapter is merged

All start from the same weights, so that the first loss and its gradients agree.
"""

import copy
import math
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rosa_kernels as rk
from adaptation import add_adapter
from data import PAD_ID, Batch
from hand_written import CSR, Dense, HandWritten, NoSparse
from options import parse_options
from rosa_kernels.adapters.inject import adapter_layers
from rosa_kernels.nn import AdapterLayer, RoSAEmbedding
from train_classifier import adapter_settings, adapter_sizes, model_config
from training import finite, make_optimizer, review_loss, training_step
from transformer import ReviewClassifier

try:
    import peft
except ImportError:
    peft = None

MODES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
"""Each mode's dtype of the linear layers' arithmetic.

In bf16 the frozen parameters are bf16 and the adapters fp32. autocast is the trainer's --dtype bf16.
"""

SEED = 0


@dataclass(frozen=True)
class ModelShape:
    name: str
    arguments: tuple[str, ...]  # of train_classifier.py
    review_tokens: int  # of the longest review in a batch
    tokens: int  # of a step, padding included

    def __str__(self) -> str:
        return self.name

    def options(self) -> Namespace:
        return parse_options(["--preset", "amazon", *self.arguments])

    def batch(self) -> Batch:
        """Random reviews of about equal lengths, as the trainer sorts them, with token frequencies about as Zipf's."""
        longest = min(self.review_tokens, self.tokens)
        reviews, vocabulary = self.tokens // longest, self.options().vocabulary
        generator = torch.Generator().manual_seed(SEED)
        lengths = torch.randint(math.ceil(0.9 * longest), longest + 1, (reviews, 1), generator=generator)
        lengths[0] = longest
        is_token = torch.arange(longest) < lengths
        ids = (torch.rand(is_token.shape, generator=generator) * math.log(vocabulary)).exp().long()
        return Batch(
            ids.clamp(max=vocabulary - 1).where(is_token, torch.tensor(PAD_ID)),
            is_token,
            torch.randint(2, (reviews,), generator=generator),
        )


AMAZON = ModelShape("amazon", (), 320, 64 * 320)
WIDE = ModelShape("wide", ("--width", "768", "--layers", "2", "--heads", "12", "--feed-forward", "3072"), 128, 16 * 128)


class TrainStep:
    """A model, its optimizer and a batch. A call is one train step.

    It returns what all forms agree on in their first step: the loss, and the gradients of the head and of the
    probed adapter. These are divided by the norm of the head's, because clipping scales each model's by another number.
    """

    def __init__(self, model: nn.Module, mode: str, shape: ModelShape, gradients: Callable, backend: str = "auto"):
        self.model, self.batch, self.gradients, self.backend = model.train(), shape.batch(), gradients, backend
        self.optimizer = make_optimizer(model, adapter_settings(shape.options()))
        self.dtype = "bf16" if mode == "autocast" else "fp32"

    def __call__(self) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)  # every model drops the same tokens and features
        with rk.use_backend(self.backend):
            loss = finite(training_step(self.model, self.optimizer, self.dtype)(*self.batch))
        head, *adapter = self.gradients()
        return torch.tensor(loss), *(gradient / head.norm() for gradient in (head, *adapter))


class GradientsOf:
    def __init__(self, *parameters: nn.Parameter):
        self.parameters = parameters

    def __call__(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters]


class GradientsByChainRule:
    """What the adapter's gradients would be, from dW of the merged weight W + scaling · B A + S."""

    def __init__(self, head: nn.Parameter, weight: nn.Parameter, adapter: AdapterLayer):
        self.head, self.weight = head, weight
        self.A, self.B = (factor.detach().clone() for factor in adapter.low_rank_factors())
        self.scaling = adapter.scaling
        self.entries = Dense(adapter.sparse_pattern()).flat if adapter.has_sparse else None

    def __call__(self) -> list[Tensor]:
        dW = self.weight.grad.float()
        gradients = [self.head.grad, self.scaling * self.B.T @ dW, self.scaling * dW @ self.A.T]
        return gradients if self.entries is None else [*gradients, dW.view(-1)[self.entries]]


def train_steps(adapter: str, mode: str, shape: ModelShape) -> dict[str, TrainStep]:
    """Returns {name: step}. "peft" is among them where it is installed and computes the same."""
    base, model = _adapted(adapter, mode, shape)

    def step(other, gradients=None, backend="auto"):
        return TrainStep(other, mode, shape, gradients or _gradients_of(other), backend)

    hand_written = {"csr": CSR, "dense": Dense} if adapter == "rosa" else {"addmm": lambda pattern: NoSparse()}
    full = rk.merge_and_unload(copy.deepcopy(model)).requires_grad_(True)
    chain_rule = GradientsByChainRule(full.head.weight, _probed(full).weight, _probed(model))
    found = {
        "ours": step(model),
        "reference": step(copy.deepcopy(model), backend="reference"),
        **{name: step(_hand_written(copy.deepcopy(model), sparse)) for name, sparse in hand_written.items()},
        "full": step(full, chain_rule),
    }
    if adapter == "lora" and peft is not None:
        found["peft"] = step(_by_peft(base, model))
    return found


def _adapted(adapter: str, mode: str, shape: ModelShape) -> tuple[ReviewClassifier, ReviewClassifier]:
    """Returns the frozen model, and one with an adapter in the midst of training: no part of it is zero."""
    options = shape.options()
    torch.manual_seed(SEED)
    base = ReviewClassifier(model_config(options))
    scored = copy.deepcopy(base)  # in fp32, because gradients in bf16 may take minutes
    add_adapter(scored, adapter, adapter_sizes(options))
    patterns = rk.select_masks(scored, [shape.batch()], review_loss) if adapter == "rosa" else {}
    if mode == "bf16":
        base.to(torch.bfloat16)
    model = copy.deepcopy(base)
    add_adapter(model, adapter, adapter_sizes(options))
    for name, layer in adapter_layers(model).items():
        if name in patterns:
            layer.place_pattern(patterns[name])
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return base, model


def _probed(model: ReviewClassifier) -> nn.Module:
    """The layer whose gradients are compared. It is the last one, because they have met the fewest roundings there."""
    return model.blocks[-1].feed_forward.down_proj


def _gradients_of(model: nn.Module) -> GradientsOf:
    if peft is not None and isinstance(model, peft.PeftModel):
        root = model.get_base_model()
        layer, head = _probed(root), root.head.modules_to_save["default"]
        return GradientsOf(head.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    layer = _probed(model)
    sparse = [layer.sparse_values] if layer.has_sparse else []
    return GradientsOf(model.head.weight, *layer.low_rank_factors(), *sparse)


def _by_peft(base: ReviewClassifier, model: ReviewClassifier) -> nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        rk.to_peft(model, directory)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory, is_trainable=True)


def _hand_written(model: ReviewClassifier, sparse: Callable) -> ReviewClassifier:
    """The model with a hand-written module in place of each of ours, around the same parameters."""
    for name, layer in adapter_layers(model).items():
        kind = HandWrittenEmbedding if isinstance(layer, RoSAEmbedding) else HandWrittenLinear
        model.set_submodule(name, kind(layer, sparse))
    return model


class HandWrittenLinear(nn.Module):
    def __init__(self, layer: AdapterLayer, sparse: Callable):
        super().__init__()
        self.base_layer, self.scaling, self.has_sparse = layer.base_layer, layer.scaling, layer.has_sparse
        self.A, self.B = layer.low_rank_factors()
        self.sparse_values = layer.sparse_values if layer.has_sparse else None
        self.sparse = sparse(layer.sparse_pattern())

    def low_rank_factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        W, b = self.base_layer.weight, self.base_layer.bias
        if torch.is_autocast_enabled(x.device.type):
            x, W, b = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, W, b))
        with torch.autocast(x.device.type, enabled=False):
            y = HandWritten.apply(x.flatten(0, -2), W, b, self.A, self.B, self.scaling, self.sparse_values, self.sparse)
        return y.unflatten(0, x.shape[:-1])


class HandWrittenEmbedding(nn.Module):
    """PEFT's embedding, plus a row of S for each token that has one. The last row stays zero, for all other tokens."""

    def __init__(self, layer: RoSAEmbedding, sparse: Callable):
        super().__init__()
        self.base_layer, self.scaling = layer.base_layer, layer.scaling
        self.A, self.B = layer.low_rank_factors()
        self.rows = None
        if layer.has_sparse:
            tokens = layer.sparse_pattern().crow_indices.diff().nonzero()[:, 0]
            rows = layer.sparse_values.detach().view(len(tokens), layer.embedding_dim)
            self.rows = nn.Parameter(torch.cat([rows, rows.new_zeros(1, layer.embedding_dim)]))
            self.row_of_token = torch.full((layer.num_embeddings,), len(tokens))
            self.row_of_token[tokens] = torch.arange(len(tokens))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base_layer(ids)
        adapter = self.scaling * F.linear(F.embedding(ids, self.A.T), self.B)
        if self.rows is not None:
            adapter = adapter + F.embedding(self.row_of_token[ids], self.rows, padding_idx=len(self.rows) - 1)
        return (y + adapter).to(y.dtype)
