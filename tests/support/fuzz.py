"""The differential fuzzer: a case of fuzz_cases.py runs on the package and is held to fuzz_oracle.py.

python tests/support/fuzz.py FIRST COUNT runs cases and ends at the first that fails; tests/ops/test_fuzz.py runs them
under pytest. This file is quick to start, for processes that run under a sanitizer.
"""

import contextlib
import sys
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call

import rosa_kernels as rk
from fuzz_cases import FuzzCase, FuzzInputs, draw, make_inputs
from fuzz_oracle import expected_results, expected_second_derivatives, second_derivatives
from linear_checks import bits
from oracle import Expected, check
from rosa_kernels.backends.cpu import base_gemm, heuristics
from rosa_kernels.backends.cpu import ops as cpu_ops


def check_case(seed: int) -> FuzzCase:
    """Runs the case of this seed with each of its numbers of threads, and twice with the first of them."""
    case = draw(seed)
    inputs = make_inputs(case)
    if case.call == "RoSAEmbedding" and "values" in case.needs and not inputs.values.numel():
        # An S without rows leaves the values, of which there are none, out of the graph.
        case = replace(case, needs=tuple(name for name in case.needs if name != "values"))
    threads_before = torch.get_num_threads()
    with rk.use_backend(case.backend), forced(case):
        try:
            _check_results(case, inputs)
            if case.twice and case.needs:
                _check_second_derivatives(case, inputs)
        finally:
            torch.set_num_threads(threads_before)
    return case


def _check_results(case: FuzzCase, inputs: FuzzInputs) -> None:
    call = Call(case, inputs)
    expected = expected_results(case, inputs, call.scaling)
    untouched = bits(inputs.tensors)
    given, affected = inputs, {}
    if case.special is not None and inputs.x.numel():
        given, affected = with_special(case)
    first = None
    for threads in (*case.threads, case.threads[0]):
        torch.set_num_threads(threads)
        got = call.run(given)
        for name, result in got.items():
            compare(name, result, expected[name], inputs.tensors[like(case, name)], affected.get(name))
        got = bits(got)
        if first is None:
            first = got
    for name, result in got.items():
        assert torch.equal(result, first[name]), f"{name}: other bits on a second run with {threads} threads"
    for name, before in bits(inputs.tensors).items():
        assert torch.equal(before, untouched[name]), f"{name} was modified"


def _check_second_derivatives(case: FuzzCase, inputs: FuzzInputs) -> None:
    call = Call(case, inputs)
    torch.set_num_threads(case.threads[0])
    upstream = "values" if case.call == "sddmm" else "dy"
    leaves, y = call.forward(inputs, (*case.needs, upstream))
    got = second_derivatives(case, leaves, upstream, y)
    for name, expected in expected_second_derivatives(case, inputs, call.scaling).items():
        compare(f"{name}, second derivative", got[name], expected, inputs.tensors[name])


def like(case: FuzzCase, name: str) -> str:
    """The tensor whose dtype a result has."""
    return ("x" if case.call == "sddmm" else "dy") if name == "y" else name


def compare(name: str, got: Tensor, expected: Expected, like: Tensor, affected: Tensor | None = None) -> None:
    """What a special value may change is not compared."""
    if affected is not None:
        got = torch.where(affected, expected.value.to(got.dtype), got)
    check(name, got.contiguous(), expected, like)


class Call:
    """A case's call, and its scaling, which a layer computes itself."""

    def __init__(self, case: FuzzCase, inputs: FuzzInputs):
        self.case, self.pattern, self.ids = case, inputs.pattern, inputs.ids
        self.scaling = case.linear.scaling
        self.layer = None
        if case.call in ("LoRALinear", "RoSALinear", "RoSAEmbedding"):
            self.layer = _new_layer(case, inputs)
            self.scaling = self.layer.scaling

    def run(self, inputs: FuzzInputs) -> dict[str, Tensor]:
        """The result and the gradients that are needed."""
        leaves, y = self.forward(inputs, self.case.needs)
        assert y.is_contiguous(), f"y: strides {y.stride()}, as the fake promises contiguous"
        if not self.case.needs:
            return {"y": y}
        upstream = inputs.tensors["values" if self.case.call == "sddmm" else "dy"]
        gradients = torch.autograd.grad(y, [leaves[n] for n in self.case.needs], upstream)
        return {"y": y, **dict(zip(self.case.needs, gradients))}

    def forward(self, inputs: FuzzInputs, needs: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor]:
        """The leaves, of which those named need a gradient, and the result; the same dropout at every call."""
        leaves = {name: t.detach().requires_grad_(name in needs) for name, t in inputs.tensors.items()}
        torch.manual_seed(self.case.seed)
        return leaves, (self._function if self.layer is None else self._layer)(leaves)

    def _function(self, t: dict[str, Tensor]) -> Tensor:
        case, pattern = self.case, self.pattern
        adapter = t.get("lora_A"), t.get("lora_B"), self.scaling
        sparse = t.get("values"), pattern
        base = t.get("weight"), t.get("bias")
        dropout = {"dropout_p": case.linear.dropout_p, "training": case.training}
        match case.call:
            case "rosa_linear":
                return rk.rosa_linear(t["x"], *base, *adapter, *sparse, **dropout)
            case "lora_linear":
                return rk.lora_linear(t["x"], *base, *adapter, **dropout)
            case "sparse_linear":
                return rk.sparse_linear(t["x"], *base, *sparse)
            case "rosa_delta":
                return rk.rosa_delta(t["x"], *adapter, *sparse, **dropout)
            case "spmm":
                return rk.spmm(t["x"], *sparse)
            case "sddmm":
                return rk.sddmm(t["dy"], t["x"], pattern)
            case "csr_add":
                return rk.csr_add(t["weight"], *sparse)

    def _layer(self, t: dict[str, Tensor]) -> Tensor:
        parameters = dict(self.layer.named_parameters())
        names = dict(zip(self.layer.factor_names, ("lora_A", "lora_B"))) | {"values": "values"}
        given = {n: t[names[n.split(".")[0]]] for n in parameters if n.split(".")[0] in names}
        argument = t["x"] if self.ids is None else self.ids
        return functional_call(self.layer, given, (argument,))


def _new_layer(case: FuzzCase, inputs: FuzzInputs) -> nn.Module:
    c = case.linear
    settings = {"r": c.r, "lora_alpha": c.scaling * max(1, c.r)}
    if case.call != "RoSAEmbedding":
        settings["lora_dropout"] = c.dropout_p
    if case.call != "LoRALinear":
        settings |= {"pattern": inputs.pattern, "density": 0.0}
    if case.call == "RoSAEmbedding":
        base = nn.Embedding(c.in_features, c.out_features, case.padding_idx, device="meta")
    else:
        base = nn.Linear(c.in_features, c.out_features, inputs.bias is not None, device="meta")
        if inputs.bias is not None:
            base.bias = nn.Parameter(inputs.bias)
    base.weight = nn.Parameter(inputs.weight)
    return getattr(rk.nn, case.call)(base, **settings).train(case.training)


def with_special(case: FuzzCase) -> tuple[FuzzInputs, dict[str, Tensor]]:
    """The inputs with a special value as one element of x, and where it may change each result: dx nowhere."""
    inputs = make_inputs(case)
    x = inputs.tensors["x"]
    at = case.seed % x.numel()
    x[torch.unravel_index(torch.tensor(at), x.shape)] = case.special
    token, feature = divmod(at, case.linear.in_features)
    entries = rows = torch.zeros(0, dtype=torch.bool)
    if inputs.pattern is not None:
        entries = inputs.pattern.col_indices == feature
        rows = inputs.pattern.to_mask()[:, feature]
    affected = {n: torch.zeros(t.shape, dtype=torch.bool) for n, t in inputs.tensors.items()}
    by_token = affected["dy"].view(case.linear.tokens, -1)
    by_token[token] = True if inputs.weight is not None or inputs.lora_A is not None else rows
    if case.call == "sddmm":
        return inputs, affected | {"y": entries}
    for name in ("weight", "lora_A"):
        if name in affected:
            affected[name][:, feature] = True
    return inputs, affected | {"y": affected["dy"], "lora_B": torch.ones(()).bool(), "values": entries}


@contextlib.contextmanager
def forced(case: FuzzCase):
    """The CPU's algorithm, where the case names one that is legal, over strips and chunks of a few elements."""
    with contextlib.ExitStack() as patches:
        set_ = lambda module, name, value: patches.enter_context(patch.object(module, name, value))
        if case.small_pieces:
            set_(heuristics, "STRIP_ELEMENTS", 640)
            set_(base_gemm, "CHUNK_TOKENS", 8)
        if case.slow_bfloat16:
            set_(cpu_ops, "fast_bfloat16", lambda: False)
        if case.library_gemm:
            set_(cpu_ops, "uses_our_gemm", lambda dtype: False)
        if case.algorithm:
            set_(cpu_ops, "_decode_tokens", lambda *_: heuristics.BLOCK_TOKENS if case.algorithm == "DECODE" else -1)
        if case.algorithm not in ("", "DECODE"):
            for function in ("forward_algorithm", "dx_algorithm"):
                set_(heuristics, function, _chooser(case.algorithm, getattr(heuristics, function)))
        yield


def _chooser(name: str, chosen):
    def choose(x, weight, lora_A, lora_B, values, structure, seed, widened, our_gemm):
        call = x, weight, lora_A, lora_B, values
        algorithm = heuristics.Algorithm[name]
        legal = algorithm in heuristics.legal_algorithms(*call, seed, widened, our_gemm)
        return algorithm if legal else chosen(*call, structure, seed, widened, our_gemm)

    return choose


if __name__ == "__main__":
    first, count = map(int, sys.argv[1:])
    for seed in range(first, first + count):
        print(draw(seed), flush=True)
        check_case(seed)
    print(f"{count} cases passed")
