"""The kernels' own operators, called by anyone with anything: an error that names the argument, or right numbers.

The calls run in processes of their own: one that dies is a failure of its test, and its last line names the call.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

import cpu_emulation
import cpu_kernel_calls
import cuda_emulation
import hostile_calls
import rosa_kernels as rk
from paths import TESTS
from rosa_kernels.backends.cpu import binary

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)


def run(first: int, end: int, **environment: str) -> tuple[int, int, int]:
    """How many calls were right, how many raised, and how many of the errors name an argument."""
    paths = os.pathsep.join((str(TESTS / "support"), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-W", "ignore", str(TESTS / "support" / "hostile_calls.py"), str(first), str(end)]
    environment = os.environ | {"PYTHONPATH": paths} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    right, raised, named = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    return right, raised, named


def test_changed_calls_raise_or_are_right():
    right, raised, named = run(0, 600)
    assert right > 100 and raised > 300 and named == raised


@pytest.mark.exhaustive
@pytest.mark.parametrize("instruction_set", ["amx", "avx512bf16", "avx512", "avx2", "portable"])
def test_changed_calls_on(instruction_set):
    if instruction_set not in binary.kernels.instruction_sets().split():
        pytest.skip(f"this processor has no {instruction_set}, or the compiler had none")
    right, raised, named = run(1000, 9000, ROSA_KERNELS_CPU=instruction_set)
    assert right > 1500 and raised > 4000 and named == raised


@pytest.mark.exhaustive
@pytest.mark.parametrize("instruction_set", [*cpu_emulation.SETS, "portable"])
def test_changed_calls_keep_to_their_memory(instruction_set):
    """AddressSanitizer watches the kernels, and the checks, in the emulation's build."""
    reason = cuda_emulation.unavailable_reason("address")
    if reason is not None:
        pytest.skip(f"no emulation: {reason}")
    environment = cuda_emulation.environment("address") | {cpu_emulation.INSTRUCTION_SET: instruction_set}
    right, raised, named = run(10000, 12000, **environment, CPU_EMULATED=str(cpu_emulation.build("address")))
    assert right > 400 and raised > 1000 and named == raised


def valid(op: str, **wanted) -> dict:
    """The arguments of the first valid call like this with low-rank and sparse parts and some entries."""
    calls = (cpu_kernel_calls.Call(number, op=op, parts=(True, True), **wanted) for number in range(100))
    return next(call.arguments for call in calls if call.nnz > 60)


INDICES = [
    ("crow", lambda t: t + 1, "start at 0"),
    ("crow", lambda t: torch.cat([t[:1], t[1:-1].flip(0), t[-1:]]), "fall"),
    ("crow", lambda t: torch.cat([t[:-1], t[-1:] - 1]), "end at nnz|fall"),
    ("col", lambda t: torch.cat([t[:-1], t[-1:] + 100]), "below"),
    ("col", lambda t: torch.cat([t[:1] - 100, t[1:]]), "from 0"),
    ("col", lambda t: t.flip(0), "rise"),
]


@pytest.mark.parametrize("op", cpu_kernel_calls.NAMES)
@pytest.mark.parametrize("name,change,words", INDICES)
def test_indices_are_read_first(op, name, change, words):
    arguments = valid(op, structure="column", outputs=33, inputs=66)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"{name}: .*({words})"):
        getattr(binary.kernels, op)(*arguments.values())


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("claimed", [1, 2, 4], ids=["row", "column", "block16"])
@pytest.mark.parametrize("drawn", ["unstructured", "row", "column", "block", "block16"])
def test_a_structure_is_believed_where_it_is_true(op, claimed, drawn):
    arguments = valid(op, structure=drawn, outputs=48, inputs=33)
    if arguments["structure"] == claimed:
        assert hostile_calls.fault(op, arguments) == (None, None)
        return
    arguments["structure"] = claimed
    with pytest.raises(RuntimeError, match="structure: expected"):
        getattr(binary.kernels, op)(*arguments.values())


@pytest.mark.parametrize("name", ["ccol", "row", "permutation"])
@pytest.mark.parametrize("change", ["flip", "shift"])
def test_a_transpose_is_that_of_the_pattern(name, change):
    arguments = valid("backward", structure="unstructured", outputs=33, inputs=66)
    indices = arguments[name]
    arguments[name] = indices.flip(0) if change == "flip" else torch.cat([indices[1:], indices[:1]])
    with pytest.raises(RuntimeError, match=f"({name}|permutation): expected"):
        binary.kernels.backward(*arguments.values())


@pytest.mark.parametrize("op,result", [(op, name) for op, names in cpu_kernel_calls.RESULTS.items() for name in names])
def test_a_result_may_not_lie_over_the_indices(op, result):
    """What a kernel writes would change the indices that were read before."""
    arguments = valid(op, structure="row", outputs=33, inputs=66)
    ints = arguments["col"]
    if (
        arguments[result] is None
        or arguments[result].dtype != torch.float32
        or ints.numel() < arguments[result].numel()
    ):
        arguments[result] = ints.view(torch.float32)[:1]
    else:
        arguments[result] = ints.view(torch.float32)[: arguments[result].numel()].view(arguments[result].shape)
    with pytest.raises(RuntimeError, match=f"{result}: expected no memory of col"):
        getattr(binary.kernels, op)(*arguments.values())


WRONG = [
    ("decode", "x", lambda t: t[:1].expand(65, -1), "at most 64 tokens"),
    ("decode", "x", lambda t: t[0, 0], "got a number"),
    ("decode", "x", lambda t: t.double(), "float32 or bfloat16"),
    ("decode", "out_features", lambda n: -1, "0 to 2"),
    ("decode", "threshold", lambda n: -1, "from 0 to 2"),
    ("forward", "threshold", lambda n: 2**32 + 1, "from 0 to 2"),
    ("forward", "structure", lambda n: 5, "from 0 to 4"),
    ("forward", "x", lambda t: t.to_sparse(), "dense"),
    ("forward", "y", lambda t: t.to("meta"), "on the CPU"),
    ("forward", "y", lambda t: t[:1].expand(t.shape), "overlap"),
    ("backward", "structure", lambda n: -(2**40), "from 0 to 4"),
    ("backward", "permutation", lambda t: torch.cat([t[:-1], t[-1:] * 0 + 2**31 - 1]), "the place by rows"),
    ("backward", "permutation", lambda t: torch.cat([t[:-1], t[-1:] * 0 - 1]), "the place by rows"),
    ("backward", "row", lambda t: torch.cat([t[:-1], t[-1:] * 0 + 2**31 - 1]), "below"),
    ("backward", "row", lambda t: None, "a tensor as for ccol"),
    ("backward", "dvalues", lambda t: torch.zeros(1), "expected size"),
    ("merge", "first_row", lambda n: 2**63 - 1, "within the weight"),
    ("merge", "first_column", lambda n: -1, "within the weight"),
    ("gemm", "first", lambda n: 2**62, "within the weight"),
    ("gemm", "bias", lambda t: torch.zeros(1000), "expected size"),
]  # fmt: skip


@pytest.mark.parametrize("op,name,change,words", WRONG)
def test_an_error_names_the_argument(op, name, change, words):
    arguments = valid(op, structure="unstructured", outputs=33, inputs=66, tokens=7)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"{name.replace('first', 'first.*')}: .*{words}"):
        getattr(binary.kernels, op)(*arguments.values())


@pytest.mark.parametrize("op", cpu_kernel_calls.NAMES)
def test_a_required_tensor_is_not_none(op):
    """PyTorch lets None through."""
    for name in {"x", "y", "dy", "out"} & set(cpu_kernel_calls.NAMES[op]):
        arguments = valid(op, structure="unstructured", outputs=33, inputs=66)
        arguments[name] = None
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor, got None"):
            getattr(binary.kernels, op)(*arguments.values())
