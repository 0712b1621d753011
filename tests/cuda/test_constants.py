"""The CUDA kernels and Python agree on the numbers that they share: those of csrc/cuda/constants.h."""

import re

import pytest

from cases import CPU
from paths import CSRC
from rosa_kernels.backends.cuda import bindings, heuristics
from rosa_kernels.backends.gpu import hardware

HEADER = (CSRC / "cuda" / "constants.h").read_text(encoding="utf-8")
CONSTANTS = {name: int(number) for name, number in re.findall(r"^constexpr int (\w+) = (\d+);$", HEADER, re.MULTILINE)}


def test_every_constant_of_the_header_is_read():
    assert len(CONSTANTS) == len(re.findall(r"^[^/\n]*\bconstexpr\b", HEADER, re.MULTILINE)) > 0


@pytest.mark.parametrize("name", CONSTANTS)
def test_python_has_the_same_number(name):
    assert getattr(bindings, name) == CONSTANTS[name]


def test_the_cost_model_counts_by_the_same_numbers():
    assert CONSTANTS["EPILOGUE_TOKENS"] == heuristics.EPILOGUE_TOKENS
    assert CONSTANTS["PACKED_ENTRY_BYTES"] == heuristics.PACKED_ENTRY_BYTES
    assert 227 * 1024 - hardware.shared_memory(CPU) == CONSTANTS["STATIC_SHARED_BYTES"]  # an H100's limit
