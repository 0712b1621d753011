"""The CPU's kernels for AVX512-BF16 and AMX on a processor without them: the instructions are emulated."""

import os
from pathlib import Path
from unittest import mock

import torch

import cuda_emulation
from paths import CSRC, TESTS

KERNELS = (
    CSRC / "cpu" / "bindings.cpp",
    CSRC / "cpu" / "kernels.cpp",
    *sorted((TESTS / "cpu").glob("emulated_*.cpp")),
)
SETS = tuple(
    path.stem.removeprefix("emulated_") for path in KERNELS if path.stem in ("emulated_amx", "emulated_avx512bf16")
)
NAMESPACE = "rosa_kernels_cpu_emulated"  # of the operators, beside those of the processor's own kernels


INSTRUCTION_SET = "CPU_EMULATED_SET"
"""The variable that names the set in an emulated run."""


def build(variant: str) -> Path:
    return cuda_emulation.build(variant, KERNELS, (f"-Drosa_kernels_cpu={NAMESPACE}",))


def install(library: str) -> None:
    """Makes backend "cpu" run a build's kernels in this process, for all that they serve: no library GEMMs for LoRA."""
    from rosa_kernels.backends.cpu import base_gemm, heuristics
    from rosa_kernels.backends.cpu import binary as cpu_binary
    from rosa_kernels.backends.cpu import ops as cpu_ops

    torch.ops.load_library(library)
    kernels = getattr(torch.ops, NAMESPACE)
    cpu_binary.kernels = cpu_ops._kernels = base_gemm._kernels = kernels
    # The first call chooses the set. The package's own kernels, which have chosen theirs, know no such name.
    with mock.patch.dict(os.environ, ROSA_KERNELS_CPU=os.environ[INSTRUCTION_SET]):
        assert kernels.instruction_set() == os.environ[INSTRUCTION_SET]
    heuristics._library_serves = lambda *call: False


def takes(item) -> bool:
    """Whether an emulated run takes a test: those of bf16, of our GEMM and of the fused algorithm, and the fuzzer's."""
    names = "cpu-bf16", "test_bfloat16_terms.py", "FUSED", "by_our_gemm", "test_fuzz.py::test_case["
    return any(name in item.nodeid for name in names)
