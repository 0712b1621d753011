"""How fast spmm, sddmm and csr_add are on their own, forward only, beside hand-written PyTorch."""

import pytest
import torch

import hand_written
import rosa_kernels as rk
from hand_written import CSR, Dense
from layers import STEP_SHAPES, Layer

SHAPES = STEP_SHAPES[:2]
SELECTED = SHAPES[:1]
STRUCTURES = pytest.mark.parametrize("structure", ["unstructured", "row"])
DTYPES = pytest.mark.parametrize("dtypes", ["fp32", "bf16"])

pytestmark = pytest.mark.usefixtures("no_grad")


@DTYPES
@STRUCTURES
def test_spmm(race, shape, dtypes, structure):
    layer = Layer(shape, dtypes, structure)
    csr, dense = CSR(layer.pattern), Dense(layer.pattern)
    zeros = torch.zeros_like(layer.weight)
    race(
        {
            "ours": lambda: (rk.spmm(layer.x, layer.values, layer.pattern),),
            "csr": lambda: (hand_written.spmm(layer.x, layer.values, csr, shape.out_features),),
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
