"""How fast a layer serves few tokens without gradients, beside hand-written PyTorch and the frozen layer.

A call may take 5 us more than the hand-written one, for the call itself.
"""

import pytest
import torch

import rosa_kernels as rk
from hand_written import CSR, NoSparse, as_multiplied, frozen_forward
from layers import Layer, Shape

SHAPES = [Shape(768, 768, 1), Shape(768, 768, 16), Shape(768, 768, 64), Shape(4096, 4096, 1)]
SELECTED = [SHAPES[0], SHAPES[1], SHAPES[3]]
CALL_SECONDS = 5e-6

pytestmark = pytest.mark.usefixtures("no_grad")


def forward(layer, sparse, values):
    """The forward of hand_written.HandWritten without the cost of a Function."""
    A, B, scaling = layer.lora
    x, W, b, A, B, values = as_multiplied(*layer.linear, A, B, values, backward=False)
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
            "frozen": lambda: (frozen_forward(*layer.linear),),
            "ours": lambda: (rk.rosa_linear(*layer.linear, *layer.lora, layer.values, layer.pattern),),
            "csr": lambda: forward(layer, csr, layer.values),
        },
        layer.dtype,
        allowance=CALL_SECONDS,
    )


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_lora_few_tokens(race, shape, dtypes):
    layer = Layer(shape, dtypes)
    nothing = NoSparse()
    race(
        {
            "frozen": lambda: (frozen_forward(*layer.linear),),
            "ours": lambda: (rk.lora_linear(*layer.linear, *layer.lora),),
            "addmm": lambda: forward(layer, nothing, None),
        },
        layer.dtype,
        allowance=CALL_SECONDS,
    )
