"""RecordedCalls stands in for graphs.recorder.Recorder on CPU tensors, and does what a CUDA graph does there.

It records PyTorch's own calls with the tensors that they were given. While it records, nothing is done: what the calls
have written is put back. A replay runs the same calls on the same tensors and writes each result where the recording
had it. Python is not asked again, so what Python has changed since, a replay does not see.
"""

import contextlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""Calls for whose result a host waits."""


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call in WAITS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return call(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.written = [], {}

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        names = [argument.name for argument in call._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        for argument in call._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given.get(argument.name)):
                    self._keep(tensor)
        results = call(*args, **kwargs)
        self.calls.append((call, args, kwargs, results))
        return results

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        self.written.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def put_back(self):
        for storage, before in self.written.values():
            storage.copy_(before)


class RecordedCalls:
    def __init__(self, device):
        assert device.type == "cpu"

    @staticmethod
    def refusal(device):
        return None

    def aside(self):
        return contextlib.nullcontext()

    def refusing_to_wait(self):
        return _Refusing()

    def record(self, call):
        generator, recording = torch.get_rng_state(), _Recording()
        with recording:
            call()
        recording.put_back()
        torch.set_rng_state(generator)
        self.calls = recording.calls

    @torch.no_grad()
    def replay(self):
        for call, args, kwargs, recorded in self.calls:
            for was, now in zip(tree_leaves(recorded), tree_leaves(call(*args, **kwargs)), strict=True):
                if isinstance(was, Tensor) and was.untyped_storage().data_ptr() != now.untyped_storage().data_ptr():
                    was.detach().copy_(now)

    def generator_state(self):
        return torch.get_rng_state()
