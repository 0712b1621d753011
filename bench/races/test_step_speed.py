"""How fast the step of a RoSA and a LoRA layer is, forward and backward, over the frozen layer's own two GEMMs."""

import pytest

import rosa_kernels as rk
from hand_written import CSR, Dense, HandWritten, NoSparse, bf16_is_slow, lora_as_peft
from interleaved import gradients
from layers import STEP_SHAPES, Layer
from rosa_step import rosa_step

SHAPES = STEP_SHAPES
SELECTED = SHAPES[:1]
DTYPES = pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-fp32"])
GOALS = {
    ("fp32", STEP_SHAPES[0]): 1.10,
    ("fp32", STEP_SHAPES[1]): 1.08,
    ("fp32", STEP_SHAPES[2]): 1.08,
    ("bf16", STEP_SHAPES[0]): 1.6,
    ("bf16", STEP_SHAPES[1]): 1.4,
    ("bf16", STEP_SHAPES[2]): 1.2,
}
LORA_GOALS = {("fp32", STEP_SHAPES[0]): 1.07, ("bf16", STEP_SHAPES[0]): 1.4}


@DTYPES
def test_rosa_step(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    race(
        rosa_step(layer, csr=CSR(layer.pattern), dense=Dense(layer.pattern)),
        layer.dtype,
        goal=GOALS.get((dtypes, shape)),
    )


@DTYPES
def test_lora_step(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    leaves = [layer.x, layer.lora_A, layer.lora_B]
    peft = {}
    if dtypes == "fp32" or not bf16_is_slow(shape.tokens):  # slow bf16 GEMMs would take a minute
        peft["peft"] = gradients(lambda: lora_as_peft(*layer.base, *layer.lora), leaves, layer.dy)
    race(
        {
            "frozen": layer.frozen_step(),
            "ours": gradients(lambda: rk.lora_linear(*layer.base, *layer.lora), leaves, layer.dy),
            **peft,
            "addmm": gradients(lambda: HandWritten.apply(*layer.base, *layer.lora, None, NoSparse()), leaves, layer.dy),
        },
        layer.dtype,
        goal=LORA_GOALS.get((dtypes, shape)),
    )
