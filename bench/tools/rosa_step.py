"""The candidates of a race of RoSA's whole layer step, forward and backward."""

import rosa_kernels as rk
from interleaved import gradients
from layers import Layer
from naive import HandWritten, NoSparse


def rosa_step(layer: Layer, **by_hand: NoSparse) -> dict:
    """{"frozen", "ours" and each name of by_hand: function}; by_hand: the hand-written ways of S (naive.py)."""
    leaves = [layer.x, layer.lora_A, layer.lora_B, layer.values]
    arguments = *layer.base, *layer.lora, layer.values

    def step(call, *pattern):
        return gradients(lambda: call(*arguments, *pattern), leaves, layer.dy)

    return {
        "frozen": layer.frozen_step(),
        "ours": step(rk.rosa_linear, layer.pattern),
        **{name: step(HandWritten.apply, sparse) for name, sparse in by_hand.items()},
    }
