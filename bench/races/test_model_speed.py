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
FEW_TOKENS = {"amazon": 1280, "wide": 32}  # where PyTorch's bf16 GEMMs take 100 times as long as those of fp32


@pytest.fixture(scope="session")
def model_rows(closing_sections):
    """The rows of the table that is printed when the session ends."""
    rows = [("model", "tokens", "adapter", "dtype", "candidate", "ms a step", "over ours", "peak MB")]
    missing = "" if peft else "\npeft left out: not installed"
    closing_sections["a train step of the classifier"] = lambda: aligned(rows) + missing
    return rows


@pytest.fixture(scope="session")
def peak_memory():
    with PeakMemory() as measuring:
        yield measuring


def _affordable(shape: ModelShape, mode: str, untimed: bool) -> ModelShape:
    few = untimed or (mode != "fp32" and bf16_is_slow(shape.tokens))
    return replace(shape, tokens=min(shape.tokens, FEW_TOKENS[shape.name])) if few else shape


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["rosa", "lora"])
def test_model_step(race, benchmark, model_rows, peak_memory, shape, adapter, mode):
    shape = _affordable(shape, mode, benchmark.disabled)
    candidates = train_steps(adapter, mode, shape)
    measured = ["ours"] if benchmark.disabled else candidates  # one is enough to see that the measurement runs
    megabytes = {name: peak_memory.megabytes(candidates[name]) for name in measured}
    benchmark.extra_info.update(tokens=shape.tokens, peak_megabytes=megabytes)
    try:
        race(candidates, MODES[mode])
    finally:
        quartiles = {name: times["lower_quartile"] for name, times in benchmark.extra_info.get("seconds", {}).items()}
        for name, seconds in quartiles.items():
            peak = f"{megabytes[name]:.0f}" if name in megabytes else ""
            figures = f"{seconds * 1e3:.0f}", f"{seconds / quartiles['ours']:.2f}", peak
            model_rows.append((shape.name, str(shape.tokens), adapter, mode, name, *figures))
