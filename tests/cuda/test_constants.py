"""The CUDA kernels and Python agree on the numbers that they share: those of csrc/cuda/constants.h, and the
algorithms of csrc/cuda/linear.h and csrc/cuda/gradients.h."""

import re

import pytest

import cuda_kernels
from cases import CPU
from paths import CSRC
from rosa_kernels.backends import kept_H
from rosa_kernels.backends.cuda import heuristics, ops
from rosa_kernels.backends.gpu import hardware

HEADER = (CSRC / "cuda" / "constants.h").read_text(encoding="utf-8")
CONSTANTS = {name: int(number) for name, number in re.findall(r"^constexpr int (\w+) = (\d+);$", HEADER, re.MULTILINE)}


def test_every_constant_of_the_header_is_read():
    assert len(CONSTANTS) == len(re.findall(r"^[^/\n]*\bconstexpr\b", HEADER, re.MULTILINE)) > 0


@pytest.mark.parametrize("name", CONSTANTS)
def test_python_has_the_same_number(name):
    assert getattr(cuda_kernels, name) == CONSTANTS[name]


def test_the_cost_model_counts_by_the_same_numbers():
    assert CONSTANTS["EPILOGUE_TOKENS"] == heuristics.EPILOGUE_TOKENS
    assert CONSTANTS["PACKED_ENTRY_BYTES"] == heuristics.PACKED_ENTRY_BYTES
    assert 227 * 1024 - hardware.shared_memory(CPU) == CONSTANTS["STATIC_SHARED_BYTES"]  # an H100's limit


def test_H_has_the_same_padding():
    assert f"constexpr int RANK_STEP = {kept_H.RANK_STEP};" in (CSRC / "gpu" / "rank.h").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "header,enum,numbers",
    [
        ("linear.h", "Base", ops._BASES),
        ("linear.h", "LowRank", ops._LOW_RANKS),
        ("linear.h", "Sparse", ops._SPARSES),
        ("gradients.h", "SddmmAlgorithm", ops._SDDMMS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_algorithms_have_the_same_numbers(header, enum, numbers):
    text = (CSRC / "cuda" / header).read_text(encoding="utf-8")
    names = re.search(rf"enum class {enum} {{ (.*?) }};", text).group(1).split(", ")
    assert [name.replace("none", "") for name in names] == list(numbers)
    assert list(numbers.values()) == list(range(len(numbers)))
