"""The candidates of a race of a RoSA or a LoRA layer's whole step, forward and backward."""

import rosa_kernels as rk
from hand_written import HandWritten, NoSparse, lora_as_peft
from interleaved import gradients
from layers import Layer


def rosa_step(layer: Layer, **hand_written: NoSparse) -> dict:
    """Returns {name: function} for "frozen", "ours" and each hand-written form of S (hand_written.py)."""
    leaves = [layer.x, layer.lora_A, layer.lora_B, layer.values]
    arguments = *layer.linear, *layer.lora, layer.values

    def step(call, *pattern):
        return gradients(lambda: call(*arguments, *pattern), leaves, layer.dy)

    return {
        "frozen": layer.frozen_step(),
        "ours": step(rk.rosa_linear, layer.pattern),
        **{name: step(HandWritten.apply, sparse) for name, sparse in hand_written.items()},
    }


def lora_step(layer: Layer) -> dict:
    """Returns {name: function} for "frozen", "ours", "peft" and "addmm"."""
    leaves = [layer.x, layer.lora_A, layer.lora_B]

    def step(call, *sparse):
        return gradients(lambda: call(*layer.linear, *layer.lora, *sparse), leaves, layer.dy)

    return {
        "frozen": layer.frozen_step(),
        "ours": step(rk.lora_linear),
        "peft": step(lora_as_peft),
        "addmm": step(HandWritten.apply, None, NoSparse()),
    }
