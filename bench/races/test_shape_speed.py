"""The layer step of RoSA over other shapes than the design's: small, narrow, wide and odd ones, few and many tokens."""

import pytest

from layers import Layer, Shape
from naive import CSR, Dense
from rosa_step import rosa_step

SHAPES = [
    Shape(out, into, tokens)
    for out, into, tokens in (
        (768, 768, 128), (768, 768, 512), (256, 256, 4096), (128, 128, 4096), (100, 300, 777), (513, 771, 999),
        (1000, 1000, 1000), (1021, 1031, 2053), (1536, 1536, 1024), (2048, 2048, 512), (1024, 4096, 1024),
        (4096, 1024, 1024), (4096, 4096, 256),
    )
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_rosa_shape(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    race(rosa_step(layer, csr=CSR(layer.pattern), dense=Dense(layer.pattern)), layer.dtype)
