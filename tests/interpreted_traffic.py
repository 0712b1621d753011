"""Runs ops under Triton's interpreter and counts what their kernels load, store and multiply.

A script of its own, which test_triton_traffic.py runs: TRITON_INTERPRET=1 is read when Triton is imported. Prints a
JSON list, the formulas of bench/kernel_traffic.py beside the counts: {"case", "kernel", "flops": [counted, formula],
"operands": {"load x": {"asked": [counted, formula], "distinct": likewise, "sectors": likewise}, ...}} for each launch.
"""

import itertools
import json
import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from kernel_traffic import SECTOR, Launch

from rosa_kernels import CSRPattern
from rosa_kernels.backends import triton as backend
from rosa_kernels.backends.triton import runtime
from rosa_kernels.backends.triton.sddmm import take as take_sddmm
from rosa_kernels.plan import gpu

FP32, BF16 = torch.float32, torch.bfloat16


class Meter:
    """While active, counts the lanes of every load and store by operand, and the FLOPs of every dot."""

    def __init__(self):
        self.counts, self.operands = [], []

    def __enter__(self):
        load, store, dot = (
            getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "create_dot")
        )

        def counted_load(builder, pointers, mask, *rest):
            self._count("load", pointers, mask)
            return load(builder, pointers, mask, *rest)

        def counted_store(builder, pointers, value, mask, *rest):
            self._count("store", pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def counted_dot(builder, a, b, *rest):
            self.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
            return dot(builder, a, b, *rest)

        methods = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
        self.patches = [mock.patch.multiple(InterpreterBuilder, **methods)]
        self.patches.append(mock.patch.object(runtime, "launch", self._launcher(runtime.launch)))
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *exception):
        for patch in self.patches:
            patch.stop()

    def _launcher(self, launch):
        def metered(kernel, grid, *args, config, **constants):
            self.operands = [(name, a) for name, a in zip(kernel.arg_names, args) if isinstance(a, torch.Tensor)]
            self.flops, self.addresses, self.sectors = 0, defaultdict(list), defaultdict(int)
            launch(kernel, grid, *args, config=config, **constants)
            self.counts.append(self._beside(Launch.of(kernel, grid, args, config, constants)))

        return metered

    def _count(self, kind, pointers, mask):
        active = np.asarray(pointers.data)[np.asarray(mask.data)].ravel()
        if active.size:
            operand = f"{kind} {self._operand_at(int(active[0]))}"
            self.addresses[operand].append(active)
            self.sectors[operand] += np.unique(active // SECTOR).size

    def _operand_at(self, address):
        for name, tensor in self.operands:
            storage = tensor.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return name
        raise LookupError(f"address {address} is in none of {[name for name, _ in self.operands]}")

    def _beside(self, launch: Launch) -> dict:
        work = launch.work()
        expected = defaultdict(lambda: (0, 0, 0))
        for kind, accesses in (("load", work.loads), ("store", work.stores)):
            for access in accesses:
                asked, distinct, sectors = expected[f"{kind} {access.tensor}"]
                expected[f"{kind} {access.tensor}"] = (
                    asked + access.asked, max(distinct, access.distinct), sectors + launch.sectors(access)
                )  # fmt: skip
        operands = {}
        for operand in expected.keys() | self.addresses.keys():
            addresses = np.concatenate(self.addresses.get(operand, [np.empty(0)]))
            counted = addresses.size, np.unique(addresses).size, self.sectors[operand]
            pairs = zip(counted, expected[operand])
            operands[operand] = dict(zip(("asked", "distinct", "sectors"), map(list, pairs)))
        return {"kernel": launch.kernel, "flops": [self.flops, work.flops], "operands": operands}


def step(tokens, outputs, inputs, r, pattern, *, dtype=FP32, adapter_dtype=FP32, base=True, dropout_p=0.0):
    """One forward and one backward with every gradient that an adapter needs."""

    def random(*size, of=dtype):
        return torch.randn(size).to(of)

    x, dy = random(tokens, inputs), random(tokens, outputs)
    weight, bias = (random(outputs, inputs), random(outputs)) if base else (None, None)
    A, B = (random(r, inputs, of=adapter_dtype), random(outputs, r, of=adapter_dtype)) if r else (None, None)
    seed = torch.tensor([7]) if dropout_p else None
    values = crow = col = ccol = row = permutation = None
    if pattern is not None:
        values, crow, col = random(pattern.nnz, of=adapter_dtype), pattern.crow_indices, pattern.col_indices
        ccol, row, permutation = pattern.transpose()
    structure = 0 if pattern is None else pattern.structure
    needs = [True, False, False, r > 0, r > 0, pattern is not None]
    backend.rosa_linear(x, weight, bias, A, B, 2.0, values, crow, col, structure, dropout_p, seed)
    backend.rosa_linear_backward(
        dy, x, weight, A, B, 2.0, values, crow, col, ccol, row, permutation, structure, dropout_p, seed, needs
    )


def every_way(run):
    """run() once for each position in the lists of legal ways, the shorter lists again from their start."""
    for position in itertools.count():
        longest = 1

        def at_position(ways, position=position):
            nonlocal longest
            longest = max(longest, len(ways))
            return ways[position % len(ways)]

        with (
            mock.patch.object(gpu, "choose_linear", lambda call, rates: at_position(gpu.linear_ways(call))),
            mock.patch.object(gpu, "choose_sddmm", lambda call, rates: at_position(gpu.sddmm_ways(call))),
            mock.patch.object(gpu, "low_rank_gradients_by_library", lambda *sizes: False),
        ):
            run()
        if position + 1 >= longest:
            return


def csr_add(S):
    backend.csr_add(torch.randn(S.shape), torch.randn(S.nnz), S.crow_indices, S.col_indices)


def as_many_tokens(run):
    """run() with the ways of many tokens, as few as they are: gathers from a copy by columns."""
    with mock.patch.object(gpu, "FEW_TOKENS", 0):
        run()


def whole_rows(shape):
    return CSRPattern.from_rows(torch.arange(1, shape[0], 5), shape)


def whole_columns(shape):
    return CSRPattern.from_columns(torch.arange(2, shape[1], 7), shape)


def checkerboard(shape):
    down, across = (torch.arange(features // 16) for features in shape)
    return CSRPattern.from_blocks(down[:, None] % 2 == across % 2, 16, shape)


def aligned():
    """Whole sectors, and one entry a row in a sector of x of its own: no gather meets a sector twice in a tile."""
    tokens, outputs, inputs = 32, 16, 256
    mask = torch.zeros(outputs, inputs, dtype=torch.bool)
    mask[torch.arange(outputs), torch.arange(outputs) * 16] = True
    S = CSRPattern.from_mask(mask)
    x, dy, weight, A, B = (
        torch.randn(size).to(BF16)
        for size in ((tokens, inputs), (tokens, outputs), mask.shape, (16, inputs), (outputs, 16))
    )
    values = torch.randn(outputs).to(BF16)
    backend.rosa_linear(x, weight, None, A, B, 2.0, values, S.crow_indices, S.col_indices, S.structure, 0.0, None)
    for way in ("entries", "entries_columns"):
        take_sddmm(way, dy, x, S.crow_indices, S.col_indices, S.structure, BF16)


RAGGED, EVEN, TOKENS = (40, 50), (32, 64), 20
CASES = {  # density 0.15: no tile is empty
    "lora": lambda: step(TOKENS, *RAGGED, 5, None),
    "lora mixed dropout": lambda: step(TOKENS, *RAGGED, 70, None, dtype=BF16, dropout_p=0.3),
    "lora few": lambda: step(3, *RAGGED, 16, None, dtype=BF16, adapter_dtype=BF16),
    "rosa": lambda: step(TOKENS, *RAGGED, 5, CSRPattern.random(RAGGED, 0.15, 1), dtype=BF16, adapter_dtype=BF16),
    "rosa mixed": lambda: step(TOKENS, *EVEN, 5, CSRPattern.random(EVEN, 0.15, 1), dtype=BF16, dropout_p=0.3),
    "rosa fp32": lambda: step(TOKENS, *RAGGED, 5, CSRPattern.random(RAGGED, 0.15, 1)),
    "rows": lambda: step(TOKENS, *RAGGED, 5, whole_rows(RAGGED), dtype=BF16),
    "columns": lambda: step(TOKENS, *RAGGED, 5, whole_columns(RAGGED)),
    "blocks": lambda: step(TOKENS, *EVEN, 5, checkerboard(EVEN)),
    "sparse alone": lambda: step(TOKENS, *RAGGED, 0, CSRPattern.random(RAGGED, 0.15, 1), base=False),
    "sparse alone, many": lambda: as_many_tokens(CASES["sparse alone"]),
    "aligned": aligned,
    "aligned, many": lambda: as_many_tokens(aligned),
    "csr_add": lambda: csr_add(CSRPattern.random(RAGGED, 0.15, 1)),
}


def main() -> None:
    torch.manual_seed(0)
    launches = []
    for name, run in CASES.items():
        with Meter() as meter:
            every_way(run)
        launches += [{"case": name, **count} for count in meter.counts]
    json.dump(launches, sys.stdout)


if __name__ == "__main__":
    main()
