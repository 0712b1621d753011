"""One call of a LinearCase, forward and gradients, held against dense float64."""

import torch

import rosa_kernels as rk
from cases import CPU, make_inputs
from oracle import check, expected_from
from philox import keep_mask, seed_drawn_after

SEED = 1234


def linear(case, inputs, tensors):
    """The public function that a case is about, on the given tensors."""
    t = {name: tensors.get(name) for name in inputs.DIFFERENTIABLE}
    adapter = t["lora_A"], t["lora_B"], case.scaling
    if not case.base:
        return rk.rosa_delta(t["x"], *adapter, t["values"], inputs.pattern, dropout_p=case.dropout_p)
    if inputs.pattern is None:
        return rk.lora_linear(t["x"], t["weight"], t["bias"], *adapter, dropout_p=case.dropout_p)
    if not case.r:
        return rk.sparse_linear(t["x"], t["weight"], t["bias"], t["values"], inputs.pattern)
    return rk.rosa_linear(
        t["x"], t["weight"], t["bias"], *adapter, t["values"], inputs.pattern, dropout_p=case.dropout_p
    )


def bits(tensors):
    """Copies whose equality is equality of bits."""
    return {
        name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).view(torch.uint8) for name, t in tensors.items()
    }


def run_linear(case, inputs):
    """y and the gradients of all inputs, after checking that no input changed."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    everything = inputs.tensors() | {"dy": inputs.dy}
    before = bits(everything)
    torch.manual_seed(SEED)
    y = linear(case, inputs, leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    for name, copy in bits(everything).items():
        assert torch.equal(copy, before[name]), f"{name} was modified"
    return {"y": y, **dict(zip(leaves, gradients))}


def mask_of(case, device):
    """What dropout keeps in a call after torch.manual_seed(SEED); None without dropout."""
    if not case.dropout_p:
        return None
    return keep_mask(seed_drawn_after(SEED, device), case.tokens, case.in_features, case.dropout_p)


def check_linear(backend, case, dtype, device=CPU):
    inputs = make_inputs(case, dtype, device)
    expected = expected_from(backend, case, inputs, mask_of(case, device))
    got = run_linear(case, inputs)
    assert got.keys() == expected.keys()
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))
