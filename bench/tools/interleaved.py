"""A race times candidates against each other, in turn within each round: a slow spell of the machine meets all of them.

A candidate's figure is the lower quartile of its rounds. This is what it takes when nothing else runs, and it does not
trust the one luckiest round.

"ours" is SLOWER where both its lower quartile and its minimum exceed those of the best other candidate by more than
NOISE, and by more than an allowance in seconds where the race has one. It is also SLOWER where its ratio to "frozen" is
more than DRIFT above that of an earlier run. "frozen", the frozen layer's own GEMMs, is never among the others.

A race is noisy where the lower quartile of any candidate exceeds DISTURBED times its minimum: other processes took the
cores, and the race should be repeated on a quiet machine.

A candidate that takes over HOPELESS times as long as ours, and over HOPELESS_SECONDS, is timed once: no further round
could change the verdict. Candidates named in `unjudged` compute another result than ours. They are timed and shown with
a star, and ours may lose to them.
"""

import json
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
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
    """A round repeats a candidate until its calls take at least this long."""

    def __call__(self, function: Callable, calls: int) -> float:
        """Returns the seconds that all those calls took."""


class WallClock(Timer):
    """Times with the CPU's clock."""

    min_sample_seconds = 2e-3

    def __call__(self, function: Callable, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start


def calls_a_round(timer: Timer, seconds: dict[str, float]) -> dict[str, int]:
    """How often a round calls each candidate that takes so many seconds a call."""
    return {name: max(1, round(timer.min_sample_seconds / time)) for name, time in seconds.items()}


def lower_quartile(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]


@dataclass
class Race:
    """The rounds of one benchmark. seconds holds each candidate's time a call, round by round."""

    name: str
    candidates: dict[str, Callable]
    allowance: float = 0.0
    unjudged: Collection[str] = ()
    timer: Timer = field(default_factory=WallClock)
    verdict: str = ""

    def __post_init__(self):
        self.seconds: dict[str, list[float]] = {candidate: [] for candidate in self.candidates}

    @property
    def others(self) -> list[str]:
        return [name for name in self.seconds if name not in (_OURS, _FROZEN)]

    @property
    def is_slower(self) -> bool:
        return self.verdict.startswith("SLOWER")

    def run(self, benchmark, seconds: float) -> None:
        """Checks that all results agree, which also warms up, then runs rounds for about `seconds`.

        pytest-benchmark calls ours as its target and the others as its setup. At the end the race drops the candidates,
        because they hold tensors.
        """
        self._check_same_results()
        one_call = {name: self.timer(function, 1) for name, function in self.candidates.items()}
        calls = calls_a_round(self.timer, one_call)
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
        return [name for name in self.others if one_call[name] > limit]

    def _check_same_results(self) -> None:
        """A race between different results says nothing. The tolerance allows every candidate its roundings to bf16."""
        ours = self.candidates[_OURS]()
        if _FROZEN in self.candidates:
            self.candidates[_FROZEN]()
        for name in self.others:
            for index, (got, expected) in enumerate(zip(self.candidates[name](), ours, strict=True)):
                error = float((got.float() - expected.float()).norm() / (expected.float().norm() + 1e-30))
                assert error < 2e-2, f"{self.name}: result {index} of {name!r} differs from ours by {error:.2g}"

    def lower_quartile(self, name: str) -> float:
        return lower_quartile(self.seconds[name])

    def best_other(self) -> str:
        return min((name for name in self.others if name not in self.unjudged), key=self.lower_quartile)

    def ratio(self) -> float:
        """Ours over the yardstick."""
        return self.lower_quartile(_OURS) / self.lower_quartile(self.yardstick())

    def yardstick(self) -> str:
        """The frozen layer, or the best other candidate in a race without a frozen layer."""
        return _FROZEN if _FROZEN in self.seconds else self.best_other()

    def noisy(self) -> bool:
        return any(self.lower_quartile(name) > DISTURBED * min(self.seconds[name]) for name in self.seconds)

    def judge(self, earlier_ratio: float | None = None) -> str:
        """ "ok", "noisy" or "SLOWER ...", by the rules at the top of this file."""
        best = self.best_other()
        if all(
            figure(_OURS) > NOISE * figure(best) + self.allowance
            for figure in (self.lower_quartile, lambda name: min(self.seconds[name]))
        ):
            return f"SLOWER than {best}: {self.lower_quartile(_OURS) / self.lower_quartile(best):.2f}x"
        if earlier_ratio is not None and self.ratio() > DRIFT * earlier_ratio:
            return f"SLOWER than before: ratio {self.ratio():.2f}, was {earlier_ratio:.2f}"
        return "noisy" if self.noisy() else "ok"

    def summary(self) -> dict:
        """What the --benchmark-json file holds of the race."""
        return {
            "ratio": self.ratio(),
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
    """One line a race: the yardstick's time, every candidate's time over it, and ours over the best of the others."""
    rows = [("race", "yardstick", "ours", "the others", "ours / best other", "verdict")]
    for race in races:
        unit = race.lower_quartile(race.yardstick())
        others = "  ".join(
            f"{name}{'*' if name in race.unjudged else ''} {race.lower_quartile(name) / unit:.2f}"
            for name in race.others
        )
        rows.append(
            (
                race.name,
                f"{race.yardstick()} {_duration(unit)}",
                f"{race.lower_quartile(_OURS) / unit:.2f}",
                others,
                f"{race.lower_quartile(_OURS) / race.lower_quartile(race.best_other()):.2f}",
                race.verdict,
            )
        )
    return aligned(rows)


def aligned(rows: list[tuple[str, ...]], numbers: bool = False) -> str:
    """The rows as lines of equally wide columns. numbers moves all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = str.rjust if numbers else str.ljust
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(pad, row[1:], widths[1:])]).rstrip() for row in rows)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def gradients(function: Callable, leaves: list[torch.Tensor], dy: torch.Tensor) -> Callable:
    """Returns a whole step, which calls function(), and then returns (y, *gradients of the leaves)."""

    def step():
        y = function()
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return step


def earlier_ratios_of(path: Path | None) -> dict[str, float]:
    """{test's name: ratio} of a --benchmark-json file, or {} without a file.

    A test keeps its name where its file moves, so that runs from before a move can be compared.
    """
    if path is None:
        return {}
    races = json.loads(path.read_text())["benchmarks"]
    return {race["name"]: race["extra_info"]["ratio"] for race in races}
