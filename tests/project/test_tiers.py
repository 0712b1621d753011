"""The default tier leaves no test, backend, dtype or value untouched, and tests and benches are collected together."""

import dataclasses
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tiers
from cases import LINEAR_CASES, LinearCase
from paths import REPOSITORY

BACKENDS = ("reference", "cpu")
FP32, BF16 = torch.float32, torch.bfloat16


class Item:
    """What tiers.py reads of an item of pytest."""

    def __init__(self, test: str, marked: str | None = None, fixturenames: tuple = (), **parameters):
        names = (value.id if isinstance(value, LinearCase) else str(value) for value in parameters.values())
        self.nodeid = f"{test}[{'-'.join(names)}]"
        self.callspec = SimpleNamespace(params=parameters)
        self.marked, self.fixturenames = marked, fixturenames

    def get_closest_marker(self, name):
        return name if name == self.marked else None


def linear_items() -> list:
    combinations = itertools.product(BACKENDS, (FP32, BF16), LINEAR_CASES)
    return [Item("linear", backend=backend, dtype=dtype, case=case) for backend, dtype, case in combinations]


def test_every_value_of_a_case_meets_every_backend():
    kept = [item.callspec.params for item in tiers.default_tier(linear_items())]
    for field, name in itertools.product(dataclasses.fields(LinearCase), BACKENDS):
        met = {getattr(call["case"], field.name) for call in kept if call["backend"] == name}
        assert met == {getattr(case, field.name) for case in LINEAR_CASES}
    assert len(kept) < len(linear_items()) / 2


def test_every_pattern_meets_every_backend_and_dtype():
    kept = [item.callspec.params for item in tiers.default_tier(linear_items())]
    met = {(call["backend"], call["dtype"], call["case"].pattern) for call in kept}
    assert met == set(itertools.product(BACKENDS, (FP32, BF16), {case.pattern for case in LINEAR_CASES}))


def test_no_test_loses_all_of_its_parameters():
    items = [Item(test, number=number) for test in ("first", "second") for number in (1, 1.0, 2)]
    assert len(tiers.default_tier(items)) == len(items)


def test_what_is_marked_exhaustive_is_left_out():
    marked, plain = Item("slow", marked="exhaustive"), Item("fast")
    assert tiers.default_tier([marked, plain]) == [plain]


def test_both_tiers_together_are_everything():
    twice = [Item("does more there", fixturenames=("exhaustive",)), Item("other cases there", marked="cases_by_tier")]
    items = [*linear_items(), Item("slow", marked="exhaustive"), *twice]
    default, beyond = tiers.default_tier(items), tiers.beyond_default(items)
    assert set(default) | set(beyond) == set(items)
    assert [item for item in default if item in beyond] == twice


def collected(*options) -> set[str]:
    command = [sys.executable, "-m", "pytest", "tests", *options, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.exhaustive
def test_no_test_of_this_suite_is_in_neither():
    assert collected("--exhaustive") <= collected() | collected("--beyond-default")


def test_the_order_of_collection_decides_nothing():
    items = linear_items()
    there, back = tiers.default_tier(items), tiers.default_tier(items[::-1])
    assert there == back[::-1]


@pytest.mark.exhaustive
def test_tests_and_benches_are_collected_in_one_call():
    command = [sys.executable, "-m", "pytest", "tests", "bench", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/ops/test_ops.py::" in done.stdout and "bench/races/" in done.stdout
