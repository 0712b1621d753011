"""What is right, and by how much a result may miss it: dense float64 PyTorch, none of the package's own arithmetic.

Every result is a sum of products. The same formula over absolute values bounds the sum of its terms' magnitudes, M.
Any order of summing n terms in a precision of unit roundoff u then errs by at most n u M (Higham, "Accuracy and
Stability of Numerical Algorithms", 2nd ed., section 3.1), and one rounding of a quantity q by at most u |q|. The bounds
below allow the fp32 sums, one rounding of each result to its dtype and, where x is 16-bit, one rounding of H and of dH.
They allow the error of PyTorch's own GEMMs for the base's part (at least one rounding; F.linear sometimes rounds before
it adds the bias), and no more.
The GPU backends add the base to what the adapter made, which was rounded; `adapter_first` allows for that rounding.
They may make s B A + S one operand, rounded once in place of H; `delta_rounded` allows for it.

Results may be on any device; what they are compared with is computed on the CPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import LinearCase, LinearInputs

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST_SUBNORMAL = {torch.float64: 0.0, torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@dataclass
class Expected:
    """A result in float64 and the largest error that the arithmetic above can leave in each of its elements."""

    value: Tensor
    bound: Tensor


def compute_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of the accumulation: fp32, or float64 for float64 inputs."""
    return UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


def _sparse_csr(values: Tensor, pattern) -> Tensor:
    indices = pattern.crow_indices.long(), pattern.col_indices.long()
    return torch.sparse_csr_tensor(*indices, values, pattern.shape, check_invariants=True)


def dense(values: Tensor, pattern, dtype=torch.float64) -> Tensor:
    """S, through PyTorch's own CSR tensors."""
    return _sparse_csr(values.detach().to(dtype).contiguous(), pattern).to_dense()


def _positions(pattern) -> tuple[Tensor, Tensor]:
    rows, cols = _sparse_csr(torch.ones(pattern.nnz), pattern).to_sparse_coo().coalesce().indices()
    return rows, cols


class _Parts:
    """The terms of y and of its gradients, from the given (possibly absolute) float64 tensors."""

    def __init__(self, t: dict[str, Tensor | None], pattern, scaling: float, factor: Tensor | None):
        x, W, b, A, B, v, G = (t[n] for n in ("x", "weight", "bias", "lora_A", "lora_B", "values", "dy"))
        zero = x.new_zeros(())
        x_hat = x if factor is None else x * factor
        self.base = zero if W is None else F.linear(x, W, b)
        self.base_dx = zero if W is None else G @ W
        self.H = self.dH = self.A = self.B = None
        self.y, self.dx = self.base, self.base_dx
        self.gradients = {}
        if A is not None:
            self.H, self.dH = x_hat @ A.T, scaling * (G @ B)
            self.from_H, self.from_dH = scaling * (self.H @ B.T), (self.dH @ A) * (1 if factor is None else factor)
            self.y, self.dx = self.y + self.from_H, self.dx + self.from_dH
            self.gradients["lora_A"] = self.dH.T @ x_hat
            self.gradients["lora_B"] = scaling * (G.T @ self.H)
        if v is not None:
            S = dense(v, pattern)
            self.from_S, self.from_S_to_dx = x @ S.T, G @ S
            self.y, self.dx = self.y + self.from_S, self.dx + self.from_S_to_dx
            self.gradients["values"] = (G.T @ x)[_positions(pattern)]
        if W is not None:
            self.gradients["weight"] = G.T @ x
        if b is not None:
            self.gradients["bias"] = G.sum(0)
        self.gradients["x"] = self.dx


GPU_BACKENDS = ("triton", "cuda")
"""The backends whose results are checked with adapter_first and delta_rounded."""


def expected_from(backend: str, case: LinearCase, inputs: LinearInputs, keep: Tensor | None) -> dict[str, Expected]:
    """expected_linear with what this backend may do."""
    on_gpu = backend in GPU_BACKENDS
    return expected_linear(case, inputs, keep, delta_rounded=on_gpu, adapter_first=on_gpu)


def expected_linear(
    case: LinearCase, inputs: LinearInputs, keep: Tensor | None = None, delta_rounded: bool = False,
    adapter_first: bool = False,
) -> dict[str, Expected]:  # fmt: skip
    """What y is, under "y", and each gradient under its tensor's name.

    keep: (tokens, in_features) bools, dropout's mask, or None.
    """
    names = (*LinearInputs.DIFFERENTIABLE, "dy")
    given = {name: getattr(inputs, name) for name in names}
    wide = {name: None if t is None else t.detach().cpu().double() for name, t in given.items()}
    pattern = None if inputs.pattern is None else inputs.pattern.to("cpu")
    for name in ("x", "dy"):
        wide[name] = wide[name].reshape(case.tokens, wide[name].shape[-1])
    factor = None
    if keep is not None:
        factor = keep.double() * (0.0 if case.dropout_p >= 1 else 1 / (1 - case.dropout_p))
    exact = _Parts(wide, pattern, case.scaling, factor)
    absolute = _Parts({n: None if t is None else t.abs() for n, t in wide.items()}, pattern, abs(case.scaling), factor)

    values = {"y": exact.y, **exact.gradients}
    magnitudes = {"y": absolute.y, **absolute.gradients}
    is_16_bit = inputs.x.dtype in (torch.bfloat16, torch.float16)
    roundings = _roundings_of_intermediates(inputs, exact, absolute, delta_rounded, adapter_first) if is_16_bit else {}
    terms = case.in_features + case.out_features + case.tokens + case.r + 8
    results = {}
    for name, value in values.items():
        like = given["x" if name == "y" else name]
        bound = terms * compute_roundoff(inputs.x.dtype) * magnitudes[name]
        bound = bound + UNIT_ROUNDOFF[like.dtype] * value.abs() + SMALLEST_SUBNORMAL[like.dtype]
        if name in roundings:
            bound = bound + 1.01 * roundings[name]
        shape = (*case.leading, case.out_features) if name == "y" else like.shape
        results[name] = Expected(value.expand_as(bound).reshape(shape), bound.reshape(shape))
    return results


def _roundings_of_intermediates(
    inputs: LinearInputs, exact: _Parts, absolute: _Parts, delta_rounded: bool, adapter_first: bool
) -> dict[str, Tensor]:
    """How far each result may move where H and dH are rounded once to 16 bits and a library GEMM made the base."""
    u = UNIT_ROUNDOFF[inputs.x.dtype]
    moved = {"y": u * exact.base.abs(), "x": u * exact.base_dx.abs()}
    if adapter_first:
        bias = 0.0 if inputs.bias is None else inputs.bias.detach().cpu().double()
        moved["y"] = torch.maximum(moved["y"], u * (exact.y - exact.base + bias).abs())
        moved["x"] = torch.maximum(moved["x"], u * (exact.dx - exact.base_dx).abs())
    if inputs.weight is not None:
        library_y = F.linear(inputs.x, inputs.weight, inputs.bias).cpu().double().reshape(exact.base.shape)
        library_dx = (inputs.dy @ inputs.weight).cpu().double().reshape(exact.base_dx.shape)
        moved["y"] = moved["y"] + (library_y - exact.base).abs()
        moved["x"] = moved["x"] + (library_dx - exact.base_dx).abs()
    if exact.H is not None:
        moved["y"] = moved["y"] + u * absolute.from_H
        moved["x"] = moved["x"] + u * absolute.from_dH
        moved |= {name: u * absolute.gradients[name] for name in ("lora_A", "lora_B")}
    if delta_rounded and exact.H is not None and inputs.values is not None:
        moved["y"] = moved["y"] + u * absolute.from_S
        moved["x"] = moved["x"] + u * absolute.from_S_to_dx
    return moved


def check(name: str, got: Tensor, expected: Expected, like: Tensor) -> None:
    """got has like's dtype and expected's shape, is contiguous, and lies within the bound everywhere."""
    assert got.dtype == like.dtype, f"{name}: dtype {got.dtype}, expected {like.dtype}"
    assert got.shape == expected.value.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.value.shape)}"
    )
    assert got.is_contiguous(), f"{name}: strides {got.stride()}, as the fake promises contiguous"
    excess = (got.detach().cpu().double() - expected.value).abs() - expected.bound
    if excess.numel() and not bool((excess <= 0).all()):
        at = int(excess.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}: {int((~(excess <= 0)).sum())} of {excess.numel()} elements off, worst at flat index {at}: got "
            f"{got.flatten()[at].item()}, expected {expected.value.flatten()[at].item()} "
            f"within {expected.bound.flatten()[at].item():.3g}"
        )


def naive_linear(case: LinearCase, t: dict[str, Tensor], pattern) -> Tensor:
    """The layer in plain PyTorch ops of x's dtype, adapters in their own, as peft computes it; S dense. No dropout."""
    x = t["x"]
    y = F.linear(x, t["weight"], t.get("bias")) if "weight" in t else 0
    if "lora_A" in t:
        A, B = t["lora_A"], t["lora_B"]
        y = y + (case.scaling * (x.to(A.dtype) @ A.T @ B.T.to(A.dtype))).to(x.dtype)
    if "values" in t:
        v = t["values"]
        positions = tuple(index.to(v.device) for index in _positions(pattern.to("cpu")))
        S = torch.zeros(pattern.shape, dtype=v.dtype, device=v.device).index_put(positions, v)
        y = y + (x.to(v.dtype) @ S.T).to(x.dtype)
    return y
