"""Calls drawn at random give the numbers of dense float64, with every number of threads and every instruction set."""

import os
import subprocess
import sys

import pytest
import torch

import rosa_kernels as rk
from child_runs import CORES, count_passed
from fuzz import check_case, draw
from fuzz_cases import make_inputs
from paths import REPOSITORY, TESTS
from rosa_kernels.backends import cpu

CASES_IN_DEFAULT_TIER = 60
"""A case takes 10 ms there."""


def pytest_generate_tests(metafunc):
    if "seed" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    first, count = option("--fuzz-seed"), option("--fuzz")
    if count is None and first is not None:
        count = 1
    elif count is None:
        count = CASES
    seeds = range(first or 0, (first or 0) + count)
    in_default_tier = CASES_IN_DEFAULT_TIER if first is None and option("--fuzz") is None else count
    marks = [() if n < in_default_tier else pytest.mark.exhaustive for n in range(count)]
    metafunc.parametrize("seed", [pytest.param(seed, marks=mark) for seed, mark in zip(seeds, marks)])


def test_case(seed):
    chosen = os.environ.get("ROSA_KERNELS_CPU")
    print(draw(seed))
    print(f"{f'ROSA_KERNELS_CPU={chosen} ' if chosen else ''}pytest tests/ops/test_fuzz.py --fuzz-seed {seed}")
    check_case(seed)


def instruction_sets() -> list[str]:
    """Those of this processor beside the one that it chooses."""
    if rk.available_backends()["cpu"] is not None:
        return []
    return cpu.build_info().split(";")[0].split("kernels for")[1].split()[1:]


CASES = -(-2000 // (1 + len(instruction_sets())))
"""Of the exhaustive tier on each instruction set: 2,000 together."""


@pytest.mark.exhaustive
@pytest.mark.skipif("ROSA_KERNELS_CPU" in os.environ, reason="starts runs with each instruction set: this is one")
@pytest.mark.parametrize("number,name", list(enumerate(instruction_sets(), 1)), ids=instruction_sets())
def test_cases_on(number, name):
    options = "-k", "test_case", f"--fuzz={CASES}", f"--fuzz-seed={number * CASES}"
    assert count_passed(("ops/test_fuzz.py",), {"ROSA_KERNELS_CPU": name}, *options, processes=CORES) == CASES


@pytest.mark.exhaustive
def test_a_seed_draws_one_case():
    """A seed that a report names must mean the same case in another process."""
    command = [sys.executable, "-c", "import fuzz_cases; print(*map(fuzz_cases.draw, range(20)), sep='\\n')"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS / "support"), str(REPOSITORY)))}
    drawn = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    assert drawn == [str(draw(seed)) for seed in range(20)] and len(set(drawn)) == 20
    once, again = make_inputs(draw(3)).tensors, make_inputs(draw(3)).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in once.items())
