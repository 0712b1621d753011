"""Whether a call may go straight to its backend, past PyTorch's dispatcher, which takes 10 us.

The answer needs names that PyTorch does not promise to keep. Where one is gone, every call goes through the
dispatcher: the results are the same, only later, and ``python -m rosa_kernels`` says which name is missing.
"""

import operator
from collections.abc import Iterable

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PRIVATE_NAMES = (
    "_C.DispatchKey.BackendSelect",
    "_C.DispatchKey.ADInplaceOrView",
    "_C.DispatchKeySet.add",
    "_C.DispatchKeySet.raw_repr",
    "_C._dispatch_tls_local_include_set",
    "_C._len_torch_function_stack",
    "_C._is_any_autocast_enabled",
    "_C._autograd._profiler_enabled",
    "autograd.forward_ad._current_level",
)
"""What this file takes from torch."""


def _exists(name: str) -> bool:
    try:
        operator.attrgetter(name)(torch)
    except AttributeError:
        return False
    return True


missing_names = tuple(name for name in PRIVATE_NAMES if not _exists(name))

_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, float, int, bool, list, type(None)))

if missing_names:

    def needs_dispatcher(args: Iterable[object]) -> bool:
        """Whether a call with these arguments must go through PyTorch's dispatcher: always, as a name is missing."""
        return True

else:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_tls_local_include_set,
        _is_any_autocast_enabled,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled

    _inference_keys = DispatchKeySet(DispatchKey.BackendSelect)
    _PLAIN_KEYS = frozenset((_inference_keys.raw_repr(), _inference_keys.add(DispatchKey.ADInplaceOrView).raw_repr()))
    """The keys that are included in a thread where nothing watches: in inference mode, and elsewhere."""

    def needs_dispatcher(args: Iterable[object]) -> bool:
        """Whether a call with these arguments must go through PyTorch's dispatcher, because something looks for the op.

        Nothing else can tell the difference, because whatever a backend does is ops again, each with its own dispatch.
        What looks for the op is Dynamo, which reads the source; a subclass of Tensor among the arguments; a mode of
        __torch_function__; autocast; the profiler; forward-mode differentiation; and all that the dispatcher knows by
        a key included in this thread: modes of __torch_dispatch__ (fake tensors, make_fx), functorch's transforms,
        functionalisation, torch.jit.trace.
        """
        return (
            is_compiling()
            or not _PLAIN_TYPES.issuperset(map(type, args))
            or _dispatch_tls_local_include_set().raw_repr() not in _PLAIN_KEYS
            or _len_torch_function_stack() > 0
            or _is_any_autocast_enabled()
            or _profiler_enabled()
            or forward_ad._current_level >= 0
        )
