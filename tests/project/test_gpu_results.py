"""The file that a run on a GPU leaves, with made-up figures."""

import json
import re

import pytest
import torch

import gpu_results
from gpu_results import Case, Result, keep, report
from interleaved import Race
from layers import Shape


@pytest.fixture
def results(monkeypatch):
    """Two modes of one race on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    def result(mode, ours):
        race = Race("made up", {"frozen": None, "ours": None, "addmm": None})
        race.seconds = {"frozen": [1.0, 1.0, 1.0], "ours": [ours, ours, 9.0], "addmm": [2.0, 2.0, 2.0]}
        race.verdict = race.judge()
        case = Case(Shape(8, 4, 2), "bf16", mode, 0.01, "cuda")
        return Result("rosa_step", case, race, "triton", "l2", {"csr": "a reason"})

    return [result("eager", 1.5), result("graphed", 1.25)]


def test_the_report_names_machine_software_and_ratios(results):
    content = report(results, [], partial=None, dry_run=False)
    assert content["device"] == "NVIDIA H100 80GB HBM3" and content["dry_run"] is False
    assert content["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content["date"])
    race = content["races"]["rosa_step[8x4x2-bf16-1.0%]"]
    assert (race["out_features"], race["in_features"], race["tokens"]) == (8, 4, 2)
    assert race["eager"]["ours_over"] == {"frozen": 1.5, "addmm": 0.75}
    assert race["graphed"]["ours_over"] == {"frozen": 1.25, "addmm": 0.625}
    assert race["eager"]["seconds"]["ours"] == {"min": 1.5, "lower_quartile": 1.5, "median": 1.5}
    assert race["eager"]["left_out"] == {"csr": "a reason"} and race["eager"]["backend"] == "triton"


def test_a_whole_run_takes_the_names_of_the_device_and_of_what_served_it(results, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_results, "RESULTS", tmp_path)
    assert keep(tmp_path, report(results, [], partial=None, dry_run=False)).startswith("written: ")
    (path,) = tmp_path.iterdir()
    assert path.name == "nvidia-h100-80gb-hbm3-triton.json"
    assert json.loads(path.read_text())["races"]


@pytest.mark.parametrize("partial, dry_run", [("selected shapes only", False), (None, True)])
def test_anything_else_stays_out_of_the_results(results, tmp_path, monkeypatch, partial, dry_run):
    monkeypatch.setattr(gpu_results, "RESULTS", tmp_path)
    assert keep(tmp_path, report(results, [], partial, dry_run)).startswith("not written")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    content = {"dry_run": False, "partial": None, "device": "X", "backends": []}
    keep(tmp_path, content)
    with pytest.raises(TypeError):
        keep(tmp_path, content | {"races": {object()}})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == content
