"""The candidates of a race of RoSA's whole layer step, forward and backward."""

import rosa_kernels as rk
from hand_written import HandWritten, NoSparse
from interleaved import gradients
from layers import Layer


def rosa_step(layer: Layer, **hand_written: NoSparse) -> dict:
    """Returns {name: function} for "frozen", "ours" and each hand-written form of S (hand_written.py)."""
    leaves = [layer.x, layer.lora_A, layer.lora_B, layer.values]
    arguments = *layer.base, *layer.lora, layer.values

    def step(call, *pattern):
        return gradients(lambda: call(*arguments, *pattern), leaves, layer.dy)

    return {
        "frozen": layer.frozen_step(),
        "ours": step(rk.rosa_linear, layer.pattern),
        **{name: step(HandWritten.apply, sparse) for name, sparse in hand_written.items()},
    }
