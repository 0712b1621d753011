"""The numbers that the C++ kernels and Python must agree on are the same on both sides."""

import pytest

import rosa_kernels as rk
from rosa_kernels import pattern
from rosa_kernels.backends.cpu import binary, heuristics

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)


def test_the_kernels_constants_are_pythons():
    structures = ("UNSTRUCTURED", "ROW", "COLUMN", "BLOCK", "BLOCK16")
    expected = {"BLOCK_TOKENS": heuristics.BLOCK_TOKENS} | {name: getattr(pattern, name) for name in structures}
    assert binary.constants() == expected
