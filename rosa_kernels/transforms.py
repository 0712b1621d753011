"""What PyTorch does with the code that runs: torch.func's transforms, forward mode, tracing."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def active() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp ...) runs this code."""
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open; true where this PyTorch does not say so."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside of what torch.func's transforms put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def holds_numbers(tensor: Tensor) -> bool:
    """Whether Python may look at the tensor's numbers: it is no fake, no example of a trace and no batch of vmap."""
    return (
        type(tensor) in _PLAIN
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        and not torch._is_functional_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )
