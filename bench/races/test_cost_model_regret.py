"""How much time the CPU's cost model loses where it does not choose the fastest algorithm.

The algorithm that it chooses for y and for the gradients is raced against every other legal one, over shapes, tokens
and densities. Ours is slower where the choice takes more than NOISE (interleaved.py) above the best.
"""

import statistics

import pytest
import torch

import rosa_kernels as rk
from layers import DTYPES, Layer, Shape
from rosa_kernels.backends.cpu import heuristics
from rosa_kernels.backends.cpu import ops as cpu_ops

TOKENS = (16, 128, 512, 2048)
SHAPES = [Shape(out, into, t) for out, into in ((768, 768), (3072, 768), (2048, 2048)) for t in TOKENS]
SELECTED = [Shape(768, 768, 16), Shape(768, 768, 512), Shape(3072, 768, 128)]
SECONDS = 0.4  # a race
_ops = torch.ops.rosa_kernels

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)


@pytest.fixture(scope="session")
def regrets(closing_sections):
    """{test: the chosen algorithm's time over the best one's}, of which a line is printed when the session ends."""
    ratios = {}

    def summary():
        worst = max(ratios, key=ratios.get)
        return (
            f"the chosen algorithm takes {statistics.mean(ratios.values()):.3f} of the best one's time in the mean "
            f"over {len(ratios)} calls, at worst {ratios[worst]:.3f}: {worst}"
        )

    closing_sections["regret of the CPU's cost model"] = lambda: summary() if ratios else "nothing was raced"
    return ratios


def forced(algorithm, function):
    """The function with one algorithm in place of every choice of the cost model."""

    def run():
        chosen = heuristics.forward_algorithm, heuristics.dx_algorithm
        heuristics.forward_algorithm = heuristics.dx_algorithm = lambda *call: algorithm
        try:
            return function()
        finally:
            heuristics.forward_algorithm, heuristics.dx_algorithm = chosen

    return run


def passes(layer: Layer, with_sparse: bool) -> dict:
    """Returns {name: (legal algorithms, the choice among them, function)} for y and for the gradients."""
    pattern = layer.pattern if with_sparse else None
    values = layer.values.detach() if with_sparse else None
    crow, col = (pattern.crow_indices, pattern.col_indices) if with_sparse else (None, None)
    transposed = pattern.transpose() if with_sparse else (None, None, None)
    x, W, b, dy = layer.x.detach(), layer.weight, layer.bias, layer.dy
    A, B, scaling = layer.lora_A.detach(), layer.lora_B.detach(), layer.lora[2]
    structure = pattern.structure if with_sparse else 0
    needs = [True, False, False, True, True, with_sparse]
    slow_bf16 = layer.dtype == torch.bfloat16 and not cpu_ops.fast_bfloat16()
    found = {}
    for name, of, widened, choose, function in (
        ("y", x, heuristics.widens(x, cpu_ops.fast_bfloat16()), heuristics.forward_algorithm,
         lambda: (_ops.rosa_linear(x, W, b, A, B, scaling, values, crow, col, structure, 0.0, None),)),
        ("gradients", dy, slow_bf16, heuristics.dx_algorithm,
         lambda: _ops.rosa_linear_backward(
             dy, x, W, A, B, scaling, values, crow, col, *transposed, structure, 0.0, None, needs)),
    ):  # fmt: skip
        legal = heuristics.legal_algorithms(of, W, A, B, values, None, widened, cpu_ops.uses_our_gemm(of.dtype))
        choice = choose(of, W, A, B, values, structure, None, widened, cpu_ops.uses_our_gemm(of.dtype))
        found[name] = legal, choice, function
    return found


@pytest.mark.parametrize("result", ["y", "gradients"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_cost_model_regret(request, race, benchmark, regrets, shape, dtypes, density, result):
    layer = Layer(shape, dtypes, density=density or 0.01)
    legal, choice, function = passes(layer, density > 0)[result]
    others = {algorithm.name.lower(): forced(algorithm, function) for algorithm in legal if algorithm is not choice}
    if not others:
        pytest.skip(f"{choice.name} is the only legal algorithm for {DTYPES[dtypes][0]} here")
    try:
        race({"ours": function, **others}, layer.dtype, seconds=SECONDS)
    finally:
        regrets[request.node.name] = max(1.0, benchmark.extra_info.get("ratio", 1.0))
