"""The GPU's races run without a GPU. Their candidates agree, and their file holds what it promises."""

import importlib
import json
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from paths import REPOSITORY

BENCH = REPOSITORY / "bench"
LORA = {"frozen", "ours", "addmm", "peft"}
CANDIDATES = {  # of a race, except csr, which torch.sparse may refuse
    "lora_forward": LORA,
    "lora_step": LORA,
    "rosa_forward": {"frozen", "ours", "apart", "dense"},
    "rosa_step": {"frozen", "ours", "apart", "dense"},
    "row_step": {"frozen", "ours", "rows", "dense"},
    "spmm": {"frozen", "ours", "apart"},
    "sddmm": {"frozen", "ours", "dense"},
    "csr_add": {"frozen", "ours", "index_add"},
    "backends": {"frozen", "ours", "hand"},
}
OPERATIONS = set(CANDIDATES)
WITH_CSR = {"rosa_forward", "rosa_step", "spmm", "sddmm"}


def dry_run(*options) -> str:
    """Returns the output of a run in which every race passed. A candidate that disagrees with ours fails its race."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    command += ["--gpu-dry-run", *map(str, options)]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    output = dry_run("--shapes", "all", "--results", directory)
    (path,) = directory.iterdir()  # no temporary file is left
    assert f"written: {path}" in output
    return json.loads(path.read_text())


@pytest.mark.exhaustive
def test_the_file_says_that_it_is_a_dry_run_and_of_what(report):
    assert report["dry_run"] is True and "dry run" in report["device"]
    assert report["partial"] is None and report["did_not_finish"] == []
    assert report["torch"] == torch.__version__
    assert {"driver", "triton", "cuda", "hip", "date", "rosa_kernels", "commit"} <= report.keys()


@pytest.mark.exhaustive
def test_every_operation_has_both_modes_and_every_dtype(report):
    races = report["races"].values()
    assert {race["operation"] for race in races} == OPERATIONS
    for operation in OPERATIONS:
        dtypes = {race["dtypes"] for race in races if race["operation"] == operation}
        expected = {"bf16", "fp16", "bf16-fp32", "fp32"}
        expected -= {"fp32"} if operation == "rosa_forward" else {"bf16-fp32"} if operation == "sddmm" else set()
        assert dtypes == expected, operation


@pytest.mark.exhaustive
def test_every_race_has_its_times_and_ratios(report):
    for name, race in report["races"].items():
        for mode in ("eager", "graphed"):
            figures = race[mode]
            assert figures["verdict"] == "dry run: not judged" and figures["l2"] == "dry run"
            csr = {"csr"} if race["operation"] in WITH_CSR else set()
            left_out = figures["left_out"]
            assert left_out.keys() <= csr and all(left_out.values())
            assert figures["seconds"].keys() == (CANDIDATES[race["operation"]] | csr) - left_out.keys(), name
            assert figures["ours_over"].keys() == figures["seconds"].keys() - {"ours"}
            for times in figures["seconds"].values():
                assert 0 < times["min"] <= times["lower_quartile"] <= times["median"]


@pytest.mark.exhaustive
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch.sparse multiplies on a CPU with MKL alone")
def test_only_missing_dtypes_and_graphs_leave_torch_sparse_out(report):
    for name, race in report["races"].items():
        if race["operation"] in WITH_CSR:
            assert "eagerly only" in race["graphed"]["left_out"]["csr"], name
            reason = race["eager"]["left_out"].get("csr", "")
            assert reason == "" if race["dtypes"] == "fp32" else reason == "" or "not implemented for" in reason, name


@pytest.mark.exhaustive
def test_only_a_weight_merged_in_16_bits_is_not_judged(report):
    for race in report["races"].values():
        merged = race["operation"] in ("rosa_forward", "rosa_step", "row_step") and race["dtypes"] != "fp32"
        assert race["eager"]["unjudged"] == race["graphed"]["unjudged"] == (["dense"] if merged else [])


@pytest.mark.exhaustive
def test_a_dry_run_or_a_part_of_a_run_never_lands_among_the_results(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (BENCH / "results").iterdir()}
    assert "not written to bench/results (dry run" in dry_run("-k", "csr_add")
    assert {path: path.stat().st_mtime_ns for path in (BENCH / "results").iterdir()} == before
    for options, why in ((["--shapes", "all"], "collected races started"), ([], "selected shapes only")):
        dry_run("-k", "csr_add", "--results", tmp_path, *options)
        assert why in json.loads((tmp_path / "dry-run.json").read_text())["partial"]


def collected(*options) -> set[str]:
    """The names of the tests that pytest collects from bench/ and one file of tests/ with these options."""
    command = [sys.executable, "-m", "pytest", "tests/project/test_gpu_results.py", "bench", "--collect-only", "-q"]
    command += ["-p", "no:cacheprovider", *options]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("bench/")}


@pytest.mark.exhaustive
def test_the_selected_shapes_are_a_part_of_all():
    assert collected() < collected("--shapes", "all")


@pytest.mark.exhaustive
def test_the_selected_shapes_show_every_race_dtype_and_kind_of_call():
    selected = collected()
    races = "".join(path.read_text() for path in (BENCH / "races").iterdir() if path.suffix == ".py")
    assert {name.partition("[")[0] for name in selected} == set(re.findall(r"^def (test_\w+)", races, re.MULTILINE))
    for race in ("rosa_step", "lora_step", "row_step", "sparse_step", "rosa_few_tokens", "spmm", "sddmm", "csr_add"):
        for dtypes in ("fp32", "bf16"):
            alike = re.compile(rf"test_{race}\[\d+x\d+x\d+-(unstructured-|row-)?{dtypes}\]")
            assert any(map(alike.fullmatch, selected)), (race, dtypes)
    assert any(name.startswith("test_lora_few_tokens[4096x4096x1-") for name in selected)  # one token


class PretendCUDA:
    """The part of torch.cuda that gpu_timing uses. It logs what a GPU would see.

    Each event comes 2 ms after the one before.
    """

    def __init__(self):
        self.log = log = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.milliseconds = 2.0 * sum(entry == "event" for entry in log)
                log.append("event")

            def synchronize(self):
                log.append("wait")

            def elapsed_time(self, end):
                assert "wait" in log, "read before the GPU has come so far"
                return end.milliseconds - self.milliseconds

        class Stream:
            def wait_stream(self, other):
                assert other is not self

        class CUDAGraph:
            def replay(self):
                log.append("replay")

        @contextmanager
        def graph(_):
            log.append("capture")
            yield
            log.append("captured")

        @contextmanager
        def stream(_):
            yield

        current = Stream()
        self.functions = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": stream,
            "current_stream": lambda: current,
            "synchronize": lambda: log.append("wait"),
        }


@pytest.fixture
def gpu_timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("gpu_timing")


@pytest.fixture
def log(monkeypatch):
    cuda = PretendCUDA()
    for name, function in cuda.functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return cuda.log


def test_eager_calls_lie_between_two_events(gpu_timing, log):
    timer = gpu_timing.Eager()
    seconds = timer(timer.prepare(lambda: log.append("call")), calls=3)
    assert log == ["event", "call", "call", "call", "event", "wait"]
    assert seconds == pytest.approx(2e-3)


def test_graphed_calls_replay_one_capture_and_flush_outside_of_their_events(gpu_timing, log, monkeypatch):
    monkeypatch.setattr(gpu_timing, "_FLUSHED_BYTES", 16)
    timer = gpu_timing.Graphed(device="cpu")

    def step():
        log.append("call")
        return ("result",)

    replay = timer.prepare(step)
    assert log == ["call"] * 3 + ["capture", "call", "captured"]
    assert replay() == ("result",)
    del log[:]

    class Flushed:
        def zero_(self):
            log.append("flush")

    timer._flushed = Flushed()
    seconds = timer(replay, calls=2)
    assert log == ["flush", "event", "replay", "event"] * 2 + ["wait"]
    assert seconds == pytest.approx(2 * 2e-3)
