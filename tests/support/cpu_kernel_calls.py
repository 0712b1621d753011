"""Valid calls of torch.ops.rosa_kernels_cpu.*, drawn by number, and the results that plain PyTorch gives for them.

Every tensor lies between NaN, or in int32 between the lowest number: reading there shows in the results, and whoever
writes there changes guards().
"""

import random

import torch
from torch import Tensor

import rosa_kernels as rk
from rosa_kernels import dropout
from rosa_kernels.backends.cpu import binary

FP32, BF16 = torch.float32, torch.bfloat16
GUARD = 64  # elements on either side
STRUCTURES = ("unstructured", "row", "column", "block", "block16")
LOW_RANK, SPARSE, DROPOUT = ("lora_A", "lora_B", "scaling"), ("values", "crow", "col"), ("seed", "threshold", "scale")
NAMES = {
    "decode": ("x", "weight", "bias", *LOW_RANK, *SPARSE, "out_features", *DROPOUT),
    "forward": ("y", "x", "weight", "bias", *LOW_RANK, *SPARSE, "structure", *DROPOUT, "bfloat16_adapters", "fresh_y"),
    "backward": (
        "dx", "dA", "dB", "dvalues", "dy", "x", "weight", *LOW_RANK, *SPARSE, "ccol", "row", "permutation",
        "structure", *DROPOUT, "bfloat16_adapters",
    ),
    "merge": ("out", "weight", *LOW_RANK, *SPARSE, "first_row", "first_column"),
    "gemm": ("y", "x", "weight", "bias", *LOW_RANK, *SPARSE, "first", "transposed"),
}  # fmt: skip
RESULTS = {
    "decode": (), "forward": ("y",), "backward": ("dx", "dA", "dB", "dvalues"), "merge": ("out",), "gemm": ("y",),
}  # fmt: skip
GUARDED: list[Tensor] = []
"""Whole buffers of the current call's tensors."""


def guarded(tensor: Tensor) -> Tensor:
    lowest = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    buffer = torch.full((tensor.numel() + 2 * GUARD,), lowest, dtype=tensor.dtype)
    GUARDED.append(buffer)
    return buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)


def guards() -> list[Tensor]:
    ends = [end for buffer in GUARDED if buffer.numel() > 0 for end in (buffer[:GUARD], buffer[-GUARD:])]
    return [end.view(torch.int16 if end.dtype == BF16 else torch.int32).clone() for end in ends]


class Call:
    """A valid call: its operator and its arguments by name. What is not wanted is drawn."""

    def __init__(self, number: int, **wanted):
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)

        def drawn(name, among):
            value = self.random.choice(among)
            return wanted.get(name, value)

        sizes = (1, 2, 5, 16, 17, 32, 33, 48, 66)
        self.op = drawn("op", tuple(NAMES))
        self.dtype = FP32 if self.op == "gemm" else drawn("dtype", (FP32, BF16))
        self.tokens = drawn("tokens", (1, 3, 17, 64) if self.op == "decode" else (1, 7, 64, 70, 130))
        self.inputs, self.outputs = drawn("inputs", sizes), drawn("outputs", sizes)
        self.r = drawn("r", (1, 3, 4, 17))
        self.low_rank, self.sparse = drawn("parts", ((True, True), (True, False), (False, True)))
        self.structure = drawn("structure", STRUCTURES)
        self.nnz = 0
        everything = self.common()
        everything |= getattr(self, self.op)()
        self.arguments = {name: everything[name] for name in NAMES[self.op]}

    def normal(self, *size, dtype=FP32) -> Tensor:
        return guarded(torch.randn(size, generator=self.generator).to(dtype))

    def common(self) -> dict:
        size = self.outputs, self.inputs
        arguments = dict.fromkeys(
            (*LOW_RANK, *SPARSE, "ccol", "row", "permutation", "seed", "weight", "bias", *RESULTS["backward"])
        )
        arguments |= {"scaling": 0.5, "structure": 0, "threshold": 0, "scale": 1.0, "bfloat16_adapters": False}
        arguments |= {"first": 0, "first_row": 0, "first_column": 0, "transposed": False, "fresh_y": False}
        if self.low_rank:
            arguments |= {"lora_A": self.normal(self.r, self.inputs), "lora_B": self.normal(self.outputs, self.r)}
        if self.sparse:
            pattern = self.pattern(size)
            self.nnz = pattern.nnz
            arguments |= {"values": self.normal(pattern.nnz), "structure": pattern.structure}
            arguments |= {"crow": guarded(pattern.crow_indices), "col": guarded(pattern.col_indices)}
            arguments |= dict(zip(("ccol", "row", "permutation"), map(guarded, pattern.transpose())))
        if self.low_rank and self.op in ("decode", "forward", "backward") and self.random.random() < 0.4:
            threshold = self.random.choice((0, 2**30, 2**32))
            seed = torch.randint(2**62, (1,), generator=self.generator)
            arguments |= {"seed": guarded(seed), "threshold": threshold, "scale": 1.5}
        return arguments

    def pattern(self, size) -> rk.CSRPattern:
        def some(count):
            return torch.randperm(count, generator=self.generator)[: max(1, count // 3)]

        if self.structure == "row":
            return rk.CSRPattern.from_rows(some(size[0]), size)
        if self.structure == "column":
            return rk.CSRPattern.from_columns(some(size[1]), size)
        if self.structure == "unstructured":
            return rk.CSRPattern.random(size, self.random.choice((0.0, 0.1, 0.5)), seed=self.random.randrange(99))
        side = 16 if self.structure == "block16" else 3
        grid = torch.rand(-(-size[0] // side), -(-size[1] // side), generator=self.generator) < 0.5
        return rk.CSRPattern.from_blocks(grid, side, size)

    def decode(self) -> dict:
        size = self.outputs, self.inputs
        weight = self.normal(*size, dtype=self.dtype) if self.random.random() < 0.6 else None
        bias = self.normal(self.outputs, dtype=self.dtype) if self.random.random() < 0.5 else None
        return {"x": self.x(), "weight": weight, "bias": bias, "out_features": self.outputs}

    def x(self) -> Tensor:
        return self.normal(self.tokens, self.inputs, dtype=self.dtype)

    def fused_weight(self) -> Tensor | None:
        served = self.dtype == BF16 and binary.uses_our_gemm(BF16) and self.random.random() < 0.4
        return self.normal(self.outputs, self.inputs, dtype=BF16) if served else None

    def forward(self) -> dict:
        weight = self.fused_weight()
        bias = None if weight is None else self.normal(self.outputs, dtype=BF16)
        fresh_y = weight is None and not self.low_rank and self.random.random() < 0.5
        y = self.normal(self.tokens, self.outputs, dtype=self.dtype)
        return {"y": y, "x": self.x(), "weight": weight, "bias": bias, "fresh_y": fresh_y}

    def backward(self) -> dict:
        wanted = {"dy": self.normal(self.tokens, self.outputs, dtype=self.dtype), "x": self.x()}
        wanted["dx"] = self.normal(self.tokens, self.inputs, dtype=self.dtype)
        if self.low_rank:
            wanted |= {"dA": self.normal(self.r, self.inputs), "dB": self.normal(self.outputs, self.r)}
        if self.sparse:
            wanted["dvalues"] = self.normal(self.nnz)
        for name in RESULTS["backward"]:
            if self.random.random() < 0.2:
                wanted[name] = None
        wanted["weight"] = None if wanted.get("dx") is None else self.fused_weight()
        return wanted

    def merge(self) -> dict:
        rows, columns = self.random.randint(1, self.outputs), self.random.randint(1, self.inputs)
        dtype = FP32 if self.low_rank else self.dtype
        return {
            "out": self.normal(rows, columns, dtype=dtype),
            "weight": self.normal(self.outputs, self.inputs, dtype=self.dtype),
            "first_row": self.random.randint(0, self.outputs - rows),
            "first_column": self.random.randint(0, self.inputs - columns),
        }

    def gemm(self) -> dict:
        transposed = self.random.random() < 0.5
        length, features = (self.outputs, self.inputs) if transposed else (self.inputs, self.outputs)
        count = self.random.randint(1, features)
        return {
            "y": self.normal(self.tokens, count),
            "x": self.normal(self.tokens, length),
            "weight": self.normal(self.outputs, self.inputs),
            "bias": self.normal(count) if self.random.random() < 0.5 else None,
            "first": self.random.randint(0, features - count),
            "transposed": transposed,
        }


def expected(op: str, arguments: dict) -> dict[str, Tensor]:
    """What each result of the call must hold, in float64; "" is what the operator returns."""
    a = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    out_features, in_features = _features(op, a)
    S = _dense(arguments, a, out_features, in_features)
    A, B = a["lora_A"], a["lora_B"]
    delta = torch.zeros(out_features, in_features, dtype=torch.float64) if A is None else a["scaling"] * (B @ A)
    weight = 0.0 if a.get("weight") is None else a["weight"]
    bias = 0.0 if a.get("bias") is None else a["bias"]
    if op == "merge":
        rows, columns = a["out"].shape
        merged = (weight + delta + S)[a["first_row"] :, a["first_column"] :]
        return {"out": merged[:rows, :columns]}
    if op == "gemm":
        first, count = a["first"], a["y"].shape[1]
        merged = weight + delta + S
        strip = merged[:, first : first + count] if a["transposed"] else merged[first : first + count].T
        return {"y": a["x"] @ strip + bias}
    x = a["x"].reshape(-1, in_features)
    kept = _kept(arguments, x)
    if op == "backward":
        return _gradients(a, S, delta, weight, x, kept)
    y = x @ S.T + (kept * x) @ delta.T + (x @ weight.T if isinstance(weight, Tensor) else 0.0) + bias
    if op == "decode":
        return {"": y.view(*a["x"].shape[:-1], out_features)}
    return {"y": y if a["fresh_y"] or isinstance(weight, Tensor) else a["y"] + y}


def _features(op: str, a: dict) -> tuple[int, int]:
    if op in ("merge", "gemm"):
        return tuple(a["weight"].shape)
    out_features = {"decode": lambda: a["out_features"], "forward": lambda: a["y"].shape[1]}
    return out_features.get(op, lambda: a["dy"].shape[1])(), a["x"].shape[-1]


def _dense(arguments: dict, a: dict, out_features: int, in_features: int) -> Tensor:
    S = torch.zeros(out_features, in_features, dtype=torch.float64)
    if arguments["values"] is not None and arguments["values"].numel():
        rows = torch.arange(out_features).repeat_interleave(arguments["crow"].long().diff())
        S[rows, arguments["col"].long()] = a["values"]
    return S


def _kept(arguments: dict, x: Tensor) -> Tensor | float:
    """The factor of each element of x on the low-rank path."""
    if arguments["seed"] is None:
        return 1.0
    mask = dropout.keep_mask(arguments["seed"].reshape(1), *x.shape, arguments["threshold"] / 2**32)
    return mask.double() * arguments["scale"]


def _gradients(a: dict, S: Tensor, delta: Tensor, weight, x: Tensor, kept) -> dict[str, Tensor]:
    dy = a["dy"]
    results = {}
    if a["dx"] is not None:
        before = dy @ weight if isinstance(weight, Tensor) else a["dx"]
        results["dx"] = before + dy @ S + kept * (dy @ delta)
    if a["dA"] is not None:
        results["dA"] = a["scaling"] * a["lora_B"].T @ dy.T @ (kept * x)
    if a["dB"] is not None:
        results["dB"] = a["scaling"] * dy.T @ (kept * x) @ a["lora_A"].T
    if a["dvalues"] is not None:
        # The same product at the places of S, in the order of the values.
        marks = dict(a, values=torch.arange(1.0, a["dvalues"].numel() + 1, dtype=torch.float64))
        order = _dense(dict(a, values=a["dvalues"]), marks, *S.shape)
        results["dvalues"] = (dy.T @ x)[order > 0][order[order > 0].argsort()]
    return results
