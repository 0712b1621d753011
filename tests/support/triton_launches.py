"""Which kernels the Triton backend launches for a call, recorded on tensors without memory: no GPU, no driver.

Each op runs by every algorithm and every configuration of an architecture's list; what it hands to Triton is kept.
"""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from rosa_kernels.backends import triton as backend
from rosa_kernels.backends.gpu import hardware
from rosa_kernels.backends.triton import configs, heuristics, launcher
from rosa_kernels.pattern import BLOCK16, COLUMN, ROW, UNSTRUCTURED

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One adapter layer's forward and backward. r = 0 is no low-rank part, structure None no sparse part."""

    tokens: int = 4096
    out_features: int = 4096
    in_features: int = 4096
    r: int = 16
    structure: int | None = None
    dtype: torch.dtype = BF16
    lora_dtype: torch.dtype | None = None
    """None: as dtype."""
    values_dtype: torch.dtype | None = None
    bias: bool = False
    base: bool = True
    dropout_p: float = 0.0
    tf32: bool = False
    rows_needed: bool = True
    """Whether dA and dx are wanted beside dB."""


@dataclass(frozen=True)
class Launch:
    """A kernel with all that decides its machine code. operand, precision: what its dots should multiply, and how."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    """num_warps and num_stages, and whatever else the launcher gives to Triton."""
    operand: torch.dtype
    precision: str

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def tokens(self) -> int:
        return self.arguments["T"]

    def has(self, name: str) -> bool:
        return self.arguments.get(name) is not None

    @property
    def aligned(self) -> bool:
        """Whether all tensors' rows begin at multiples of 16 elements."""
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        return all(stride == 1 or stride % 16 == 0 for tensor in tensors for stride in tensor.stride())

    @property
    def parts(self) -> frozenset:
        """Tensors with their dtype and contiguous dimension, and what is done beside multiplying them."""
        tensors = {
            (name, value.dtype, value.stride().index(1) if 1 in value.stride() else None)
            for name, value in self.arguments.items()
            if isinstance(value, torch.Tensor)
        }
        return frozenset(tensors | {(flag, self.arguments[flag]) for flag in _EXTRAS if self.arguments.get(flag)})

    @property
    def variant(self) -> str:
        """What it does: dtype, tensors (ᵀ: rows not contiguous; 32: wider than the operands), flags, block of ranks."""
        parts = []
        for name in filter(self.has, _NAMED):
            tensor = self.arguments[name]
            transposed = tensor.dim() == 2 and tensor.stride(1) != 1
            parts.append(name + "ᵀ" * transposed + "32" * (tensor.dtype == FP32 != self.operand))
        flags = [self.arguments["SPARSE"]] if self.arguments.get("SPARSE") else []
        flags += [f"dropout-{self.arguments['DROPOUT']}"] if self.arguments.get("DROPOUT") else []
        flags += [name.lower() for name in _FLAGS if self.arguments.get(name)]
        flags += [f"r{self.arguments['BLOCK_R']}"] if any(map(self.has, ("A", "B", "H"))) else []
        dtype = "tf32" if self.precision == "tf32" else {FP32: "fp32", BF16: "bf16", FP16: "fp16"}[self.operand]
        return " ".join([self.name, dtype, *parts, *flags, *([] if self.aligned else ["odd"])])

    @property
    def tile(self) -> str:
        blocks = "x".join(str(self.arguments[name]) for name in _TILE if name in self.arguments)
        return f"{blocks} {self.options['num_warps']}w{self.options['num_stages']}s"

    @property
    def setting(self) -> tuple:
        """All that decides the code beside the parts."""
        constants = sorted(
            (p.name, self.arguments[p.name]) for p in self.kernel.params if p.is_constexpr and p.name not in _EXTRAS
        )
        return (self.name, self.aligned, self.operand, self.precision, *self.options.items(), *constants)


_NAMED = ("weight", "bias", "H", "A", "B", "S", "values", "permutation", "seed", "dH_parts")
_FLAGS = ("ACCUMULATE", "TRANSPOSED", "ZERO")
_TILE = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_F")
_EXTRAS = ("DROPOUT", "ACCUMULATE")


def with_most_parts(launches: list[Launch]) -> list[Launch]:
    """Without those whose parts are all in another launch of the same setting: that one needs no less of anything."""
    settings: dict[tuple, dict[frozenset, Launch]] = {}
    for launch in launches:
        settings.setdefault(launch.setting, {}).setdefault(launch.parts, launch)
    return [
        launch
        for of_setting in settings.values()
        for parts, launch in of_setting.items()
        if not any(parts < other for other in of_setting)
    ]


def _tensors(case: Case) -> dict[str, Any]:
    def empty(*shape, dtype=None):
        return torch.empty(*shape, dtype=dtype or case.dtype, device="meta")

    T, N, K, r = case.tokens, case.out_features, case.in_features, case.r
    one_percent = N * K // 100
    counts = {None: 0, UNSTRUCTURED: one_percent, ROW: 40 * K, COLUMN: 40 * N, BLOCK16: one_percent // 256 * 256}
    nnz = counts[case.structure]

    def indices(n):
        return empty(n, dtype=torch.int32)

    return {
        "x": empty(T, K), "dy": empty(T, N), "weight": empty(N, K) if case.base else None,
        "bias": empty(N) if case.bias else None,
        "lora_A": empty(r, K, dtype=case.lora_dtype) if r else None,
        "lora_B": empty(N, r, dtype=case.lora_dtype) if r else None,
        "values": empty(nnz, dtype=case.values_dtype) if nnz else None, "crow": indices(N + 1), "col": indices(nnz),
        "ccol": indices(K + 1), "row": indices(nnz), "permutation": indices(nnz), "structure": case.structure or 0,
        "seed": torch.empty(1, dtype=torch.int64, device="meta") if case.dropout_p else None,
    }  # fmt: skip


def _run(case: Case) -> None:
    """rosa_linear, its backward, and what only the single ops launch."""
    t = _tensors(case)
    shared = {name: t[name] for name in ("weight", "lora_A", "lora_B", "values", "crow", "col", "structure", "seed")}
    shared |= {"scaling": 2.0, "dropout_p": case.dropout_p}
    backend.rosa_linear(x=t["x"], bias=t["bias"], **shared)
    needs = [case.rows_needed, False, False, case.r > 0 and case.rows_needed, case.r > 0, t["values"] is not None]
    transposed = {name: t[name] for name in ("ccol", "row", "permutation")}
    backend.rosa_linear_backward(dy=t["dy"], x=t["x"], needs=needs, **shared, **transposed)
    if case.structure == UNSTRUCTURED and case.base:
        backend.csr_add(t["weight"], t["values"], t["crow"], t["col"])


class _Chooser:
    """Takes the same position of every list of choices, the last of a shorter one, and remembers the longest list."""

    def __init__(self, position: int):
        self.position, self.longest = position, 0

    def __call__(self, options):
        self.longest = max(self.longest, len(options))
        return options[min(self.position, len(options) - 1)]


def recorded(case: Case, architecture: str, *, every_config: bool = True) -> list[Launch]:
    """The launches of the case, many repeated: every algorithm, every configuration (or the default) of the lists."""
    launches: list[Launch] = []
    precision = "tf32" if case.tf32 else "ieee"

    def launch(kernel, *args, grid, warmup, **keywords):
        constants = {name: keywords.pop(name) for name in kernel.arg_names if name in keywords}
        arguments = dict(zip(kernel.arg_names, args)) | constants
        launches.append(Launch(kernel, arguments, keywords, case.dtype, precision))

    def run(algorithm: _Chooser, config: _Chooser) -> None:
        def listed(kernel, device, dtype, tokens):
            return config(configs.configs(kernel, architecture, dtype.itemsize, configs.token_bucket(tokens)))

        stand_ins = [
            (JITFunction, "run", launch),
            (launcher, "_current_device", lambda: -1),  # as tensors without memory say of theirs
            (hardware, "architecture", lambda device: architecture),
            (hardware, "multiprocessors", lambda device: 132),
            (hardware, "precision", lambda x: precision if x.dtype == FP32 else "ieee"),
            (configs, "choose", listed),
            (heuristics, "choose_linear", lambda call, rates: algorithm(heuristics.linear_algorithms(call))),
            (heuristics, "choose_sddmm", lambda call, rates: algorithm(heuristics.sddmm_algorithms(call))),
            (heuristics, "low_rank_gradients_by_library", lambda *sizes: False),
        ]
        with contextlib.ExitStack() as stack:
            for module, name, stand_in in stand_ins:
                stack.enter_context(mock.patch.object(module, name, stand_in))
            _run(case)

    for algorithm_position in itertools.count():
        for config_position in itertools.count():
            algorithm, config = _Chooser(algorithm_position), _Chooser(config_position)
            run(algorithm, config)
            if not every_config or config_position + 1 >= config.longest:
                break
        if algorithm_position + 1 >= algorithm.longest:
            return launches
