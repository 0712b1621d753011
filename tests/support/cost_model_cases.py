"""Calls for the tests of the cost models: a grid of sizes, and the call that a LinearCase makes."""

import operator

import torch

from cases import LinearCase, make_inputs
from rosa_kernels.backends.gpu import cost_model


def calls():
    """Sizes, densities and dtypes around every choice of the heuristics."""
    for T in (1, 16, 300, 4096, 32768):
        for out_features, in_features in ((64, 64), (768, 768), (3072, 768), (4096, 4096), (4096, 14336)):
            for density in (0.0, 0.001, 0.01, 0.2):
                for element_size, tf32 in ((2, False), (4, False), (4, True)):
                    nnz = round(density * out_features * in_features)
                    yield cost_model.LinearCall(T, out_features, in_features, 16, nnz, 0, element_size, tf32)


def structure_of(case: LinearCase) -> int:
    return 0 if case.pattern is None else make_inputs(case, torch.float32).pattern.structure


def call_of(case: LinearCase, dtype: torch.dtype) -> cost_model.LinearCall:
    """The forward's call, as far as the list of algorithms depends on it."""
    mixed = {
        name: wide is not None and wide != dtype
        for name, wide in (("lora", case.lora_dtype), ("values", case.values_dtype))
    }
    return cost_model.LinearCall(
        case.tokens, case.out_features, case.in_features, case.r, int(case.pattern is not None), structure_of(case),
        dtype.itemsize, has_base=case.base, dropout="x" if case.dropout_p else "", mixed_lora=mixed["lora"],
        mixed_values=mixed["values"], fp16=dtype == torch.float16,
    )  # fmt: skip


def nearest(algorithms, wanted):
    """The one that shares the most with the wanted one: a backward knows H, and has columns where a forward has rows."""
    return max(algorithms, key=lambda algorithm: sum(map(operator.eq, algorithm, wanted)))
