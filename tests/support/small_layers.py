"""Adapter layers of every kind, small and with numbers in them, for the tests of layers and of merging."""

import torch
from torch import nn

import rosa_kernels as rk

OUT, IN, R, ALPHA = 24, 40, 3, 6.0


def pattern_of(structure="unstructured"):
    return {
        "unstructured": lambda: rk.CSRPattern.random((OUT, IN), 0.1, seed=1),
        "row": lambda: rk.CSRPattern.from_rows(torch.tensor([2, 17]), (OUT, IN)),
        "column": lambda: rk.CSRPattern.from_columns(torch.tensor([0, 39]), (OUT, IN)),
        "empty": lambda: rk.CSRPattern.from_mask(torch.zeros(OUT, IN, dtype=torch.bool)),
    }[structure]()


LAYERS = {
    "lora": lambda base: rk.nn.LoRALinear(base, R, ALPHA),
    "rosa": lambda base: rk.nn.RoSALinear(base, R, ALPHA, pattern=pattern_of()),
    "rosa-rows": lambda base: rk.nn.RoSALinear(base, R, ALPHA, pattern=pattern_of("row")),
    "rosa-unselected": lambda base: rk.nn.RoSALinear(base, R, ALPHA, density=0.1),
    "sparse": lambda base: rk.nn.RoSALinear(base, 0, ALPHA, pattern=pattern_of()),
    "sparse-columns": lambda base: rk.nn.RoSALinear(base, 0, ALPHA, pattern=pattern_of("column")),
    "sparse-empty": lambda base: rk.nn.RoSALinear(base, 0, ALPHA, pattern=pattern_of("empty")),
}


def make_base(dtype=torch.float32, bias=True):
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def randomise(model, std=0.1):
    """Give every adapter entry, and whatever else trains, a value that training might have given it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return model


def trained_layer(kind="rosa", dtype=torch.float32, bias=True):
    return randomise(LAYERS[kind](make_base(dtype, bias)))
