"""spmm, sddmm and csr_add on their own, forward only, against the ways of naive.py."""

import pytest
import torch

import rosa_kernels as rk
from layers import STEP_SHAPES, Layer
from naive import CSR, Dense

SHAPES = STEP_SHAPES[:2]
STRUCTURES = pytest.mark.parametrize("structure", ["unstructured", "row"])
DTYPES = pytest.mark.parametrize("dtypes", ["fp32", "bf16"])

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@DTYPES
@STRUCTURES
def test_spmm(race, shape, dtypes, structure):
    layer = Layer(shape, dtypes, structure)
    csr, dense = CSR(layer.pattern), Dense(layer.pattern)
    zeros = torch.zeros_like(layer.weight)

    def through_csr():
        y = layer.x.new_zeros(shape.tokens, shape.out_features)
        csr.add_to_y(y, layer.x, layer.values)
        return (y,)

    race(
        {
            "ours": lambda: (rk.spmm(layer.x, layer.values, layer.pattern),),
            "csr": through_csr,
            "dense": lambda: (layer.x @ dense.weight(zeros, layer.values).T,),
        },
        layer.dtype,
    )


@DTYPES
@STRUCTURES
def test_sddmm(race, shape, dtypes, structure):
    layer = Layer(shape, dtypes, structure)
    csr, dense = CSR(layer.pattern), Dense(layer.pattern)
    race(
        {
            "ours": lambda: (rk.sddmm(layer.dy, layer.x, layer.pattern),),
            "csr": lambda: (csr.gradient(layer.dy, layer.x).to(layer.dtype),),
            "dense": lambda: (dense.gradient(layer.dy, layer.x),),
        },
        layer.dtype,
    )


@DTYPES
@STRUCTURES
def test_csr_add(race, shape, dtypes, structure):
    layer = Layer(shape, dtypes, structure)
    dense = Dense(layer.pattern)
    race(
        {
            "ours": lambda: (rk.csr_add(layer.weight, layer.values, layer.pattern),),
            "index_add": lambda: (dense.weight(layer.weight, layer.values),),
        },
        layer.dtype,
    )
