"""The judgement of the races sees a planted slowdown, and does not cry wolf. Only --judge makes it fail a run."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

import rosa_kernels as rk
from interleaved import DRIFT, NOISE, Race, earlier_ratios_of, table
from paths import REPOSITORY

RESULT = (torch.ones(3),)


def taking(seconds):
    """A candidate that takes so long. It sleeps, because a loop would take longer where other processes run."""

    def run():
        time.sleep(seconds)
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
    race = Race("planted", {name: taking(s) for name, s in seconds.items()}, allowance=allowance)
    race.run(Stopwatch(), seconds=0.4)
    return race


def test_a_planted_slowdown_is_seen():
    race = raced(ours=3.6e-3, frozen=1e-3, csr=9e-3, dense=3e-3)
    assert race.judge().startswith("SLOWER than dense: 1.")
    assert 3.2 < race.ratio() < 4.0


def test_a_win_and_a_draw_pass():
    assert raced(ours=2e-3, frozen=1e-3, csr=4e-3, dense=3e-3).judge() == "ok"
    assert raced(ours=3e-3, frozen=1e-3, csr=4e-3, dense=3e-3).judge() == "ok"


def test_a_slowdown_against_an_earlier_run_is_seen_though_the_others_are_far():
    race = raced(ours=1.5e-3, frozen=1e-3, csr=9e-3)
    assert race.judge(earlier_ratio=1.45) == "ok"
    assert race.judge(earlier_ratio=1.2).startswith("SLOWER than before: ratio 1.")


def made_up(**seconds):
    race = Race("made up", {name: taking(0) for name in seconds})
    race.seconds = seconds
    return race


def test_one_unlucky_round_is_not_a_regression_and_one_lucky_round_hides_none():
    steady = [1.0] * 8
    assert made_up(ours=[1.0] * 7 + [9.0], other=steady).judge() == "ok"
    assert made_up(ours=[1.0] + [1.2] * 7, other=steady).judge() == "ok"
    assert made_up(ours=[1.2] * 8, other=[0.9] + [1.0] * 7).judge().startswith("SLOWER than other: 1.20x")


def test_the_limits_are_where_they_are_said_to_be():
    assert made_up(ours=[NOISE * 0.99] * 4, other=[1.0] * 4).judge() == "ok"
    assert made_up(ours=[NOISE * 1.01] * 4, other=[1.0] * 4).judge() != "ok"
    race = made_up(ours=[1.0] * 4, frozen=[1.0] * 4, other=[2.0] * 4)
    assert race.judge(1.01 / DRIFT) == "ok" and race.judge(0.99 / DRIFT) != "ok"
    race = made_up(ours=[1e-5] * 4, other=[6e-6] * 4)
    assert race.judge() != "ok"
    race.allowance = 5e-6
    assert race.judge() == "ok"


def test_a_disturbed_race_says_so():
    assert made_up(ours=[1.0] + [1.6] * 7, other=[2.0] * 8).judge() == "noisy"


def test_a_candidate_with_another_result_is_shown_and_not_judged():
    race = made_up(ours=[2.0] * 4, csr=[3.0] * 4, dense=[1.0] * 4)
    assert race.judge().startswith("SLOWER than dense")
    race.unjudged = ("dense",)
    assert race.judge() == "ok" and race.best_other() == "csr"
    assert "dense* 0.33" in table([race])


def test_a_race_takes_its_timer_and_lets_its_candidates_go():
    class Ticks:
        min_sample_seconds = 3.0

        def __call__(self, function, calls):
            function()
            return 1.0 * calls

    race = Race("ticks", {"ours": lambda: RESULT, "other": lambda: RESULT}, timer=Ticks())
    race.run(Stopwatch(), seconds=36.0)
    assert race.seconds == {"ours": [1.0] * 6, "other": [1.0] * 6}  # a round: two candidates, three calls each
    assert race.candidates == {}


def test_a_hopeless_candidate_is_timed_once_and_a_slow_one_in_every_round():
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
    race = Race("wrong", {"ours": lambda: RESULT, "other": lambda: (torch.ones(3) * 1.1,)})
    with pytest.raises(AssertionError, match="result 0 of 'other' differs"):
        race.run(Stopwatch(), seconds=0.1)


def test_an_earlier_json_file_is_read_back_by_the_names_of_its_tests(tmp_path):
    race = made_up(ours=[1.5] * 4, frozen=[1.0] * 4, other=[2.0] * 4)
    path = tmp_path / "before.json"
    path.write_text(
        json.dumps({"benchmarks": [{"fullname": "x.py::test_y", "name": "test_y", "extra_info": race.summary()}]})
    )
    assert earlier_ratios_of(path) == {"test_y": 1.5}
    assert earlier_ratios_of(None) == {}


def test_the_table_has_every_ratio():
    race = made_up(ours=[1.5e-3] * 4, frozen=[1e-3] * 4, csr=[4e-3] * 4, dense=[3e-3] * 4)
    race.verdict = race.judge()
    (line,) = table([race]).splitlines()[1:]
    for text in ("made up", "frozen 1.0 ms", "1.50", "csr 4.00", "dense 3.00", "0.50", "ok"):
        assert text in line


PLANTED = """\
import time

import torch


def candidate(seconds):
    def run():
        time.sleep(seconds)
        return (torch.ones(3),)

    return run


def test_slow(race):
    race({"ours": candidate(0.012), "dense": candidate(0.003)}, torch.float32, seconds=0.1)


def test_fast(race):
    race({"ours": candidate(0.003), "dense": candidate(0.012)}, torch.float32, seconds=0.1)
"""


@pytest.fixture
def run_planted(tmp_path):
    """run_planted(option, ...) runs those two races under bench/conftest.py, as a user does."""
    shutil.copy(REPOSITORY / "bench" / "conftest.py", tmp_path)
    (tmp_path / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-c", str(REPOSITORY / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", "--device", "cpu"]

    def run(*options):
        done = subprocess.run(
            [*command, *options], check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return run


on_cpu_kernels = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason="races of the reference backend are not judged"
)


@pytest.mark.exhaustive
@on_cpu_kernels
def test_without_judge_a_slowdown_is_named_in_the_table_and_the_run_passes(run_planted):
    status, output = run_planted("--benchmark-only")
    assert status == pytest.ExitCode.OK, output
    slow, fast = (line for line in output.splitlines() if line.startswith(("slow ", "fast ")))
    assert "SLOWER than dense: " in slow and "SLOWER" not in fast
    assert "slower in 1 of 2 races (not failed without --judge): slow\n" in output


@on_cpu_kernels
def test_with_judge_a_slowdown_fails_the_run(run_planted):
    status, output = run_planted("--benchmark-only", "--judge")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "1 failed, 1 passed" in output and "slower in 1 of 2 races (failed): slow\n" in output


@pytest.mark.exhaustive
def test_judge_wants_times(run_planted):
    status, output = run_planted("--benchmark-disable", "--judge")
    assert status == pytest.ExitCode.USAGE_ERROR and "--judge needs times" in output
