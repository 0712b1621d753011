"""How fast a layer's step is with whole rows in S, and with S alone, over the frozen layer's own two GEMMs."""

import pytest

import rosa_kernels as rk
from hand_written import CSR, Dense, HandWritten, Rows
from interleaved import gradients
from layer_steps import rosa_step
from layers import STEP_SHAPES, Layer

SHAPES = STEP_SHAPES[:2]
SELECTED = SHAPES[:1]


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_row_step(race, shape, dtypes):
    layer = Layer(shape, dtypes, structure="row")
    race(rosa_step(layer, rows=Rows(layer.rows, shape.in_features), dense=Dense(layer.pattern)), layer.dtype)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_sparse_step(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    leaves = [layer.x, layer.values]

    def hand_written(sparse):
        return gradients(
            lambda: HandWritten.apply(*layer.linear, None, None, 1.0, layer.values, sparse), leaves, layer.dy
        )

    race(
        {
            "frozen": layer.frozen_step(),
            "ours": gradients(lambda: rk.sparse_linear(*layer.linear, layer.values, layer.pattern), leaves, layer.dy),
            "csr": hand_written(CSR(layer.pattern)),
            "dense": hand_written(Dense(layer.pattern)),
        },
        layer.dtype,
    )
