"""The benchmarks' own judgement: it sees a planted slowdown, and does not cry wolf."""

import json
import time

import pytest
import torch

from interleaved import DRIFT, NOISE, Race, earlier_ratios_of, table

RESULT = (torch.ones(3),)


def busy(seconds):
    """A candidate that takes so long."""

    def run():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return RESULT

    return run


class Stopwatch:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def raced(allowance=0.0, **seconds):
    race = Race("planted", {name: busy(s) for name, s in seconds.items()}, allowance=allowance)
    race.run(Stopwatch(), seconds=0.4)
    return race


def test_a_planted_slowdown_is_seen():
    race = raced(ours=3.6e-3, frozen=1e-3, csr=9e-3, dense=3e-3)
    assert race.judge().startswith("SLOWER than dense: 1.")
    assert 3.2 < race.ratio() < 4.0


def test_a_win_and_a_draw_pass():
    assert raced(ours=2e-3, frozen=1e-3, csr=4e-3, dense=3e-3).judge() == "ok"
    assert raced(ours=3e-3, frozen=1e-3, csr=4e-3, dense=3e-3).judge() == "ok"


def test_a_slowdown_against_an_earlier_run_is_seen_though_the_naive_ways_are_far():
    race = raced(ours=1.5e-3, frozen=1e-3, csr=9e-3)
    assert race.judge(earlier_ratio=1.45) == "ok"
    assert race.judge(earlier_ratio=1.2).startswith("SLOWER than before: ratio 1.")


def made_up(**seconds):
    race = Race("made up", {name: busy(0) for name in seconds})
    race.seconds = seconds
    return race


def test_one_unlucky_round_is_not_a_regression_and_one_lucky_round_hides_none():
    steady = [1.0] * 8
    assert made_up(ours=[1.0] * 7 + [9.0], naive=steady).judge() == "ok"
    assert made_up(ours=[1.0] + [1.2] * 7, naive=steady).judge() == "ok"
    assert made_up(ours=[1.2] * 8, naive=[0.9] + [1.0] * 7).judge().startswith("SLOWER than naive: 1.20x")


def test_the_limits_are_where_they_are_said_to_be():
    assert made_up(ours=[NOISE * 0.99] * 4, naive=[1.0] * 4).judge() == "ok"
    assert made_up(ours=[NOISE * 1.01] * 4, naive=[1.0] * 4).judge() != "ok"
    race = made_up(ours=[1.0] * 4, frozen=[1.0] * 4, naive=[2.0] * 4)
    assert race.judge(1.01 / DRIFT) == "ok" and race.judge(0.99 / DRIFT) != "ok"
    race = made_up(ours=[1e-5] * 4, naive=[6e-6] * 4)
    assert race.judge() != "ok"
    race.allowance = 5e-6
    assert race.judge() == "ok"


def test_a_disturbed_race_says_so():
    assert made_up(ours=[1.0] + [1.6] * 7, naive=[2.0] * 8).judge() == "noisy"


def test_a_naive_way_with_another_result_is_shown_and_not_judged():
    race = made_up(ours=[2.0] * 4, csr=[3.0] * 4, dense=[1.0] * 4)
    assert race.judge().startswith("SLOWER than dense")
    race.unjudged = ("dense",)
    assert race.judge() == "ok" and race.best_naive() == "csr"
    assert "dense* 0.33" in table([race])


def test_a_race_takes_its_timer_and_lets_its_candidates_go():
    class Ticks:
        min_sample_seconds = 3.0

        def __call__(self, function, calls):
            function()
            return 1.0 * calls

    race = Race("ticks", {"ours": lambda: RESULT, "naive": lambda: RESULT}, timer=Ticks())
    race.run(Stopwatch(), seconds=36.0)
    assert race.seconds == {"ours": [1.0] * 6, "naive": [1.0] * 6}  # a round: two candidates, three calls each
    assert race.candidates == {}


def test_a_hopeless_way_is_timed_once_and_a_slow_one_in_every_round():
    class Ticks:
        min_sample_seconds = 0.0

        def __init__(self, seconds):
            self.seconds = seconds

        def __call__(self, function, calls):
            return self.seconds[function()[0].numel()] * calls

    def candidates(*names):  # told apart by the length of their result
        return {name: lambda n=n: (torch.ones(n),) for n, name in enumerate(names, 1)}

    def raced(*seconds):
        race = Race("planted", candidates("ours", "slow", "slower"), timer=Ticks(dict(enumerate(seconds, 1))))
        race._check_same_results = lambda: None
        race.run(Stopwatch(), seconds=0.0)
        return {name: len(samples) for name, samples in race.seconds.items()}

    assert raced(1.0, 4.9, 5.1) == {"ours": 4, "slow": 4, "slower": 1}
    assert raced(1.0, 6.0, 5.1) == {"ours": 4, "slow": 1, "slower": 1}
    assert raced(0.01, 0.06, 0.21) == {"ours": 4, "slow": 4, "slower": 1}


def test_different_results_are_no_race():
    race = Race("wrong", {"ours": lambda: RESULT, "naive": lambda: (torch.ones(3) * 1.1,)})
    with pytest.raises(AssertionError, match="result 0 of 'naive' differs"):
        race.run(Stopwatch(), seconds=0.1)


def test_an_earlier_json_file_is_read_back(tmp_path):
    race = made_up(ours=[1.5] * 4, frozen=[1.0] * 4, naive=[2.0] * 4)
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"benchmarks": [{"fullname": "bench/test_x.py::test_y", "extra_info": race.summary()}]}))
    assert earlier_ratios_of(path) == {"bench/test_x.py::test_y": 1.5}
    assert earlier_ratios_of(None) == {}


def test_the_table_has_every_ratio():
    race = made_up(ours=[1.5e-3] * 4, frozen=[1e-3] * 4, csr=[4e-3] * 4, dense=[3e-3] * 4)
    race.goal, race.verdict = 1.1, race.judge()
    (line,) = table([race]).splitlines()[1:]
    for text in ("made up", "frozen 1.0 ms", "1.50", "1.10", "csr 4.00", "dense 3.00", "0.50", "ok"):
        assert text in line
