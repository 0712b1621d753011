"""graphs.recorder.Recorder, and rk.graphed on a GPU: the rest of rk.graphed is tested on recorded calls."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rosa_kernels as rk
from rosa_kernels.graphs.recorder import Recorder
from small_classifier import IDS, Classifier


class PretendCUDA:
    """The part of torch.cuda that Recorder uses. It logs what CUDA would be asked for."""

    def __init__(self, monkeypatch):
        self.log = []
        self.current, self.mode = self.Stream("current", self.log), 0
        for name in ("CUDAGraph", "current_stream", "stream", "device", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.Stream("aside", self.log))
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "mode", mode))

    class Stream:
        def __init__(self, name, log):
            self.name, self.log = name, log

        def wait_stream(self, other):
            self.log.append(f"{self.name} waits for {other.name}")

    def CUDAGraph(self):
        graph = type("CUDAGraph", (), {})()
        graph.replay = lambda: self.log.append("replay")
        return graph

    def current_stream(self, device):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")

    @contextlib.contextmanager
    def device(self, device):
        self.log.append(f"on {device}")
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.log.append(f"capture on {stream.name}, {capture_error_mode}")
        yield
        self.log.append("captured")


@pytest.fixture
def cuda(monkeypatch):
    return PretendCUDA(monkeypatch)


def test_warm_ups_run_on_the_stream_of_the_capture_between_the_calls_around_them(cuda):
    recorder = Recorder(torch.device("cuda", 1))
    with recorder.aside():
        cuda.log.append("call")
    recorder.record(lambda: cuda.log.append("call"))
    recorder.replay()
    assert cuda.log == [
        "aside waits for current", "on aside", "call", "off aside", "current waits for aside",
        "on cuda:1", "capture on aside, thread_local", "call", "captured",
        "on cuda:1", "replay",
    ]  # fmt: skip


def test_the_current_stream_waits_for_a_call_that_failed_too(cuda):
    with pytest.raises(ZeroDivisionError), Recorder(torch.device("cuda", 1)).aside():
        raise ZeroDivisionError
    assert cuda.log[-1] == "current waits for aside"


def test_waiting_is_an_error_inside_alone(cuda):
    cuda.mode = 1
    with pytest.raises(ZeroDivisionError), Recorder(torch.device("cuda", 1)).refusing_to_wait():
        assert cuda.mode == "error"
        raise ZeroDivisionError
    assert cuda.mode == 1


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
CALLS = 8
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    reason = rk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with rk.use_backend(request.param):
        yield torch.device("cuda", torch.cuda.current_device())


def make_training(device, dtype=torch.float32, lr=0.02, masks=True):
    """(model, optimizer, step) of the small classifier with dropout in its adapters, which are not zero."""
    torch.manual_seed(0)
    config = rk.RoSAConfig(r=2, density=0.1, lora_dropout=0.3, mask="random", target_modules=["ff.0", "ff.2", "query"])
    model = rk.add_adapters(Classifier(width=32).to(device, dtype), config)
    if masks:
        rk.select_masks(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(lr, device=device), fused=True, capturable=True)

    def step(ids, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(ids).float(), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss

    return model, optimizer, step


def outcome(device, dtype, graphed):
    model, optimizer, step = make_training(device, dtype)
    ids, labels = IDS.to(device), LABELS.to(device)
    run = rk.graphed(step, ids, labels) if graphed else step
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    torch.manual_seed(1)
    losses = []
    for number in range(CALLS):
        losses.append(run((ids + number) % 20, (labels + number) % 3).detach())
        scheduler.step()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    return torch.stack(losses), *[p.detach() for p in parameters], *gradients, torch.cuda.get_rng_state(device)


@pytest.mark.gpu
@on_a_gpu
class TestOnAGPU:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_a_graphed_training_has_the_bits_of_an_eager_one(self, gpu, dtype):
        """Dropout masks included: the same seed gives a replay the random numbers of the eager call."""
        eager, replayed = outcome(gpu, dtype, graphed=False), outcome(gpu, dtype, graphed=True)
        assert all(map(torch.equal, replayed, eager))

    def test_each_replay_draws_its_masks_anew(self, gpu):
        *_, step = make_training(gpu, lr=0.0)
        ids, labels = IDS.to(gpu), LABELS.to(gpu)
        run = rk.graphed(step, ids, labels)
        losses = [run(ids, labels) for _ in range(CALLS + 4)][CALLS:]
        assert len(set(torch.stack(losses).tolist())) == 4

    def test_inputs_may_come_from_the_host(self, gpu):
        *_, step = make_training(gpu, lr=0.0)
        model_inputs = IDS.to(gpu), LABELS.to(gpu)
        run = rk.graphed(step, *model_inputs)
        for _ in range(CALLS):
            loss = run(IDS, LABELS)
        assert loss.device == gpu and bool(loss.isfinite())

    def test_a_step_that_waits_for_the_gpu_is_refused_before_a_capture(self, gpu):
        *_, step = make_training(gpu)
        ids, labels = IDS.to(gpu), LABELS.to(gpu)

        def waiting(ids, labels):
            loss = step(ids, labels)
            if loss.item() > 1e6:
                raise FloatingPointError
            return loss

        run = rk.graphed(waiting, ids, labels)
        with pytest.raises(RuntimeError, match="waits for the GPU"):
            for _ in range(CALLS):
                run(ids, labels)
        assert bool(step(ids, labels).isfinite()), "the process is as it was"

    def test_other_masks_are_refused_and_recorded_anew(self, gpu):
        model, optimizer, step = make_training(gpu, masks=False)
        ids, labels = IDS.to(gpu), LABELS.to(gpu)
        run = rk.graphed(step, ids, labels)
        for _ in range(CALLS):
            run(ids, labels)
        optimizer.zero_grad()
        rk.select_masks(model)
        with pytest.raises(RuntimeError, match="Call rk.graphed again"):
            run(ids, labels)
        run = rk.graphed(step, ids, labels)
        assert all(bool(run(ids, labels).isfinite()) for _ in range(CALLS))

    def test_graphs_of_two_shapes_take_turns(self, gpu):
        results = []
        for graphed in (False, True):
            model, _, step = make_training(gpu)
            ids, labels = IDS.to(gpu), LABELS.to(gpu)
            runs = [step, step]
            if graphed:
                runs = [rk.graphed(step, ids, labels), rk.graphed(step, ids[:, :5].contiguous(), labels)]
            torch.manual_seed(1)
            for _ in range(CALLS):
                runs[0](ids, labels)
                runs[1](ids[:, :5], labels)
            results.append([parameter.detach() for parameter in model.parameters()])
            results[-1] += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(map(torch.equal, *results))
