"""How much time and peak memory a train step of the review classifier takes, with this package and in other forms.

A step is forward, loss, backward, clipping and AdamW. The candidates are explained in model_steps.py.
"""

from dataclasses import replace

import pytest

from hand_written import bf16_is_slow
from interleaved import aligned
from model_steps import AMAZON, MODES, WIDE, ModelShape, peft, train_steps
from peak_memory import PeakMemory

SHAPES = [AMAZON, WIDE]
SELECTED = [AMAZON]
BF16_GOAL = {"rosa": 1 / 1.5}  # of the best other candidate's time
FEW_TOKENS = {"amazon": 1280, "wide": 32}  # where PyTorch's bf16 GEMMs take 100 times as long as those of fp32


class ModelTable:
    """Prints its rows when the session ends."""

    def __init__(self):
        self.rows = [("model", "tokens", "adapter", "dtype", "candidate", "ms a step", "over ours", "peak MB")]

    def add(self, case: tuple, seconds: dict[str, dict], megabytes: dict[str, float]) -> None:
        for candidate, figures in seconds.items():
            quartile = figures["lower_quartile"]
            over_ours = quartile / seconds["ours"]["lower_quartile"]
            peak = f"{megabytes[candidate]:.0f}" if candidate in megabytes else ""
            self.rows.append((*case, candidate, f"{quartile * 1e3:.0f}", f"{over_ours:.2f}", peak))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("a train step of the classifier")
        terminalreporter.write_line(aligned(self.rows))
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


def _affordable(shape: ModelShape, mode: str, untimed: bool) -> ModelShape:
    few = untimed or (mode != "fp32" and bf16_is_slow(shape.tokens))
    return replace(shape, tokens=min(shape.tokens, FEW_TOKENS[shape.name])) if few else shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["rosa", "lora"])
def test_model_step(race, benchmark, model_table, peak_memory, shape, adapter, mode):
    shape = _affordable(shape, mode, benchmark.disabled)
    candidates = train_steps(adapter, mode, shape)
    measured = ["ours"] if benchmark.disabled else candidates  # one is enough to see that the measurement runs
    megabytes = {name: peak_memory.megabytes(candidates[name]) for name in measured}
    benchmark.extra_info.update(tokens=shape.tokens, peak_megabytes=megabytes)
    try:
        race(candidates, MODES[mode], goal=None if mode == "fp32" else BF16_GOAL.get(adapter))
    finally:
        case = shape.name, str(shape.tokens), adapter, mode
        model_table.add(case, benchmark.extra_info.get("seconds", {}), megabytes)
