"""A whole train step of the review classifier (forward, loss, backward, clipping, AdamW) in every way: time and peak memory."""

import functools
from dataclasses import replace

import pytest
import torch

from interleaved import WallClock
from model_steps import AMAZON, MODES, WIDE, ModelShape, peft, ways
from peak_memory import PeakMemory

SHAPES = [AMAZON, WIDE]
BF16_GOAL = {"rosa": 1 / 1.5}  # of the best other way's time
FEW_TOKENS = {"amazon": 1280, "wide": 32}  # where PyTorch's bf16 GEMMs take 100 times as long as those of fp32

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


class ModelTable:
    """Prints its rows when the session ends."""

    def __init__(self):
        self.rows = [("model", "tokens", "adapter", "dtype", "way", "ms a step", "over ours", "peak MB")]

    def add(self, case: tuple, seconds: dict[str, dict], megabytes: dict[str, float]) -> None:
        for way, figures in seconds.items():
            quartile = figures["lower_quartile"]
            over_ours = quartile / seconds["ours"]["lower_quartile"]
            peak = f"{megabytes[way]:.0f}" if way in megabytes else ""
            self.rows.append((*case, way, f"{quartile * 1e3:.0f}", f"{over_ours:.2f}", peak))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("a train step of the classifier")
        widths = [max(map(len, column)) for column in zip(*self.rows)]
        for row in self.rows:
            terminalreporter.write_line("  ".join(map(str.ljust, row, widths)).rstrip())
        if peft is None:
            terminalreporter.write_line("peft left out: not installed")


@pytest.fixture(scope="session")
def model_table(request):
    table = ModelTable()
    request.config.pluginmanager.register(table)
    return table


@pytest.fixture(scope="session")
def peak_memory():
    with PeakMemory() as measuring:
        yield measuring


@functools.cache
def _bf16_is_slow() -> bool:
    """A CPU without instructions for bf16: PyTorch's GEMM takes over 4 times that of fp32."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        return min(WallClock()(lambda: a @ a, 1) for _ in range(3))

    return seconds(torch.bfloat16) > 4 * seconds(torch.float32)


def _affordable(shape: ModelShape, mode: str, untimed: bool) -> ModelShape:
    few = untimed or (mode != "fp32" and _bf16_is_slow())
    return replace(shape, tokens=min(shape.tokens, FEW_TOKENS[shape.name])) if few else shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["rosa", "lora"])
def test_model_step(race, benchmark, model_table, peak_memory, shape, adapter, mode):
    shape = _affordable(shape, mode, benchmark.disabled)
    found = ways(adapter, mode, shape)
    measured = ["ours"] if benchmark.disabled else found  # to see that it runs
    megabytes = {name: peak_memory.megabytes(found[name]) for name in measured}
    benchmark.extra_info.update(tokens=shape.tokens, peak_megabytes=megabytes)
    try:
        race(found, MODES[mode], goal=None if mode == "fp32" else BF16_GOAL.get(adapter))
    finally:
        case = shape.name, str(shape.tokens), adapter, mode
        model_table.add(case, benchmark.extra_info.get("seconds", {}), megabytes)
