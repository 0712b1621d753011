"""Offsets past 2**31: rows that far apart, entries of S that far along, and whole tensors that large.

The first two cost no memory: the tensors are views of sparse files, of which few pages are ever touched.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rosa_kernels as rk
from cpu_kernel_calls import BF16, FP32, NAMES, Call
from hostile_calls import fault
from rosa_kernels.backends.cpu import binary
from rosa_kernels.pattern import COLUMN, MOST_ENTRIES, ROW

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)

MATRICES = ("x", "y", "dx", "dy", "weight", "out")
ROOM = 2**20  # elements of a file beyond 2**31, for all that lies in it
PLACE = 4096  # elements from one argument's first row to the next one's


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """dtype -> that many zeros in a sparse file."""
    folder = tmp_path_factory.mktemp("sparse_files")
    return {
        dtype: torch.from_file(str(folder / str(dtype)), shared=True, size=2**31 + ROOM, dtype=dtype)
        for dtype in (FP32, BF16, torch.int32)
    }


def far_apart(matrix: Tensor, file: Tensor, place: int) -> Tensor:
    """The same matrix with its last row behind 2**31 elements."""
    rows = max(2, matrix.shape[0])
    stride = math.ceil(2**31 / (rows - 1))
    return file.as_strided(matrix.shape, (stride, 1), place * PLACE).copy_(matrix)


def far_along(numbers: Tensor, file: Tensor) -> Tensor:
    """MOST_ENTRIES numbers that end with these."""
    every = file[:MOST_ENTRIES]
    every[MOST_ENTRIES - numbers.numel() :] = numbers
    return every


@pytest.mark.parametrize("op", NAMES)
def test_rows_far_apart(files, op, exhaustive):
    for call in (Call(number, op=op) for number in range(25 if exhaustive else 4)):
        for place, name in enumerate(MATRICES):
            matrix = call.arguments.get(name)
            if isinstance(matrix, Tensor):
                call.arguments[name] = far_apart(matrix, files[matrix.dtype], place)
        assert fault(op, call.arguments, checked=True) == (None, None), call.arguments


@pytest.mark.parametrize("op", [op for op in NAMES if op != "backward"])
def test_entries_far_along(files, op):
    """The entries before them are no row's, which only callers that checked the indices can say. Whole rows and columns
    are left out, which count on every entry; dvalues and the transpose would take 8 GiB."""
    calls = [Call(number, op=op, parts=(number % 2 == 0, True)) for number in range(80)]
    calls = [call for call in calls if call.nnz and call.arguments.get("structure") not in (ROW, COLUMN)]
    assert len(calls) > 20
    for call in calls:
        near = dict(call.arguments)
        results = {name: near[name].clone() for name in ("y", "out") if name in near}
        far = near | {"crow": near["crow"] + (MOST_ENTRIES - call.nnz)}
        far |= {name: far_along(near[name], files[near[name].dtype]) for name in ("values", "col")}
        kernel = getattr(binary.kernels, op)
        returned = [kernel(*arguments.values(), True) for arguments in (near | results, far)]
        got = [returned] if op == "decode" else [(results[name], far[name]) for name in results]
        assert all(torch.equal(a, b) for a, b in got), call.arguments


def available_bytes() -> int:
    """What Linux would give without swapping; 0 where another system does not say."""
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("with_weight", [True, False], ids=["layer", "adapter"])
def test_more_than_2_31_elements(with_weight):
    """x and dx take 4 GiB each. Tokens on both sides of the boundary have the results that they have alone."""
    tokens, features, outputs = 2**25 + 70, 64, 8
    if available_bytes() < 18 * 2**30:
        pytest.skip(f"18 GiB of memory are needed, and {available_bytes() / 2**30:.1f} GiB are available")
    pattern = rk.CSRPattern.random((outputs, features), 0.1, seed=0)
    weight = torch.randn(outputs, features).to(BF16) if with_weight else None
    A, B, values = torch.randn(4, features), torch.randn(outputs, 4), torch.randn(pattern.nnz)
    x, dy = torch.zeros(tokens, features, dtype=BF16), torch.zeros(tokens, outputs, dtype=BF16)
    some = torch.cat([torch.arange(70), torch.arange(2**25 - 70, tokens)])
    x[some], dy[some] = torch.randn(len(some), features).to(BF16), torch.randn(len(some), outputs).to(BF16)

    def results(x, dy):
        leaves = [t.detach().requires_grad_() for t in (x, A, B, values)]
        if with_weight:
            y = rk.rosa_linear(leaves[0], weight, None, *leaves[1:3], 0.5, leaves[3], pattern)
        else:
            y = rk.rosa_delta(*leaves[:3], 0.5, leaves[3], pattern)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    large, small = results(x, dy), results(x[some], dy[some])
    for name, got, right in zip(("y", "dx", "dA", "dB", "dvalues"), large, small, strict=True):
        got = got[some] if name in ("y", "dx") else got
        torch.testing.assert_close(got, right, rtol=3e-2, atol=3e-2 * float(right.abs().max()), msg=name)
