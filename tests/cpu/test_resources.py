"""The CPU kernels use the threads they are given, give the same bits each time, and no memory that grows with tokens.

Every measurement runs in a fresh process: python tests/cpu/test_resources.py NAME prints one of MEASUREMENTS as JSON.
"""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rosa_kernels as rk
from rosa_kernels.backends.cpu import ops as cpu_ops
from rosa_kernels.backends.cpu.binary import INDICES_CHECKED

pytestmark = pytest.mark.skipif(
    rk.available_backends()["cpu"] is not None, reason=f"backend cpu: {rk.available_backends()['cpu']}"
)
needs_proc = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORD, MIB = 4, 2**20
RANK, SCALING = 8, 0.5


def measured(name: str):
    # Workers that wait must sleep, not spin: the CPU time of a thread is then its work. With a fixed threshold malloc
    # maps every large block by itself and gives it back when it is freed, so that a block shows at each use.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


class Layer:
    """W, A, B and S of 1 in 16 entries; x, dy and outputs for the kernels alone, made once and already touched."""

    STRUCTURES = ("unstructured", "row", "column", "block")

    def __init__(self, tokens: int, out_features: int, in_features: int, dtype: torch.dtype, structure="unstructured"):
        generator = torch.Generator().manual_seed(0)

        def normal(*size, dtype=dtype):
            return torch.empty(size, dtype=dtype).normal_(generator=generator)

        size = (out_features, in_features)
        self.x, self.dy, self.weight = normal(tokens, in_features), normal(tokens, out_features), normal(*size)
        self.A, self.B = normal(RANK, in_features, dtype=torch.float32), normal(out_features, RANK, dtype=torch.float32)
        self.pattern = {
            "unstructured": lambda: rk.CSRPattern.random(size, 1 / 16, seed=1),
            "row": lambda: rk.CSRPattern.from_rows(torch.arange(1, out_features, 16), size),
            "column": lambda: rk.CSRPattern.from_columns(torch.arange(1, in_features, 16), size),
            "block": lambda: rk.CSRPattern.from_blocks(
                torch.eye(-(-out_features // 16), -(-in_features // 16), dtype=torch.bool), 16, size
            ),
        }[structure]()
        self.values = normal(self.pattern.nnz, dtype=torch.float32)
        self.leaves = (self.x, self.A, self.B, self.values)
        self.y, self.dx = torch.zeros_like(self.dy), torch.zeros_like(self.x)
        self.gradients = [torch.zeros_like(t) for t in (self.A, self.B, self.values)]

    def kernels_forward(self) -> None:
        indices = self.pattern.crow_indices, self.pattern.col_indices, self.pattern.structure
        cpu_ops._kernels.forward(
            self.y, self.x, None, None, self.A, self.B, SCALING, self.values, *indices, None, 0, 1.0, False, False,
            INDICES_CHECKED,
        )  # fmt: skip

    def kernels_backward(self) -> None:
        indices = (
            self.pattern.crow_indices,
            self.pattern.col_indices,
            *self.pattern.transpose(),
            self.pattern.structure,
        )
        cpu_ops._kernels.backward(
            self.dx, *self.gradients, self.dy, self.x, None, self.A, self.B, SCALING, self.values, *indices, None, 0,
            1.0, False, INDICES_CHECKED,
        )  # fmt: skip

    def step(self, base: bool = True, dropout_p: float = 0.0) -> list[torch.Tensor]:
        """Forward and backward by the public functions: y and the gradients of x, A, B and values."""
        for leaf in self.leaves:
            leaf.requires_grad_()
        adapter = (self.A, self.B, SCALING, self.values, self.pattern)
        torch.manual_seed(7)  # dropout draws its own seed from it
        if base:
            y = rk.rosa_linear(self.x, self.weight, None, *adapter, dropout_p=dropout_p)
        else:
            y = rk.rosa_delta(self.x, *adapter, dropout_p=dropout_p)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]

    def lora_step(self) -> list[torch.Tensor]:
        leaves = [leaf.requires_grad_() for leaf in self.leaves[:3]]
        y = rk.lora_linear(self.x, self.weight, None, self.A, self.B, SCALING)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def frozen_step(self) -> list[torch.Tensor]:
        x = self.x.detach()
        return [F.linear(x, self.weight), self.dy @ self.weight]


# Threads


def cpu_seconds() -> dict[str, float]:
    """Of every thread that this process has now; one that ends meanwhile is left out."""
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seconds[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return seconds


def shares_of_threads() -> dict[str, dict[str, list[list[float]]]]:
    """{kernel: {thread count: the share of the process's CPU time of each thread that worked and is still here}}.

    One thread is measured twice: at first, and after there were more.
    """
    layer, shares = Layer(4096, 256, 256, torch.float32), {}
    wide = Layer(9, 1024, 1024, torch.float32)  # merging takes a thread for every 32768 elements
    kernels = {
        "forward": layer.kernels_forward,
        "backward": layer.kernels_backward,
        "merge": lambda: rk.csr_add(wide.weight, wide.values, wide.pattern),
    }
    for count in (1, 3, 2, 1):
        torch.set_num_threads(count)
        for name, kernel in kernels.items():
            kernel()
            before, start = cpu_seconds(), time.process_time()
            while time.process_time() < start + 0.1:
                kernel()
            total = time.process_time() - start
            took = [after - before.get(task, 0.0) for task, after in cpu_seconds().items()]
            shares.setdefault(name, {}).setdefault(str(count), []).append([t / total for t in took if t > 0.02 * total])
    return shares


@needs_proc
def test_the_kernels_use_as_many_threads_as_torch_is_told():
    for name, by_count in measured("shares_of_threads").items():
        for count, measurements in by_count.items():
            for shares in measurements:
                assert len(shares) == int(count), (name, by_count)
                assert min(shares) > 0.25 / int(count), (name, by_count)
                assert sum(shares) > 0.9, f"{name}: threads that came and went worked too"


# Bits


def digests() -> dict[str, list[str]]:
    """{threads, structure and dtype: a digest of every result, for each of several runs}."""
    found = {}
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for structure in Layer.STRUCTURES:
            for dtype_name, dtype in DTYPES.items():
                runs = found[f"{count} threads, {structure}, {dtype_name}"] = []
                for _ in range(3):
                    runs.append(digest_of(structure, dtype))
    return found


def digest_of(structure: str, dtype: torch.dtype) -> str:
    """Tokens of 5 blocks, the last one cut; above and below merging; with and without dropout."""
    many, few = (Layer(tokens, 66, 50, dtype, structure) for tokens in (300, 20))
    many.kernels_forward()
    many.kernels_backward()
    results = [many.y, many.dx, *many.gradients]
    results += [*many.step(), *few.step(), *many.step(dropout_p=0.3)]
    results += [rk.spmm(many.x, many.values, many.pattern), rk.sddmm(many.dy, many.x, many.pattern)]
    results.append(rk.csr_add(many.weight, many.values, many.pattern))
    digest = hashlib.sha256()
    for result in results:
        digest.update(result.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.exhaustive
def test_the_same_bits_on_every_run_at_each_thread_count():
    first, second = measured("digests"), measured("digests")
    for case, runs in first.items():
        assert len(set(runs)) == 1, case
        assert second[case] == runs, f"{case}: another process, other bits"


# Memory

TOKENS, FEATURES = 4096, 128


def peak_bytes(function) -> int:
    """By how much the resident memory rose while function() ran."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    status = Path("/proc/self/status")

    def kib(field):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    before = kib("VmRSS")
    result = function()  # held until the peak is read
    rise = kib("VmHWM") - before
    del result
    return rise * 1024


def memory_peaks() -> dict[str, dict[str, list[int]]]:
    """{dtype: {call: peak bytes for TOKENS and for 4 TOKENS}}, after a call that warms up."""
    torch.set_num_threads(2)
    peaks = {}
    for dtype_name, dtype in DTYPES.items():
        by_call = peaks[dtype_name] = {}
        for tokens in (256, TOKENS, 4 * TOKENS):
            layer = Layer(tokens, FEATURES, FEATURES, dtype)
            calls = {
                "kernels, forward": layer.kernels_forward,
                "kernels, backward": layer.kernels_backward,
                "frozen": layer.frozen_step,
                "rosa_linear": layer.step,
                "rosa_linear, dropout": lambda layer=layer: layer.step(dropout_p=0.3),
                "lora_linear": layer.lora_step,
                "rosa_delta": lambda layer=layer: layer.step(base=False),
            }
            for name, call in calls.items():
                by_call.setdefault(name, []).append(peak_bytes(call))
    return {dtype: {name: rises[1:] for name, rises in by_call.items()} for dtype, by_call in peaks.items()}


@pytest.mark.exhaustive
@needs_proc
def test_memory_beyond_the_outputs_does_not_grow_with_tokens_but_for_H():
    """Peak of 4 T tokens less that of T, against sizes. Pages and the threads' stacks leave a quarter MiB of doubt."""
    more, slack = 3 * TOKENS, MIB // 4
    for dtype_name, peaks in measured("memory_peaks").items():
        growth = {name: most - least for name, (least, most) in peaks.items()}
        token_sized = more * FEATURES * DTYPES[dtype_name].itemsize  # y or dx; x and dy are as large
        H = more * RANK * WORD
        assert token_sized > 3 * (H + slack)  # or no bound below could tell
        # The kernels keep blocks of 64 tokens and one set of gradients a thread.
        for name in ("kernels, forward", "kernels, backward"):
            assert growth[name] < slack, (dtype_name, name, peaks)
        # y and dx are results; the layer by itself makes both, and whatever the library's GEMM needs for them.
        assert growth["frozen"] > token_sized, "the meter sees nothing"
        assert growth["rosa_delta"] < 2 * token_sized + H + slack, (dtype_name, peaks)
        for name in ("rosa_linear", "rosa_linear, dropout", "lora_linear"):
            assert growth[name] < growth["frozen"] + H + slack, (dtype_name, name, peaks)


MEASUREMENTS = {function.__name__: function for function in (shares_of_threads, digests, memory_peaks)}

if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]]()))
