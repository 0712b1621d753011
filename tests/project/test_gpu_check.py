"""bench/tools/gpu_check.sh: its dry run; with stand-ins for Python and compute-sanitizer its order and its limits."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu_small_cases
from paths import REPOSITORY
from rosa_kernels import dispatch

SCRIPT = REPOSITORY / "bench" / "tools" / "gpu_check.sh"
STEPS = re.findall(r"^step (\S+) (\d+) ", SCRIPT.read_text(), re.MULTILINE)
CASES = r"\S+ bench/tools/gpu_small_cases.py --backends"
FAKE = """#!/bin/sh
# Writes down how it was called, and does what the test says.
echo "$0 $*" >>"{calls}"
case "$*" in {cases} esac
exit 0
"""


class Check:
    """A folder with a stand-in for Python and one for compute-sanitizer, which runs what it is to watch."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.calls = folder, folder / "out", folder / "calls"
        self.python = folder / "bin" / "python"
        self.python.parent.mkdir()
        self.calls.touch()
        self.write_python()
        self.write(
            folder / "bin" / "compute-sanitizer", '*) while [ "$1" != "$PYTHON" ]; do shift; done; "$@"; exit ;;'
        )

    def write_python(self, cases: str = "") -> None:
        self.write(self.python, cases + " *) ;;")

    def write(self, path: Path, cases: str) -> None:
        path.write_text(FAKE.format(calls=self.calls, cases=cases))
        path.chmod(0o755)

    def run(self, *options: str) -> int:
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(self.python),
        }
        command = ["bash", str(SCRIPT), "--python", str(self.python), "--out", str(self.out), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        self.printed = done.stdout + done.stderr
        return done.returncode

    def verdicts(self) -> dict[str, str]:
        """{step: what the summary says of it}, in the summary's order."""
        rows = re.findall(r"^(\S+) +\d+ s of +\d+  (.*)$", (self.out / "summary.txt").read_text(), re.MULTILINE)
        assert len(rows) == len(dict(rows))
        return dict(rows)


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


def test_the_limits_together_are_below_ten_minutes():
    assert len(STEPS) == 13 and sum(int(seconds) for _, seconds in STEPS) == 590


def test_every_step_runs_in_its_order(check):
    assert check.run() == 0, check.printed
    verdicts = check.verdicts()
    assert list(verdicts) == [name for name, _ in STEPS]
    assert {verdict for name, verdict in verdicts.items() if name != "host-time"} == {"passed"}
    summary = (check.out / "summary.txt").read_text()
    assert "dry run" not in summary and "every step passed" in summary
    calls = check.calls.read_text()
    for part in (
        r"pip install -e . --no-build-isolation --no-deps --no-index",
        r"-m pytest -m gpu .*--part 0/\d tests -k triton and not",
        r"-m pytest -m gpu .*--part 0/\d tests -k not triton and not",
        r"-m pytest -m gpu .*--part 0/1 tests/ops/test_gpu.py -k 2_to_the_31",
        r"-m pytest bench/races/test_gpu_speed.py .*--results \S+/out/results --device gpu --shapes selected",
        rf"compute-sanitizer --tool memcheck --error-exitcode 9 {CASES} triton cuda",
        rf"compute-sanitizer --tool racecheck --error-exitcode 9 --kernel-name kns=rosa {CASES} cuda",
        r"compute-sanitizer --tool initcheck ",
        r"python -m rosa_kernels.tune",
    ):
        found = re.search(part, calls)
        assert found, f"{part} is not among\n{calls}"
        calls = calls[found.end() :]


def test_a_step_that_fails_stops_no_other_and_shows(check):
    check.write_python('*gpu_small_cases*) echo "a bad access" >&2; exit 9 ;; *test_gpu_speed*) exit 1 ;;')
    assert check.run() == 1
    verdicts = check.verdicts()
    assert list(verdicts) == [name for name, _ in STEPS]
    failed = {name for name, verdict in verdicts.items() if verdict.startswith("FAILED")}
    assert failed == {"races-triton", "races-cuda", "memcheck", "racecheck-cuda", "racecheck-triton", "initcheck-cuda"}
    assert verdicts["memcheck"] == "FAILED with status 9" and "a bad access" in check.printed
    assert "not every step passed" in (check.out / "summary.txt").read_text()


def test_one_failing_part_of_the_gpu_tests_fails_their_step(check):
    check.write_python('*"--part 0/"*" -k triton"*) echo "test_x FAILED"; exit 1 ;;')
    assert check.run() == 1
    verdicts = check.verdicts()
    assert verdicts["tests-triton"].startswith("FAILED") and verdicts["tests-cuda"] == "passed"
    assert "test_x FAILED" in (check.out / "log.txt").read_text()


@pytest.mark.exhaustive
def test_a_step_that_hangs_is_ended_with_all_that_it_started(check):
    began = time.monotonic()
    check.write_python(f'*"-m gpu"*) sleep 60 & echo $! >>"{check.folder}/sleeping"; wait ;;')
    assert check.run("--seconds", "6") == 1
    assert time.monotonic() - began < 30
    verdicts = check.verdicts()
    assert [verdicts[name] for name in ("tests-triton", "tests-cuda", "tests-large")] == ["RAN OUT OF TIME"] * 3
    assert verdicts["tune"] == "passed"
    processes = (check.folder / "sleeping").read_text().split()
    assert processes and not any(_runs(int(process)) for process in processes)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_an_unknown_option_is_refused(check):
    assert check.run("--fast") == 2
    assert "--dry-run" in check.printed and not check.out.exists()


def test_the_small_cases_find_a_wrong_result(monkeypatch):
    assert gpu_small_cases.differing("cpu", "cpu") == []
    backend = dispatch.BACKENDS["cpu"]
    right = backend.sddmm
    monkeypatch.setattr(backend, "sddmm", lambda *args: 1.05 * right(*args))
    found = gpu_small_cases.differing("cpu", "cpu")
    assert len(found) == 4 * 2 and all(": sddmm is off by 0.05" in case for case in found)


@pytest.mark.exhaustive
def test_a_dry_run_runs_every_step_and_says_so(tmp_path):
    command = ["bash", str(SCRIPT), "--dry-run", "--python", sys.executable, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    summary, log = ((tmp_path / name).read_text() for name in ("summary.txt", "log.txt"))
    assert summary.startswith("dry run: whatever needs a GPU is a stub") and "every step passed" in summary
    for name, _ in STEPS:
        verdict = "passed, dry run|skipped: .* is not there" if name == "host-time" else "passed, dry run"
        assert re.search(rf"^{name} +\d+ s of +\d+  ({verdict})$", summary, re.MULTILINE), name
        assert f"=== {name}, at most" in log
    for stub in ("pip only says", "a stub for the check", "only collects", "for compute-sanitizer", "tune, which"):
        assert stub in log
    assert "cpu: 10 cases as the reference's" in log and "test_each_replay_draws_dropout_anew" in log
    assert json.loads((tmp_path / "results" / "dry-run.json").read_text())["dry_run"] is True
