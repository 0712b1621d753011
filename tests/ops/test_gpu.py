"""What only a GPU can show: CUDA graphs, streams, other devices, no waiting for the GPU, addresses past 2**31, tf32,
torch.compile.

The ops' own tests (test_ops, test_dropout, test_gradients) run on it too: `pytest tests -m gpu` takes both.
"""

import pytest
import torch

import rosa_kernels as rk
from cases import LinearCase, make_inputs
from linear_checks import linear, run_linear
from oracle import check, expected_linear
from rosa_kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
CASES = [LinearCase((t,), 130, 100, 16, p) for t in (5, 300) for p in ("none", "random", "rows", "columns", "blocks")]
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
WARM_UPS = 3


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    """The current device, with each GPU backend asked for by name."""
    reason = rk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with rk.use_backend(request.param):
        yield torch.device("cuda", torch.cuda.current_device())


class Step:
    """A forward and backward of a case on the tensors of `inputs`, which may change in place between runs."""

    def __init__(self, case, inputs):
        self.case, self.inputs = case, inputs
        self.leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}

    def __call__(self):
        """{"y": y, and each gradient by its tensor's name}."""
        y = linear(self.case, self.inputs, self.leaves)
        return {
            "y": y.detach(),
            **dict(zip(self.leaves, torch.autograd.grad(y, list(self.leaves.values()), self.inputs.dy))),
        }

    def warm_up(self) -> None:
        """Compiles, and fills the caches of the pattern; on a stream of its own, as a capture asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()


def check_all(got, case, inputs, keep=None):
    expected = expected_linear(case, inputs, keep, delta_rounded=True, adapter_first=True)
    for name, result in got.items():
        check(name, result, expected[name], inputs.x if name == "y" else getattr(inputs, name))


def test_auto_serves_gpu_tensors_with_triton_else_cuda():
    device = torch.device("cuda", torch.cuda.current_device())
    reasons = rk.available_backends()
    fastest = next(name for name in ("triton", "cuda", "reference") if reasons[name] is None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.automatic_choice(device, dtype) == fastest
    assert dispatch.automatic_choice(device, torch.float64) == "reference"


@DTYPES
@BY_CASE
def test_a_captured_step_replays_with_the_same_bits(gpu, dtype, case):
    inputs, others = (make_inputs(case, dtype, gpu, seed=seed) for seed in (0, 1))
    step = Step(case, inputs)
    step.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay():
        graph.replay()
        return {name: result.clone() for name, result in results.items()}

    first, second = replay(), replay()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    check_all(first, case, inputs)
    with torch.no_grad():  # a replay reads what is in the tensors then, lora_A's new numbers too
        for name, tensor in inputs.tensors().items():
            tensor.copy_(getattr(others, name))
        inputs.dy.copy_(others.dy)
    check_all(replay(), case, inputs)


def test_each_replay_draws_dropout_anew(gpu):
    case = LinearCase((300,), 130, 100, 16, dropout_p=0.5)
    step = Step(case, make_inputs(case, torch.float32, gpu))
    step.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()["y"]
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


@DTYPES
@BY_CASE
def test_kernels_run_on_the_current_stream(gpu, dtype, case):
    """The inputs are NaN until a slow stream has filled them; a launch on any other stream would read the NaN."""
    ready, inputs = make_inputs(case, dtype, gpu), make_inputs(case, dtype, gpu)
    step = Step(case, inputs)
    step.warm_up()
    with torch.no_grad():
        for tensor in (*inputs.tensors().values(), inputs.dy):
            tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        with torch.no_grad():
            for name, tensor in inputs.tensors().items():
                tensor.copy_(getattr(ready, name))
            inputs.dy.copy_(ready.dy)
        got = step()
    stream.synchronize()
    check_all(got, case, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@DTYPES
@BY_CASE
def test_a_step_never_waits_for_the_gpu(gpu, dtype, case, dropout_p):
    case = LinearCase(**vars(case) | {"dropout_p": dropout_p})
    step = Step(case, make_inputs(case, dtype, gpu))
    step.warm_up()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
def test_tensors_on_another_device_than_the_current_one(gpu, dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    case = LinearCase((70,), 130, 100, 16)
    inputs = make_inputs(case, dtype, other)
    got = run_linear(case, inputs)
    assert all(result.device == other for result in got.values())
    assert torch.cuda.current_device() == gpu.index
    check_all(got, case, inputs)


@DTYPES
@pytest.mark.parametrize("pattern", ["random", "rows", "blocks"])
def test_thousands_of_programs_give_the_same_bits(gpu, dtype, pattern):
    """Enough tiles to fill a GPU several times, in whatever order they end."""
    case = LinearCase((4096,), 1030, 1030, 16, pattern, dropout_p=0.1)
    inputs = make_inputs(case, dtype, gpu)
    first = run_linear(case, inputs)
    for _ in range(3):
        for name, again in run_linear(case, inputs).items():
            assert torch.equal(again, first[name]), name


@pytest.mark.parametrize("in_features,out_features", [(2048, 16), (16, 2048)], ids=["x", "y"])
def test_tensors_of_more_than_2_to_the_31_elements(gpu, in_features, out_features):
    """The last tokens come out as in a call of their own; and so do the gradients, where the others' dy is 0."""
    tokens, last = 2**31 // 2048 + 70, 40
    needed = 5 * tokens * 2048 * 2
    if torch.cuda.get_device_properties(gpu).total_memory < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    case = LinearCase((last,), in_features, out_features, 8)
    few = make_inputs(case, torch.bfloat16, gpu)
    x = torch.zeros(tokens, in_features, dtype=torch.bfloat16, device=gpu)
    dy = torch.zeros(tokens, out_features, dtype=torch.bfloat16, device=gpu)
    x[-last:], dy[-last:] = few.x, few.dy
    many = type(few)(**vars(few) | {"x": x, "dy": dy})
    got = Step(case, many)()
    got["y"], got["x"] = got["y"][-last:], got["x"][-last:]
    check_all(got, case, few)


def relative_error(got, exact):
    return float((got.cpu().double() - exact).norm() / exact.norm())


def test_tf32_is_used_only_where_pytorch_is_told_to(gpu, monkeypatch):
    case = LinearCase((256,), 1024, 1024, 16, None)
    inputs = make_inputs(case, torch.float32, gpu)
    exact = expected_linear(case, inputs)["y"].value
    ieee = relative_error(linear(case, inputs, inputs.tensors()), exact)
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    tf32 = relative_error(linear(case, inputs, inputs.tensors()), exact)
    assert ieee < 2**-18
    assert tf32 < 2**-9
    if not torch.version.hip and torch.cuda.get_device_capability(gpu) >= (8, 0):
        assert tf32 > 2**-16


@BY_CASE
def test_torch_compile_without_graph_breaks(gpu, case):
    torch._dynamo.reset()  # each case is a program of its own, not a recompilation
    inputs = make_inputs(case, torch.bfloat16, gpu)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors().items()}
    compiled = torch.compile(lambda tensors: linear(case, inputs, tensors), fullgraph=True)
    y = compiled(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    check_all({"y": y, **dict(zip(leaves, gradients))}, case, inputs)
