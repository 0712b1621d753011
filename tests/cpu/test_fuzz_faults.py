"""The fuzzer finds faults that are planted in the C++ kernels, each within the cases that an exhaustive run takes."""

import re
import shutil

import pytest

import cuda_emulation
import rosa_kernels as rk
from kernel_builds import Fault, build, start_fuzzer

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
    ),
    pytest.mark.skipif(
        cuda_emulation.compiler() is None or shutil.which("sh") is None, reason="a C++ compiler and sh are needed"
    ),
]
CASES = 500

FAULTS = {
    "dropout counts the tokens of each block from 0": Fault(
        "common/philox.h", "counting_from((uint32_t)(first_token + t))", "counting_from((uint32_t)t)"
    ),
    "the last thread's sums are left out": Fault(
        "adapter/grad_reduction.h",
        "for (int64_t slot = 1; slot < slots_; ++slot)",
        "for (int64_t slot = 1; slot + 1 < slots_; ++slot)",
    ),
    "every part of y gets the first features' bias": Fault(
        "adapter/decode.h", "(const T*)f_.bias + begin", "(const T*)f_.bias"
    ),
    "a weight's rows are taken for packed": Fault(
        "adapter/decode.h",
        "(const T*)f_.weight.data + l, f_.weight.stride",
        "(const T*)f_.weight.data + l, f_.in_features",
    ),
    "the transpose of whole rows is taken for rows": Fault(
        "adapter/backward.h",
        "s == Structure::row      ? Structure::column",
        "s == Structure::row      ? Structure::row",
    ),
    "a transposed S keeps the order of S's values": Fault(
        "adapter/backward.h", "b.sparse.values[b.permutation[e]]", "b.sparse.values[e]"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fuzzer_finds(name, tmp_path):
    process = start_fuzzer(build(tmp_path, fault=FAULTS[name]), 0, CASES, "portable")
    output = process.communicate()[0]
    assert process.returncode != 0, f"{name}: {CASES} cases passed"
    assert re.search("^AssertionError: .* elements off", output, re.MULTILINE), output[-3000:]
    print(f"{name}: found by seed {re.findall(r'^seed ([0-9]+):', output, re.MULTILINE)[-1]}")
