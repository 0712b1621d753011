"""bench/kernel_traffic.py says what the kernels do under Triton's interpreter, and the page made of it is current."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are Triton's")
pytest.importorskip("numpy", reason="Triton's interpreter computes with numpy")

REPOSITORY = Path(__file__).parents[1]
PAGE = "bench/results/h100-roofline-estimate.md"
KERNELS = {
    "linear_kernel",
    "shrink_kernel",
    "outer_kernel",
    "sum_kernel",
    "scatter_kernel",
    "sddmm_tiled_kernel",
    "sddmm_blocks_kernel",
    "sddmm_entries_kernel",
    "pick_kernel",
    "by_columns_kernel",
    "gather_columns_kernel",
    "add_at_rows_kernel",
}
ALIGNED = {"aligned", "aligned, many"}
"""Cases whose sectors are known."""
INDICES = {"load crow", "load col", "load permutation", "load values"}
"""Gathered or searched: which of their elements share a sector hangs on the pattern."""
SEARCHES = {("sddmm_tiled_kernel", "load col"): 0.1}
"""Relative error: a search of n entries takes log2(n + 1) halvings only on average."""


def output_of(script: Path, interpret: str) -> str:
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def launches():
    return json.loads(output_of(REPOSITORY / "tests" / "interpreted_traffic.py", interpret="1"))


def figures(launches, name):
    for launch in launches:
        for operand, counts in launch["operands"].items():
            yield f"{launch['case']}: {launch['kernel']}: {operand}", launch, operand, *counts[name]


def test_every_kernel_was_counted_with_every_operand_it_may_have(launches):
    assert {launch["kernel"] for launch in launches} == KERNELS
    operands = {operand for launch in launches if launch["kernel"] == "linear_kernel" for operand in launch["operands"]}
    named = [
        "x",
        "x_columns",
        "weight",
        "bias",
        "H",
        "A",
        "B",
        "seed",
        "S",
        "values",
        "crow",
        "col",
        "permutation",
        "out",
    ]
    assert operands == {f"load {name}" for name in named} | {"store out"}


def test_flops_of_dots(launches):
    for launch in launches:
        counted, formula = launch["flops"]
        assert formula == pytest.approx(counted), launch


def test_elements_that_loads_and_stores_ask_for(launches):
    for where, launch, operand, counted, formula in figures(launches, "asked"):
        error = SEARCHES.get((launch["kernel"], operand), 1e-9)
        assert formula == pytest.approx(counted, rel=error), where


def test_distinct_elements(launches):
    for where, launch, operand, counted, formula in figures(launches, "distinct"):
        if operand == "load crow" or launch["case"] in ALIGNED:
            continue  # a search meets some of crow, which is small; aligned's S leaves most of x unread
        if launch["kernel"] == "scatter_kernel" and operand == "load out" and "load base" in launch["operands"]:
            assert formula == 0, where  # L2 still has what the launch itself wrote
        elif launch["case"] == "blocks" and operand == "load x":
            assert formula <= counted, where  # the least: as if all rows of blocks shared their columns
        else:
            assert formula == pytest.approx(counted), where


def test_sectors_that_loads_and_stores_ask_for(launches):
    checked = set()
    for where, launch, operand, counted, formula in figures(launches, "sectors"):
        if launch["case"] in ALIGNED and operand not in INDICES:
            assert formula == pytest.approx(counted), where
            checked.add(where)
    gathers = ("linear_kernel: load x_columns", "sddmm_entries_kernel: load dy", "sddmm_entries_kernel: load x")
    assert checked >= {f"{case}: {gather}" for case in ALIGNED for gather in gathers}


def test_the_committed_page_is_what_the_script_prints():
    printed = output_of(REPOSITORY / "bench" / "triton_traffic.py", interpret="0")
    assert printed == (REPOSITORY / PAGE).read_text(), f"python bench/triton_traffic.py > {PAGE}"
