"""What the tests of derivatives share: tensors to differentiate, adapted models, a comparison with the formula."""

import pytest
import torch

import rosa_kernels as rk
from plain_formulas import OPS, PATTERNS, SCALING

EVERY_OP = pytest.mark.parametrize("name", OPS)
EVERY_PATTERN = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
BOTH_CONFIGS = pytest.mark.parametrize(
    "config", [rk.LoRAConfig(r=2), rk.RoSAConfig(r=2, density=0.3, mask="random")], ids=["lora", "rosa"]
)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}


def leaves(tensors, needing=None):
    return [t.clone().requires_grad_(needing is None or i in needing) for i, t in enumerate(tensors)]


def assert_close(got, right, dtype):
    """Compares with the float64 results of the plain formula; the error may be relative to the largest element."""
    for a, b in zip(got, right, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.shape == b.shape
        scale = 1 + float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=TOLERANCES[dtype] * scale)


def called_directly(name, pattern, *tensors):
    indices = pattern.crow_indices, pattern.col_indices
    if name == "rosa_linear":
        x, W, b, A, B, v = tensors
        tensors, numbers = (x, W, b, A, B, SCALING, v), (pattern.structure, 0.0, None)
    else:
        numbers = () if name == "csr_add" else (pattern.structure,)
    return getattr(torch.ops.rosa_kernels, name)(*tensors, *indices, *numbers)


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def adapted_net(model, config):
    """Puts adapters into a model and gives every one of their parameters numbers."""
    rk.add_adapters(model, config)
    if isinstance(config, rk.RoSAConfig):
        rk.select_masks(model)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.normal_(0, 0.3)
    return model


def factors_of(layer):
    return [*layer.low_rank_factors(), *([layer.sparse_values] if layer.masks_selected else [])]
