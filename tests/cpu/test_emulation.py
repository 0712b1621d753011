"""The CPU kernels for bf16 instructions pass the ops' tests in bf16 under emulated instructions, in processes of their
own, and what is compiled for the processor holds those instructions. Speed is not shown here.
"""

import os
import re
import shutil
import signal
import subprocess

import pytest

import cpu_emulation
import cuda_emulation
from child_runs import count_passed
from paths import CSRC, TESTS

pytestmark = pytest.mark.skipif("CPU_EMULATED" in os.environ, reason="starts emulated runs: this is one")

FILES = (
    "ops/test_ops.py",
    "ops/test_gradients.py",
    "ops/test_dropout.py",
    "ops/test_bfloat16_terms.py",
    "ops/test_fuzz.py",
    "cpu/test_algorithms.py",
)
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mavx512bf16")
FLAGS = {"avx512bf16": AVX512, "amx": (*AVX512, "-mamx-tile", "-mamx-bf16")}
INSTRUCTIONS = {"avx512bf16": "vdpbf16ps", "amx": "tdpbf16ps"}


def run(instruction_set: str, variant: str, every: int, fewest: int) -> None:
    reason = cuda_emulation.unavailable_reason(variant)
    if reason is not None:
        pytest.skip(f"no emulation: {reason}")
    environment = cuda_emulation.environment(variant)
    environment |= {"CPU_EMULATED": str(cpu_emulation.build(variant)), cpu_emulation.INSTRUCTION_SET: instruction_set}
    assert count_passed(FILES, environment, every=every, processes=1) >= fewest


@pytest.mark.parametrize("instruction_set", ["amx", pytest.param("avx512bf16", marks=pytest.mark.exhaustive)])
def test_the_kernels_pass_the_ops_tests(instruction_set, exhaustive):
    every, fewest = (1, 600) if exhaustive else (11, 55)
    run(instruction_set, "plain", every, fewest)


@pytest.mark.exhaustive
@pytest.mark.parametrize("instruction_set", cpu_emulation.SETS)
def test_no_access_is_out_of_bounds(instruction_set):
    run(instruction_set, "address", every=7, fewest=60)


def test_the_emulation_aborts_where_the_processor_would_fault(tmp_path):
    if cuda_emulation.compiler() is None:
        pytest.skip("no C++ compiler is found")
    program = tmp_path / "misuse"
    command = [
        cuda_emulation.compiler(),
        "-std=c++17",
        f"-I{CSRC}",
        str(TESTS / "cpu" / "tile_misuse.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    assert subprocess.run([str(program), "0"], check=False).returncode == 0
    for use in range(1, 9):
        done = subprocess.run([str(program), str(use)], check=False, capture_output=True, text=True)
        assert done.returncode == -signal.SIGABRT and "emulated tiles:" in done.stderr, use


@pytest.mark.exhaustive
@pytest.mark.parametrize("instruction_set", cpu_emulation.SETS)
def test_the_processor_s_own_code_holds_the_instructions(instruction_set, tmp_path):
    """In each of the products: every function that multiplies rows or sums outer products inlines them."""
    compiler, objdump = cuda_emulation.compiler(), shutil.which("objdump")
    if compiler is None or objdump is None:
        pytest.skip("a C++ compiler and objdump are needed")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    known = [compiler, *FLAGS[instruction_set], "-x", "c++", "-fsyntax-only", os.devnull]
    if not machine.startswith("x86_64") or subprocess.run(known, check=False, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} for {machine.strip()} does not know {' '.join(FLAGS[instruction_set])}")
    source, made = CSRC / "cpu" / "kernels.cpp", tmp_path / "kernels.o"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-w",
            *FLAGS[instruction_set],
            f"-I{CSRC}",
            f"-DROSA_ISA={instruction_set}",
            "-c",
            source,
            "-o",
            made,
        ],
        check=True,
    )
    code = subprocess.run(
        [objdump, "-dC", "--no-show-raw-insn", made], capture_output=True, text=True, check=True
    ).stdout
    counts = {
        name: sum(body.count(INSTRUCTIONS[instruction_set]) for title, body in functions(code) if name in title)
        for name in ("Bf16Epilogue::add_to", "forward_bf16", "BackwardBf16::sweep_block", "outer_rows")
    }
    print(f"{instruction_set}: {INSTRUCTIONS[instruction_set]} by function: {counts}")
    assert all(counts.values()), counts


def functions(code: str):
    """(title, body) of each function of a disassembly."""
    parts = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2])
