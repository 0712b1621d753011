"""How fast a RoSA layer's step is over small, narrow, wide and odd shapes, with few and many tokens."""

import pytest

from hand_written import CSR, Dense
from layer_steps import rosa_step
from layers import Layer, Shape

SHAPES = [
    Shape(out, into, tokens)
    for out, into, tokens in (
        (768, 768, 128), (768, 768, 512), (256, 256, 4096), (128, 128, 4096), (100, 300, 777), (513, 771, 999),
        (1000, 1000, 1000), (1021, 1031, 2053), (1536, 1536, 1024), (2048, 2048, 512), (1024, 4096, 1024),
        (4096, 1024, 1024), (4096, 4096, 256),
    )
]  # fmt: skip
SELECTED = [Shape(768, 768, 512), Shape(513, 771, 999), Shape(2048, 2048, 512)]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_rosa_shape(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    race(rosa_step(layer, csr=CSR(layer.pattern), dense=Dense(layer.pattern)), layer.dtype)
