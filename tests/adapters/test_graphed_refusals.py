"""What a replay would get wrong is refused by rk.graphed, in words; on recorded calls, as in test_graphed.py."""

import threading

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import rosa_kernels as rk
from graphed_training import CALLS, LABELS, Training, adamw, assert_same_bits, batches, trainable
from recorded_calls import RecordedCalls
from rosa_kernels.graphs import graphed_step
from rosa_kernels.graphs.participants import Participants, Place
from rosa_kernels.graphs.snapshot import Snapshot
from small_classifier import IDS, Classifier

LAYER = "blocks.0.ff.0"


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphed_step, "Recorder", RecordedCalls)


def _swap_data(training):
    parameter = training.model.get_submodule(LAYER).lora_B["default"]
    parameter.data = parameter.data.clone()


def _other_pattern(training):
    layer = training.model.get_submodule(LAYER)
    shape, entries = layer.weight_shape, layer.sparse_pattern().nnz
    layer.place_pattern(rk.CSRPattern.random(shape, entries / (shape[0] * shape[1]), seed=5))


def _load_optimizer(training):
    training.optimizer.load_state_dict(training.optimizer.state_dict())


def _replace_state(training):
    state = training.optimizer.state[trainable(training.model)[0]]
    state["exp_avg"] = state["exp_avg"].clone()


def _more_parameters(training):
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def _replace_layer(training):
    training.model.blocks[0].ff[1] = nn.ReLU()


def _set(path, name, value):
    return lambda training: setattr(training.model.get_submodule(path), name, value)


CHANGES = {
    "another pattern": (_other_pattern, "ff.0.patterns.default.crow_indices is another one"),
    "merged": (lambda training: rk.merge_adapters(training.model), "unmerged_weight is another one"),
    "evaluation mode": (lambda training: training.model.eval(), "training was True and is False"),
    "disabled": (_set(LAYER, "adapter_enabled", False), "adapter_enabled was True and is False"),
    "scaling": (_set(LAYER, "scaling", 3.0), "scaling was 8.0 and is 3.0"),
    "dropout": (_set(LAYER, "lora_dropout", 0.1), "lora_dropout was 0.3 and is 0.1"),
    "new storage": (_swap_data, "lora_B.default is another one or lies elsewhere"),
    "unfrozen": (lambda training: training.model.norm.requires_grad_(True), "norm.weight is another one"),
    "replaced module": (_replace_layer, "ff.1 is another one"),
    "weight decay": (
        lambda t: t.optimizer.param_groups[0].update(weight_decay=0.5),
        "weight_decay was 0.01 and is 0.5",
    ),
    "betas": (
        lambda t: t.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
        r"param_groups\[0\].betas is another one",
    ),
    "one state": (_replace_state, "'exp_avg'. is another one"),
    "optimizer state": (_load_optimizer, "AdamW.state is another one"),
    "parameter group": (_more_parameters, "AdamW.param_groups has 2 entries and had 1"),
}


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_what_a_replay_would_not_see_is_refused(recorded, change, words):
    training = Training()
    run = training.recorded()
    change(training)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    with pytest.raises(RuntimeError, match=words):
        run(IDS, LABELS)
    assert all(map(torch.equal, before, training.model.parameters())), "nothing has run"


def test_masks_that_are_chosen_after_the_recording_need_a_new_graph(recorded):
    """A graph of RoSA's warm-up, and after select_masks another one."""

    def train(graphed):
        training = Training(masks=False)
        losses = []
        torch.manual_seed(1)
        for _ in range(2):
            run = training.graphed() if graphed else training.step
            losses += [run(*batch) for batch in batches()]
            if not training.model.get_submodule(LAYER).masks_selected:
                training.optimizer.zero_grad()
                rk.select_masks(training.model)
                if graphed:
                    with pytest.raises(RuntimeError, match="since the call before, .* Call rk.graphed again"):
                        run(IDS, LABELS)
        return losses

    assert_same_bits(train(True), train(False))


def test_other_surroundings_are_refused(recorded):
    run = Training().recorded()
    for surroundings, words in (
        (torch.no_grad(), "is_grad_enabled"),
        (rk.use_backend("reference"), "use_backend was 'auto' and is 'reference'"),
    ):
        with surroundings, pytest.raises(RuntimeError, match=words):
            run(IDS, LABELS)
    run(IDS, LABELS)


def test_a_model_that_is_as_it_was_replays_on(recorded):
    training = Training()
    run = training.recorded()
    training.model.eval()
    training.model.train()
    training.optimizer.param_groups[0]["weight_decay"] = float("0.01")  # an equal number in another object
    assert run(IDS, LABELS).isfinite()


def with_float_lr(model):
    return torch.optim.AdamW(trainable(model), lr=0.02, fused=True, capturable=True)


def test_a_learning_rate_that_python_changes_is_refused_at_the_next_call(recorded):
    training = Training(make_optimizer=with_float_lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
    run = training.graphed()
    run(IDS, LABELS)
    scheduler.step()
    with pytest.raises(RuntimeError, match=r"lr was 0.02 and is 0.01.*may be a tensor"):
        run(IDS, LABELS)


class Counting(torch.optim.SGD):
    """An optimizer that counts in Python, as Adam did before it was capturable."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
        return super().step(closure)


class LateState(torch.optim.SGD):
    """It makes a state in the call that is recorded, and each replay would begin with that again."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        if self.steps > graphed_step.WARM_UPS:
            parameter = self.param_groups[0]["params"][0]
            self.state[parameter]["average"] = torch.zeros_like(parameter)
        return super().step(closure)


def _after_step(training, act):
    def step(ids, labels):
        loss = training.step(ids, labels)
        act(training)
        return loss

    return step


def _scheduled(training):
    scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
    return _after_step(training, lambda training: scheduler.step())


def _reading_the_loss(training):
    def step(ids, labels):
        loss = training.step(ids, labels)
        if loss.item() > 100:
            raise FloatingPointError
        return loss

    return step


def _own_count(training):
    training.model.calls = 0
    return _after_step(training, lambda training: setattr(training.model, "calls", training.model.calls + 1))


STEPS = {
    "a loss that Python reads": (adamw, _reading_the_loss, RuntimeError, "waits for the GPU"),
    "a scheduler of a tensor": (adamw, _scheduled, ValueError, r"it writes AdamW.param_groups\[0\].lr"),
    "a scheduler of a number": (with_float_lr, _scheduled, ValueError, "lr was"),
    "an optimizer that counts in Python": (
        lambda model: Counting(trainable(model), lr=0.1), lambda training: training.step, ValueError, "'step'. was",
    ),
    "an optimizer that counts on the CPU": (
        lambda model: torch.optim.AdamW(trainable(model), lr=0.1), lambda training: training.step,
        ValueError, "give it capturable=True",
    ),
    "an optimizer whose state comes late": (
        lambda model: LateState(trainable(model), lr=0.1), lambda training: training.step, ValueError,
        "LateState.state has 1 entries and had 0",
    ),
    "a module that counts in Python": (adamw, _own_count, ValueError, "Classifier.calls was"),
    "a parameter with a new storage": (adamw, lambda t: _after_step(t, _swap_data), ValueError, "lies elsewhere"),
    "a number": (adamw, lambda training: lambda *batch: 3.0, TypeError, "expected to return tensors, got float"),
}  # fmt: skip


@pytest.mark.parametrize("make_optimizer, make_step, error, words", STEPS.values(), ids=STEPS)
def test_a_step_that_no_replay_repeats_is_refused(recorded, make_optimizer, make_step, error, words):
    training = Training(make_optimizer=make_optimizer)
    run = rk.graphed(make_step(training), IDS, LABELS)
    with pytest.raises(error, match=words):
        for _ in range(CALLS):
            run(IDS, LABELS)


def test_a_recording_that_fails_leaves_the_gradients(monkeypatch):
    class Failing(RecordedCalls):
        def record(self, call):
            super().record(call)
            raise RuntimeError("capture failed")

    monkeypatch.setattr(graphed_step, "Recorder", Failing)
    training = Training()
    run = training.graphed()
    for _ in range(graphed_step.WARM_UPS):
        run(IDS, LABELS)
    before = [parameter.grad for parameter in trainable(training.model)]
    with pytest.raises(RuntimeError, match="capture failed"):
        run(IDS, LABELS)
    assert all(parameter.grad is gradient for parameter, gradient in zip(trainable(training.model), before))


def test_a_module_on_another_device_is_refused(recorded):
    training = Training()
    training.model.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    with pytest.raises(ValueError, match="Classifier.elsewhere lies on meta"):
        training.graphed()(IDS, LABELS)


def test_data_parallel_models_are_refused(recorded, monkeypatch):
    training = Training()
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Classifier)
    with pytest.raises(ValueError, match="Classifier is wrapped in DDP or FSDP"):
        training.graphed()(IDS, LABELS)


@pytest.mark.parametrize("inputs, error, words", [
    ((IDS,), ValueError, "expected 2 as the examples, got 1"),
    ((IDS[:2], LABELS[:2]), ValueError, r"inputs\[0\]: expected torch.int64 of shape \(4, 10\) .* got .*\(2, 10\)"),
    ((IDS, LABELS.int()), ValueError, r"inputs\[1\]: expected torch.int64 .* got torch.int32"),
    ((IDS.tolist(), LABELS), TypeError, r"inputs\[0\]: expected a tensor, got list"),
])  # fmt: skip
def test_inputs_unlike_the_examples_are_refused(recorded, inputs, error, words):
    run = Training().graphed()
    with pytest.raises(error, match=words):
        run(*inputs)


@pytest.mark.parametrize("examples, error, words", [
    ((3.0,), TypeError, r"example_inputs\[0\]: expected a tensor, got float"),
    ((torch.ones(2).to_sparse(),), TypeError, "plain dense tensor"),
    ((torch.ones(2, requires_grad=True),), ValueError, "requires no gradient"),
    ((torch.ones(2), torch.ones(2, device="meta")), ValueError, r"example_inputs\[1\]: expected on cpu, got meta"),
])  # fmt: skip
def test_examples_that_do_not_serve_are_refused(recorded, examples, error, words):
    with pytest.raises(error, match=words):
        rk.graphed(lambda *inputs: None, *examples)


def test_a_step_must_be_callable(recorded):
    with pytest.raises(TypeError, match="step: expected a callable, got Tensor"):
        rk.graphed(IDS, IDS)


def test_a_cpu_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="a CUDA or ROCm GPU, and cpu is none; call step itself there"):
        rk.graphed(lambda ids: None, IDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="PyTorch finds none here"):
        rk.graphed(lambda: None)


def test_the_stand_in_reads_what_a_graph_reads(recorded, monkeypatch):
    """Without the check, a replay after another pattern goes on with the old one: the fault that the check is for."""
    training = Training(make_optimizer=lambda model: torch.optim.SGD(trainable(model), lr=0.0))
    training.model.requires_grad_(False)
    logits = rk.graphed(lambda ids: training.model.eval()(ids), IDS)
    values = training.model.get_submodule(LAYER).sparse_values
    values.fill_(1.0)
    old = [logits(IDS) for _ in range(CALLS)][-1]
    assert torch.equal(old, training.model(IDS))
    _other_pattern(training)
    values.fill_(1.0)
    monkeypatch.setattr(graphed_step.GraphedStep, "_check_unchanged", lambda self: None)
    assert torch.equal(logits(IDS), old) and not torch.equal(training.model(IDS), old)


class Functional(nn.Module):
    """A layer that holds its pattern itself, straight on rk.sparse_linear."""

    def __init__(self):
        super().__init__()
        self.pattern = rk.CSRPattern.random((8, 6), 0.25, seed=0)
        self.register_buffer("weight", torch.randn(8, 6))
        self.values = nn.Parameter(torch.randn(self.pattern.nnz))

    def forward(self, x):
        return rk.sparse_linear(x, self.weight, None, self.values, self.pattern)


def test_a_pattern_that_a_module_holds_itself(recorded):
    layer = Functional()
    run = rk.graphed(lambda x: layer(x), torch.randn(3, 6))
    for _ in range(CALLS):
        x = torch.randn(3, 6)
        assert torch.equal(run(x), layer(x))
    layer.pattern = rk.CSRPattern.random((8, 6), 0.25, seed=1)
    with pytest.raises(RuntimeError, match="Functional.pattern is another one"):
        run(x)


def test_modules_of_other_threads_take_no_part(recorded):
    participants = Participants(torch.device("cpu"))
    with participants.noticing():
        thread = threading.Thread(target=Functional(), args=(torch.randn(3, 6),))
        thread.start()
        thread.join()
    assert participants.places() == []


def test_memory_that_a_replay_reads_is_not_given_to_others():
    """A replay that is refused reads nothing, but a graph may still run when Python has let go of a tensor."""
    parameter = nn.Parameter(torch.zeros(64))
    snapshot = Snapshot([Place("layer", "weight", {"weight": parameter}, "weight")], [], "cpu")
    address = parameter.data_ptr()
    parameter.data = torch.ones(64)
    others = [torch.ones(64) for _ in range(1000)]
    assert all(other.data_ptr() != address for other in others)
    assert snapshot.difference() == "layer.weight is another one or lies elsewhere"


def test_the_tensors_inside_a_subclass_are_watched():
    inside = torch.zeros(4), torch.ones(4)
    tensors = {"weight": TwoTensor(*inside)}
    snapshot = Snapshot([Place("layer", "weight", tensors, "weight")], [], "cpu")
    tensors["weight"] = TwoTensor(*inside)
    assert snapshot.difference() is None
    tensors["weight"] = TwoTensor(inside[0], inside[1].clone())
    assert snapshot.difference() == "layer.weight is another one or lies elsewhere"


def test_what_is_gone_or_new_is_named():
    tensors = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    snapshot = Snapshot([Place("layer", name, tensors, name) for name in tensors], [("layer", tensors)], "cpu")
    bias = tensors.pop("bias")
    assert snapshot.difference() == "layer.bias is gone"
    tensors["bias"] = bias
    assert snapshot.difference() is None
    tensors["scale"] = bias
    assert snapshot.difference() == "layer has 3 entries and had 2"


@pytest.mark.exhaustive
def test_a_compiled_model_is_noticed_whole_and_stays_one_program():
    """The hooks that notice who takes part break no program, and the second call already runs without them."""
    torch._dynamo.reset()
    model, participants, programs = Classifier(), Participants(torch.device("cpu")), []

    def compiler(program, inputs):
        programs.append(program)
        return program

    compiled = torch.compile(model, backend=compiler)
    with participants.noticing():
        compiled(IDS)
    weights = [place.container["weight"] for place in participants.places() if place.name == "weight"]
    assert any(weight is model.head.weight for weight in weights)
    assert len(programs) == 1
    compiled(IDS)
    before = len(programs)
    compiled(IDS)
    assert len(programs) == before == 2
