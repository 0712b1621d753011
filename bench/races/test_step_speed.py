"""How fast the step of a RoSA and a LoRA layer is, forward and backward, over the frozen layer's own two GEMMs."""

import pytest

from hand_written import CSR, Dense, bf16_is_slow
from layer_steps import lora_step, rosa_step
from layers import STEP_SHAPES, Layer

SHAPES = STEP_SHAPES
SELECTED = SHAPES[:1]
DTYPES = pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16-fp32"])


@DTYPES
def test_rosa_step(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    race(rosa_step(layer, csr=CSR(layer.pattern), dense=Dense(layer.pattern)), layer.dtype)


@DTYPES
def test_lora_step(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    candidates = lora_step(layer)
    if dtypes != "fp32" and bf16_is_slow(shape.tokens):
        del candidates["peft"]  # its bf16 GEMMs would take a minute
    race(candidates, layer.dtype)
