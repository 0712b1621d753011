"""The whole layer step of RoSA and of LoRA, forward and backward, over the frozen layer's own two GEMMs."""

import pytest

import rosa_kernels as rk
from interleaved import gradients
from layers import STEP_SHAPES, Layer
from naive import CSR, Dense, HandWritten, NoSparse, as_multiplied, lora_as_peft
from rosa_step import rosa_step

SHAPES = STEP_SHAPES
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

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


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
    if as_multiplied(layer.x)[0].dtype == layer.dtype:  # elsewhere its bf16 GEMMs take a minute
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
