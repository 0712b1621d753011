"""Which calls go straight to their backend, who sees the op of the others, and what a missing private name changes."""

import contextlib
import importlib
import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_kernels as rk
from rosa_kernels import direct_call, ops
from rosa_kernels.__main__ import main

PATTERN = rk.CSRPattern.random((5, 6), 0.4, seed=0)


def lora_linear(x):
    return rk.lora_linear(x, torch.ones(5, 6), None, torch.ones(2, 6), torch.ones(5, 2), 1.0)


def ops_of_lora_linear():
    """What a mode of __torch_dispatch__ sees of a call."""
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Record():
        lora_linear(torch.ones(3, 6))
    return seen


class TestWhoSeesTheOp:
    """An eager call goes to its backend at once, unless something around looks for torch.ops.rosa_kernels.*."""

    def test_a_plain_call_goes_to_its_backend(self):
        args = torch.ones(3, 6), None, 1.0, torch.nn.Parameter(torch.ones(2))
        assert not direct_call.needs_dispatcher(args)
        with torch.no_grad():
            assert not direct_call.needs_dispatcher(args)
        with torch.inference_mode():
            assert not direct_call.needs_dispatcher(args)

    def test_modes_of_torch_dispatch(self):
        assert torch.ops.rosa_kernels.rosa_linear.default in ops_of_lora_linear()
        with FakeTensorMode():
            assert type(lora_linear(torch.ones(3, 6))) is FakeTensor

    def test_modes_of_torch_function(self):
        seen = []

        class Record(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with Record():
            lora_linear(torch.ones(3, 6))
        assert torch.ops.rosa_kernels.rosa_linear in seen

    def test_a_subclass_outside_its_mode(self):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.ones(3, 6)
        values, crow = torch.ones(PATTERN.nnz), PATTERN.crow_indices
        assert direct_call.needs_dispatcher((x, values, crow)) and direct_call.needs_dispatcher((values, x, crow))

    def test_tracing(self):
        traced = make_fx(lora_linear)(torch.ones(3, 6))
        assert torch.ops.rosa_kernels.rosa_linear.default in [node.target for node in traced.graph.nodes]
        traced = torch.jit.trace(lora_linear, torch.ones(3, 6))
        assert "rosa_kernels::rosa_linear" in str(traced.graph)

    def test_the_transforms_of_functorch(self):
        seen = []
        asks = lambda x: (seen.append(direct_call.needs_dispatcher((x,))), x.sum())[1]
        torch.func.grad(asks)(torch.ones(3))
        torch.func.vmap(asks)(torch.ones(3, 2))
        torch.func.functionalize(asks)(torch.ones(3))
        assert seen == [True] * 3

    def test_the_profiler_and_autocast(self):
        with torch.profiler.profile() as profile:
            lora_linear(torch.ones(3, 6))
        assert "rosa_kernels::rosa_linear" in {event.name for event in profile.events()}
        with torch.autocast("cpu", torch.bfloat16):
            assert direct_call.needs_dispatcher((torch.ones(3),))


@contextlib.contextmanager
def a_pytorch_without(name):
    """direct_call as it is where torch has lost this name before the import."""
    owner, _, attribute = name.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(operator.attrgetter(owner)(torch), attribute)
        importlib.reload(direct_call)
    try:
        yield
    finally:
        importlib.reload(direct_call)


@pytest.mark.parametrize("name", direct_call.PRIVATE_NAMES)
class TestWithoutAPrivateName:
    """Where PyTorch has lost a name that a direct call needs, every call goes through the dispatcher."""

    @staticmethod
    def results():
        torch.manual_seed(0)
        x, A, B = (torch.randn(size, requires_grad=True) for size in ((3, 6), (2, 6), (5, 2)))
        weight, bias, values = torch.randn(5, 6), torch.randn(5), torch.randn(PATTERN.nnz, requires_grad=True)
        y = rk.rosa_linear(x, weight, bias, A, B, 0.5, values, PATTERN)
        with torch.no_grad():
            inferred = rk.rosa_linear(x, weight, bias, A, B, 0.5, values, PATTERN)
        return [y, inferred, rk.spmm(x, values, PATTERN), *torch.autograd.grad(y.square().sum(), (x, A, B, values))]

    def test_results_stay(self, name, backend):
        expected = self.results()
        with a_pytorch_without(name):
            assert direct_call.needs_dispatcher((torch.ones(3),))
            assert all(map(torch.equal, self.results(), expected))
        assert not direct_call.needs_dispatcher((torch.ones(3),))

    def test_the_dispatcher_serves_every_call(self, name, monkeypatch):
        served = []
        monkeypatch.setattr(ops, "as_op_returns", lambda results, like: (served.append(like), results)[1])
        with a_pytorch_without(name):
            rk.spmm(torch.ones(3, 6), torch.ones(PATTERN.nnz), PATTERN)
            lora_linear(torch.ones(3, 6))
        assert len(served) == 2
        lora_linear(torch.ones(3, 6))
        assert len(served) == 2

    def test_modes_see_the_op(self, name):
        with a_pytorch_without(name):
            assert torch.ops.rosa_kernels.rosa_linear.default in ops_of_lora_linear()

    def test_the_command_says_so(self, name, capsys):
        with a_pytorch_without(name):
            main()
        assert f"this PyTorch has no torch.{name}\n" in capsys.readouterr().out
        main()
        assert "has no torch." not in capsys.readouterr().out
