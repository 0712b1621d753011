"""--cuda-graph: the training step as CUDA graphs, one for each number of tokens that batches are padded to."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

import rosa_kernels as rk
from data import PAD_ID, Batch

TOKENS_APART = 32  # a graph has one shape, so batches are padded to a multiple of this; more padding is more work


class StepGraphs:
    """Trains on a batch as step does, by replays.

    A batch of fewer reviews than batch_size, which is the last of an epoch, comes too seldom for a graph of its own.
    It runs without one.
    """

    def __init__(self, step: Callable[..., Tensor], batch_size: int, max_tokens: int) -> None:
        self._step, self._batch_size, self._max_tokens = step, batch_size, max_tokens
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._forgotten_replays = 0

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss."""
        reviews, tokens = batch.tokens.shape
        if reviews < self._batch_size:
            return self._step(*batch)
        padded_tokens = min(-(-tokens // TOKENS_APART) * TOKENS_APART, self._max_tokens)
        batch = padded(batch, padded_tokens)
        if padded_tokens not in self._graphs:
            self._graphs[padded_tokens] = rk.graphed(self._step, *batch)
        return self._graphs[padded_tokens](*batch)

    def forget(self) -> None:
        """Record new graphs from now on, because the model has changed: masks have been chosen."""
        self._forgotten_replays = self.replays
        self._graphs.clear()

    @property
    def replays(self) -> int:
        """How many steps were replays so far. The others ran without a graph: short batches, and before a recording."""
        return self._forgotten_replays + sum(graph.replays for graph in self._graphs.values())


def padded(batch: Batch, tokens: int) -> Batch:
    more = tokens - batch.tokens.shape[1]
    return Batch(F.pad(batch.tokens, (0, more), value=PAD_ID), F.pad(batch.is_token, (0, more)), batch.labels)
