"""Timing candidates against each other: in turn within each round, so that a slow spell of the machine meets all of them.

A candidate's figure is the lower quartile of its rounds: what it takes when nothing else runs, without trusting the one
luckiest round. The verdict is SLOWER where both the lower quartile and the minimum of "ours" exceed those
of the best naive candidate by more than NOISE (and an allowance in seconds, where the case has one), or where the
ratio to "frozen" is more than DRIFT above an earlier run's. A race whose lower quartile is beyond DISTURBED times the
minimum, for any candidate, is marked as noisy: other processes took the cores, repeat it on a quiet machine.
A naive way that takes over HOPELESS times ours, and over HOPELESS_SECONDS, is timed once: no round could change the verdict.
Candidates named in `unjudged` are timed and shown, marked with a star, but ours may lose to them: their result is
another one.
"""

import json
import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import torch

NOISE = 1.05
DRIFT = 1.10
DISTURBED = 1.5
HOPELESS, HOPELESS_SECONDS = 5.0, 0.2
_MIN_ROUNDS, _MAX_ROUNDS = 4, 40
_OURS, _FROZEN = "ours", "frozen"


class Timer(Protocol):
    min_sample_seconds: float
    """A round calls a candidate so often that its calls take at least this."""

    def __call__(self, function: Callable, calls: int) -> float:
        """The seconds that all those calls took."""


class WallClock(Timer):
    """By the CPU's clock."""

    min_sample_seconds = 2e-3

    def __call__(self, function: Callable, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start


class Race:
    """The rounds of one benchmark."""

    def __init__(
        self,
        name: str,
        candidates: dict[str, Callable],
        goal: float | None = None,
        allowance: float = 0.0,
        unjudged: Collection[str] = (),
        timer: Timer | None = None,
    ):
        self.name = name
        self.candidates = candidates
        self.goal = goal
        self.allowance = allowance
        self.unjudged = unjudged
        self.timer = timer or WallClock()
        self.seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}  # a call, by round
        self.verdict = ""

    @property
    def naive(self) -> list[str]:
        return [name for name in self.seconds if name not in (_OURS, _FROZEN)]

    def run(self, benchmark, seconds: float) -> None:
        """Agree on the numbers, which warms up too, then about `seconds` of rounds.

        pytest-benchmark times ours, its setup the others. The candidates, and the tensors that they hold, are let go at the end.
        """
        self._check_same_results()
        one_call = {name: self.timer(function, 1) for name, function in self.candidates.items()}
        calls = {name: max(1, round(self.timer.min_sample_seconds / t)) for name, t in one_call.items()}
        hopeless = self._hopeless(one_call)
        for name in hopeless:
            self.seconds[name].append(one_call[name])
        others = [name for name in self.candidates if name != _OURS and name not in hopeless]
        round_seconds = sum(calls[name] * one_call[name] for name in (_OURS, *others))
        rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, round(seconds / round_seconds)))

        def measure(name):
            self.seconds[name].append(self.timer(self.candidates[name], calls[name]) / calls[name])

        def time_the_others():
            turn = len(self.seconds[_OURS]) % max(1, len(others))
            for name in others[turn:] + others[:turn]:
                measure(name)

        benchmark.extra_info["calls_a_round"] = calls[_OURS]
        benchmark.pedantic(lambda: measure(_OURS), setup=time_the_others, rounds=rounds)
        self.candidates = {}

    def _hopeless(self, one_call: dict[str, float]) -> list[str]:
        limit = max(HOPELESS * one_call[_OURS], HOPELESS_SECONDS)
        return [name for name in self.naive if one_call[name] > limit]

    def _check_same_results(self) -> None:
        """A race between different results says nothing. The tolerance is that of bf16, rounded by every naive way."""
        ours = self.candidates[_OURS]()
        if _FROZEN in self.candidates:
            self.candidates[_FROZEN]()
        for name in self.naive:
            for index, (got, expected) in enumerate(zip(self.candidates[name](), ours, strict=True)):
                error = float((got.float() - expected.float()).norm() / (expected.float().norm() + 1e-30))
                assert error < 2e-2, f"{self.name}: result {index} of {name!r} differs from ours by {error:.2g}"

    def lower_quartile(self, name: str) -> float:
        samples = self.seconds[name]
        return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]

    def best_naive(self) -> str:
        return min((name for name in self.naive if name not in self.unjudged), key=self.lower_quartile)

    def ratio(self) -> float:
        """Ours over frozen, or over the best naive way where there is no frozen layer to compare with."""
        return self.lower_quartile(_OURS) / self.lower_quartile(
            _FROZEN if _FROZEN in self.seconds else self.best_naive()
        )

    def noisy(self) -> bool:
        return any(self.lower_quartile(name) > DISTURBED * min(self.seconds[name]) for name in self.seconds)

    def judge(self, earlier_ratio: float | None = None) -> str:
        """ "ok", "noisy" or "SLOWER ...", by the rules at the top of this file."""
        best = self.best_naive()
        if all(
            figure(_OURS) > NOISE * figure(best) + self.allowance
            for figure in (self.lower_quartile, lambda name: min(self.seconds[name]))
        ):
            return f"SLOWER than {best}: {self.lower_quartile(_OURS) / self.lower_quartile(best):.2f}x"
        if earlier_ratio is not None and self.ratio() > DRIFT * earlier_ratio:
            return f"SLOWER than before: ratio {self.ratio():.2f}, was {earlier_ratio:.2f}"
        return "noisy" if self.noisy() else "ok"

    def summary(self) -> dict:
        """For the JSON file."""
        return {
            "ratio": self.ratio(),
            "goal": self.goal,
            "verdict": self.verdict,
            "seconds": {
                name: {
                    "min": min(samples),
                    "lower_quartile": self.lower_quartile(name),
                    "median": statistics.median(samples),
                }
                for name, samples in self.seconds.items()
            },
        }


def table(races: list[Race]) -> str:
    """One line a race: what frozen (or the best naive way) takes, everything over it, ours over the best naive way."""
    rows = [("benchmark", "base", "ours", "to reach", "naive ways", "ours / best naive", "verdict")]
    for race in races:
        base = _FROZEN if _FROZEN in race.seconds else race.best_naive()
        unit = race.lower_quartile(base)
        naive = "  ".join(
            f"{name}{'*' if name in race.unjudged else ''} {race.lower_quartile(name) / unit:.2f}"
            for name in race.naive
        )
        rows.append(
            (
                race.name,
                f"{base} {_duration(unit)}",
                f"{race.lower_quartile(_OURS) / unit:.2f}",
                "" if race.goal is None else f"{race.goal:.2f}",
                naive,
                f"{race.lower_quartile(_OURS) / race.lower_quartile(race.best_naive()):.2f}",
                race.verdict,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def gradients(function: Callable, leaves: list[torch.Tensor], dy: torch.Tensor) -> Callable:
    """A whole step: function() forward and the gradients of leaves; returns (y, *gradients)."""

    def step():
        y = function()
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return step


def earlier_ratios_of(path: Path | None) -> dict[str, float]:
    """{test: ratio} of a --benchmark-json file; {} without a file."""
    if path is None:
        return {}
    races = json.loads(path.read_text())["benchmarks"]
    return {race["fullname"]: race["extra_info"]["ratio"] for race in races}
