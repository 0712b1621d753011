"""A small encoder that classifies a review.

It has a token embedding, pre-norm attention blocks, masked mean pooling and a linear head. Every projection is an
nn.Linear of its own (q_proj, k_proj, v_proj, out_proj, up_proj, down_proj, head), so adapters reach all of them.
Shapes: B reviews, T tokens of the longest review in the batch, D the width, H heads, C classes.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ClassifierConfig:
    vocabulary: int = 8192
    classes: int = 2
    max_tokens: int = 256  # the data pipeline cuts longer reviews; a longer batch is an error here
    width: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 256
    # Each token is left out of a training step with this chance, as if it were padding. No dropout is cheaper: it takes
    # one random number a token, not one a feature, and no mask over a wide activation.
    token_dropout: float = 0.2
    dropout: float = 0.2  # it acts on the pooled review (B, D), as the blocks' activations have T times as many numbers

    def __post_init__(self) -> None:
        for name in ("vocabulary", "classes", "max_tokens", "width", "layers", "heads", "feed_forward"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and {self.heads} heads")
        for name in ("token_dropout", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def to_dict(self) -> dict[str, int | float]:
        return asdict(self)


class SelfAttention(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        """x (B, T, D), is_token (B, T) bool -> (B, T, D). No position attends to padding."""

        def split_heads(projected: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, D / H)
            return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = (split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_token[:, None, None, :])
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.feed_forward)
        self.down_proj = nn.Linear(config.feed_forward, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), is_token)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ReviewClassifier(nn.Module):
    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.classes)
        self.apply(self._initialise)
        nn.init.normal_(self.token_embedding.weight, std=0.1)  # larger than what attention adds at first
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, is_token: Tensor) -> Tensor:
        """Return the logits of each class.

        tokens (B, T) int64, is_token (B, T) bool, False at padding -> logits (B, C) in the parameters' dtype. More
        padding changes no logit beyond rounding. T above config.max_tokens raises ValueError.
        """
        if tokens.shape[1] > self.config.max_tokens:
            raise ValueError(f"reviews must have at most {self.config.max_tokens} tokens, got {tokens.shape[1]}")
        if self.training and self.config.token_dropout > 0:
            is_token = self._drop_tokens(is_token)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x, is_token)
        return self.head(self.dropout(self.final_norm(masked_mean(x, is_token))))

    def _drop_tokens(self, is_token: Tensor) -> Tensor:
        """Leave out tokens by chance, but never the first one, so a review keeps at least one token."""
        kept = torch.rand(is_token.shape, device=is_token.device) >= self.config.token_dropout
        kept[:, 0] = True
        return is_token & kept


def masked_mean(x: Tensor, is_token: Tensor) -> Tensor:
    """Return the mean of x (B, T, D) over the positions where is_token (B, T) is True: (B, D)."""
    weights = is_token.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(dim=1) / weights.sum(dim=1)
