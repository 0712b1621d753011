"""The fuzzer's cases under the sanitizers of addresses and undefined behaviour, and under ThreadSanitizer: no report on
any instruction set of this processor, and one for each planted fault.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import cuda_emulation
import rosa_kernels as rk
from child_runs import CORES
from kernel_builds import Fault, build, start_fuzzer
from rosa_kernels.backends import cpu

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
    ),
]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
CASES = 200  # on each instruction set
FAULTS = {
    "a read past a buffer": (
        "address",
        Fault("dense/pack.h", "if (count >= LANES) return load(from);", "if (count > 0) return load(from);"),
        "ERROR: AddressSanitizer: (heap|stack)-buffer-overflow",
    ),
    "a misaligned access": (
        "address",
        Fault("common/buffer.h", "pieces[i] = next;", "pieces[i] = (float*)((char*)next + 1);"),
        "runtime error: .* misaligned address",
    ),
    "a signed overflow": (
        "address",
        Fault("dense/pack.h", "rounded_up(tokens, STRIP * LANES); }", "(int)tokens * 0x7fffffff; }"),
        "runtime error: signed integer overflow",
    ),
    "two threads add to one sum": (
        "thread",
        Fault("adapter/grad_reduction.h", "return sums_ + slot * slot_size_;", "return sums_;"),
        "WARNING: ThreadSanitizer: data race",
    ),
}


def skip_without(sanitizer: str) -> None:
    reason = cuda_emulation.unavailable_reason(sanitizer)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_pass_the_fuzzer(sanitizer, tmp_path):
    skip_without(sanitizer)
    library = build(tmp_path, SANITIZERS[sanitizer])
    sets = cpu.build_info().split(";")[0].split("kernels for")[1].split()

    def run(number: int) -> None:
        process = start_fuzzer(library, number * CASES, CASES, sets[number], sanitizer)
        output = process.communicate()[0]
        assert process.returncode == 0 and f"{CASES} cases passed" in output, f"{sets[number]}\n{output[-6000:]}"

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(run, range(len(sets))))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name, tmp_path):
    sanitizer, fault, report = FAULTS[name]
    skip_without(sanitizer)
    process = start_fuzzer(build(tmp_path, SANITIZERS[sanitizer], fault), 0, CASES, "portable", sanitizer)
    output = process.communicate()[0]
    assert process.returncode != 0
    assert re.search(report, output), output[-6000:]


def test_another_sanitizer_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="ROSA_KERNELS_SANITIZE: expected address, undefined, .* got 'memory'"):
        build(tmp_path, "memory")
