"""What a fuzz case's results are, in dense float64, and by how much each may miss it.

First derivatives are held to the bounds of oracle.py. Second derivatives and the embedding are held to bounds of the
same kind, made here: the formula and its derivatives are sums of products, so that the same derivatives of the formula
over absolute values bound the sum of the terms' magnitudes, M. A sum of n terms then errs by n u M, and a chain of
DEPTH operations that each round to u by DEPTH u M.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz_cases import FuzzCase, FuzzInputs
from oracle import SMALLEST_SUBNORMAL, UNIT_ROUNDOFF, Expected, compute_roundoff, expected_linear
from rosa_kernels.dropout import keep_mask, keep_scale, new_seed

DEPTH = 10
"""Operations between an input and a second derivative, each of which may round to the narrowest dtype of the call."""


def dropout_mask(case: FuzzCase) -> Tensor | None:
    """What the call keeps of x after torch.manual_seed(case.seed); None without dropout."""
    if not case.dropout_p:
        return None
    with torch.random.fork_rng([]):
        torch.manual_seed(case.seed)
        seed = new_seed(torch.device("cpu"))
    return keep_mask(seed, case.linear.tokens, case.linear.in_features, case.dropout_p)


def expected_results(case: FuzzCase, inputs: FuzzInputs, scaling: float) -> dict[str, Expected]:
    """The result under "y", and each gradient under its tensor's name."""
    if case.call == "RoSAEmbedding":
        return _by_autograd(case, inputs, scaling)
    if case.call == "csr_add":
        return _csr_add(inputs)
    linear = vars(case.linear) | {"scaling": scaling}
    results = expected_linear(type(case.linear)(**linear), inputs, dropout_mask(case))
    if case.call == "sddmm":
        return {"y": results["values"], "dy": results["y"], "x": results["x"]}
    if case.call == "spmm":  # the gradient of the values is an sddmm in x's dtype, rounded once more to theirs
        values = results["values"]
        rounded = 1.01 * UNIT_ROUNDOFF[case.dtype] * values.value.abs()
        results["values"] = Expected(values.value, values.bound + rounded)
    return results


def _csr_add(inputs: FuzzInputs) -> dict[str, Expected]:
    weight, values, dy = (inputs.tensors[n].double() for n in ("weight", "values", "dy"))
    rows, cols = inputs.pattern.to_mask().nonzero(as_tuple=True)
    total = weight.index_put((rows, cols), values, accumulate=True)
    u, result_u = compute_roundoff(inputs.weight.dtype), UNIT_ROUNDOFF[inputs.weight.dtype]
    bound = torch.zeros_like(total)  # an entry that S leaves alone keeps its bits
    bound[rows, cols] = 2 * u * (weight.abs()[rows, cols] + values.abs()) + result_u * total[rows, cols].abs()
    dtype = inputs.values.dtype
    rounded = UNIT_ROUNDOFF[dtype] * dy[rows, cols].abs() + SMALLEST_SUBNORMAL[dtype]
    return {
        "y": Expected(total, bound),
        "weight": Expected(dy, torch.zeros_like(dy)),
        "values": Expected(dy[rows, cols], rounded),
    }


def formula(case: FuzzCase, inputs: FuzzInputs, t: dict[str, Tensor], scaling: float) -> Tensor:
    """The call in dense PyTorch, on tensors of any values and of float64."""
    pattern = inputs.pattern
    if pattern is not None:
        rows, cols = pattern.to_mask().nonzero(as_tuple=True)
        if case.call == "sddmm":
            return (_flat(t["dy"]).T @ _flat(t["x"]))[rows, cols]
        S = torch.zeros(pattern.shape, dtype=torch.float64).index_put((rows, cols), t["values"])
    if case.call == "csr_add":
        return t["weight"] + S
    if case.call == "RoSAEmbedding":
        ids = inputs.ids
        y = F.embedding(ids, t["weight"], case.padding_idx)
        if "lora_A" in t:
            y = y + scaling * (F.embedding(ids, t["lora_A"].T, case.padding_idx) @ t["lora_B"].T)
        return y if pattern is None else y + F.embedding(ids, S, case.padding_idx)
    x = t["x"]
    y = 0.0
    if "weight" in t:
        y = F.linear(x, t["weight"], t.get("bias"))
    if "lora_A" in t:
        keep = dropout_mask(case)
        dropped = x if keep is None else x * keep.reshape(x.shape) * keep_scale(case.dropout_p)
        y = y + scaling * (dropped @ t["lora_A"].T @ t["lora_B"].T)
    return y if pattern is None else y + x @ S.T


def _flat(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _derivatives(case, inputs, scaling: float, twice: bool, absolute: bool) -> dict[str, Tensor]:
    """The result and its gradients, or its second derivatives, of the formula over the values or their magnitudes."""
    upstream = "values" if case.call == "sddmm" else "dy"
    wide = {name: t.detach().double() for name, t in inputs.tensors.items()}
    if absolute:
        wide, scaling = {name: t.abs() for name, t in wide.items()}, abs(scaling)
    leaves = {name: t.requires_grad_(name in case.needs or twice and name == upstream) for name, t in wide.items()}
    y = formula(case, inputs, leaves, scaling)
    if twice:
        return second_derivatives(case, leaves, upstream, y, absolute)
    if not y.requires_grad:
        return {"y": y}
    gradients = torch.autograd.grad(y, [leaves[n] for n in case.needs], leaves[upstream])
    return {"y": y, **dict(zip(case.needs, gradients))}


def second_derivatives(
    case: FuzzCase, leaves: dict[str, Tensor], upstream: str, y: Tensor, absolute: bool = False
) -> dict[str, Tensor]:
    """The gradients of a weighted sum of all first gradients; zero for what that sum does not depend on."""
    first = torch.autograd.grad(y, [leaves[n] for n in case.needs], leaves[upstream], create_graph=True)
    generator = torch.Generator().manual_seed(case.seed + 1)
    total = torch.zeros((), dtype=torch.float64)
    for gradient in first:
        weights = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        weights = weights.to(case.dtype).double()
        total = total + (gradient.double() * (weights.abs() if absolute else weights)).sum()
    names = (*case.needs, upstream)
    if not total.requires_grad:
        return {name: torch.zeros_like(leaves[name]) for name in names}
    second = torch.autograd.grad(total, [leaves[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, second)}


def _by_autograd(case: FuzzCase, inputs: FuzzInputs, scaling: float, twice: bool = False) -> dict[str, Expected]:
    values = _derivatives(case, inputs, scaling, twice, absolute=False)
    magnitudes = _derivatives(case, inputs, scaling, twice, absolute=True)
    c = case.linear
    terms = 2 * (c.in_features + c.out_features + c.tokens + c.r + 8)
    narrowest = max(UNIT_ROUNDOFF[t.dtype] for t in inputs.tensors.values())
    results = {}
    for name, value in values.items():
        like = inputs.tensors["dy" if name == "y" else name].dtype
        chain = terms * compute_roundoff(case.dtype) + (DEPTH * narrowest if twice else 0)
        bound = chain * magnitudes[name] + UNIT_ROUNDOFF[like] * value.abs() + SMALLEST_SUBNORMAL[like]
        results[name] = Expected(value.detach(), bound.detach())
    return results


def expected_second_derivatives(case: FuzzCase, inputs: FuzzInputs, scaling: float) -> dict[str, Expected]:
    return _by_autograd(case, inputs, scaling, twice=True)
