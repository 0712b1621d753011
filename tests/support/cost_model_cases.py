"""What the tests of both GPU backends' algorithms share: calls, an algorithm forced on a call, checks of heuristics."""

import operator

import pytest
import torch

import rosa_kernels as rk
from cases import LinearCase, make_inputs
from linear_checks import SEED, linear, mask_of, run_linear
from oracle import check, expected_linear
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
    """The one that shares the most with the wanted one: a backward knows H, and has columns where a forward has
    rows."""
    return max(algorithms, key=lambda algorithm: sum(map(operator.eq, algorithm, wanted)))


def by_algorithm(cases, dtypes, algorithms) -> list:
    """Parameters (case, dtype, algorithm): each case in each dtype by all of algorithms(call)."""
    return [
        pytest.param(case, dtype, listed, id=f"{case.id}-{str(dtype)[6:]}-{'-'.join(filter(None, listed)) or 'zeros'}")
        for case in cases
        for dtype in dtypes
        for listed in algorithms(call_of(case, dtype))
    ]


def force(monkeypatch, heuristics, algorithms, wanted) -> list:
    """Makes the heuristics choose the nearest to `wanted` of algorithms(call); returns the list of what they choose."""
    chosen = []

    def choose(call, rates):
        chosen.append(nearest(algorithms(call), wanted))
        return chosen[-1]

    monkeypatch.setattr(heuristics, "choose_linear", choose)
    return chosen


def check_call(backend: str, case: LinearCase, inputs, delta_rounded: bool = False) -> None:
    """y and all gradients of the case by this backend."""
    with rk.use_backend(backend):
        got = run_linear(case, inputs)
    expected = expected_linear(case, inputs, mask_of(case, inputs.x.device), delta_rounded, adapter_first=True)
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))


def check_by_algorithm(monkeypatch, backend: str, heuristics, algorithms, case: LinearCase, dtype, algorithm) -> None:
    """y by this algorithm; then y and the gradients, as a training step makes them, by the nearest to it.

    A step keeps H, so that nothing may make it anew for each tile of y.
    """
    chosen, inputs = force(monkeypatch, heuristics, algorithms, algorithm), make_inputs(case, dtype)
    delta_rounded = algorithm.sparse in ("delta", "rows", "columns")
    mask = mask_of(case, inputs.x.device)
    expected = expected_linear(case, inputs, mask, delta_rounded, adapter_first=True)["y"]
    with rk.use_backend(backend), torch.no_grad():
        torch.manual_seed(SEED)
        check("y", linear(case, inputs, inputs.tensors()), expected, inputs.x)
    check_call(backend, case, inputs, delta_rounded)
    assert chosen[0] == algorithm and len(chosen) >= 2


def check_cheapest_is_chosen(heuristics, algorithms, rates) -> None:
    for call in calls():
        chosen = heuristics.choose_linear(call, rates)
        seconds = {listed: heuristics.linear_seconds(call, listed, rates) for listed in algorithms(call)}
        assert chosen in seconds and seconds[chosen] == min(seconds.values())
        assert all(0 < s < 10 for s in seconds.values())


def check_merged_in_fp32_alone(algorithms) -> None:
    for call in calls():
        merged = any(listed.base == "merged" for listed in algorithms(call))
        assert merged == (call.element_size == 4 and not call.tf32)
    dropped = cost_model.LinearCall(9, 8, 8, 4, element_size=4, dropout="x")
    assert not any(listed.base == "merged" for listed in algorithms(dropped))
