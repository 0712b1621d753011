"""Calls for the tests of the cost models: a grid of sizes, and what a LinearCase asks of a plan."""

import operator

import torch

from cases import LinearCase, make_inputs
from rosa_kernels.backends.gpu import cost_model


def calls():
    """Sizes, densities and dtypes around every choice of a plan."""
    for tokens in (1, 16, 300, 4096, 32768):
        for N, K in ((64, 64), (768, 768), (3072, 768), (4096, 4096), (4096, 14336)):
            for density in (0.0, 0.001, 0.01, 0.2):
                for element_size, tf32 in ((2, False), (4, False), (4, True)):
                    nnz = round(density * N * K)
                    yield cost_model.LinearCall(tokens, N, K, 16, nnz, 0, element_size, tf32)


def structure_of(case: LinearCase) -> int:
    return 0 if case.pattern is None else make_inputs(case, torch.float32).pattern.structure


def call_of(case: LinearCase, dtype: torch.dtype) -> cost_model.LinearCall:
    """The forward's call, as far as legal ways depend on it."""
    mixed = {
        name: wide is not None and wide != dtype
        for name, wide in (("lora", case.lora_dtype), ("values", case.values_dtype))
    }
    return cost_model.LinearCall(
        case.tokens, case.out_features, case.in_features, case.r, int(case.pattern is not None), structure_of(case),
        dtype.itemsize, base=case.base, dropout="x" if case.dropout_p else "", mixed_lora=mixed["lora"],
        mixed_values=mixed["values"], fp16=dtype == torch.float16,
    )  # fmt: skip


def nearest(ways, wanted):
    """The legal way that shares the most with the wanted one: a backward knows H, transposes rows to columns."""
    return max(ways, key=lambda way: sum(map(operator.eq, way, wanted)))
