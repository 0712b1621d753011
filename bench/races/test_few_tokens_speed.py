"""Serving: few tokens, no gradient; at one token a call may take 5 us more than the naive way."""

import pytest
import torch

import rosa_kernels as rk
from layers import Layer, Shape
from naive import CSR, NoSparse, as_multiplied, frozen_forward

SHAPES = [Shape(768, 768, 1), Shape(768, 768, 16), Shape(768, 768, 64), Shape(4096, 4096, 1)]
CALL_OVERHEAD_SECONDS = 5e-6

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def forward(layer, sparse, values):
    """naive.HandWritten's forward, without the cost of a Function."""
    A, B, scaling = layer.lora
    x, W, b, A, B, values = as_multiplied(*layer.base, A, B, values, backward=False)
    y = torch.nn.functional.linear(x, W, b)
    y.addmm_(x @ A.T, B.T, alpha=scaling)
    sparse.add_to_y(y, x, values)
    return (y.to(layer.dtype),)


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_rosa_few_tokens(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    csr = CSR(layer.pattern)
    race(
        {
            "frozen": lambda: (frozen_forward(*layer.base),),
            "ours": lambda: (rk.rosa_linear(*layer.base, *layer.lora, layer.values, layer.pattern),),
            "csr": lambda: forward(layer, csr, layer.values),
        },
        layer.dtype,
        allowance=CALL_OVERHEAD_SECONDS,
    )


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_lora_few_tokens(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    nothing = NoSparse()
    race(
        {
            "frozen": lambda: (frozen_forward(*layer.base),),
            "ours": lambda: (rk.lora_linear(*layer.base, *layer.lora),),
            "addmm": lambda: forward(layer, nothing, None),
        },
        layer.dtype,
        allowance=CALL_OVERHEAD_SECONDS,
    )
