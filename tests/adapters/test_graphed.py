"""rk.graphed on recorded calls (recorded_calls.py), which do on CPU tensors what a CUDA graph does on a GPU.

Every step here trains the small classifier with dropout, and its losses, parameters, gradients and random numbers are
those of eager calls bit for bit.
"""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rosa_kernels as rk
from graphed_training import CALLS, CONFIGS, LABELS, Training, adamw, assert_same_bits, batches, outcome, sgd, trainable
from recorded_calls import RecordedCalls
from rosa_kernels.graphs import graphed_step
from small_classifier import IDS

BY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
Loss = namedtuple("Loss", "loss logits")


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphed_step, "Recorder", RecordedCalls)


@pytest.mark.parametrize("zero", ["before", "before, in place", "after"])
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
@BY_CONFIG
def test_a_graphed_training_has_the_bits_of_an_eager_one(recorded, config, make_optimizer, zero):
    eager, replayed = (Training(config, make_optimizer, zero) for _ in range(2))
    expected = outcome(eager, eager.step)
    assert_same_bits(outcome(replayed, replayed.graphed()), expected)
    assert len(set(expected[0].tolist())) == CALLS


def test_a_scheduler_acts_on_replays_by_a_tensor(recorded):
    results = []
    for graphed in (False, True):
        training = Training()
        scheduler = torch.optim.lr_scheduler.LambdaLR(training.optimizer, lambda step: 1 / (1 + step))
        run = training.graphed() if graphed else training.step
        results.append(outcome(training, run, after_each=scheduler.step))
    assert_same_bits(*results)
    assert not torch.equal(results[0][0], outcome(training := Training(), training.step)[0]), "it does act"


def test_each_replay_draws_its_masks_anew(recorded):
    training = Training(make_optimizer=lambda model: adamw(model, lr=0.0))
    run = training.recorded()
    losses = {run(IDS, LABELS).item() for _ in range(5)}
    assert len(losses) == 5


def test_a_graph_that_repeats_its_random_numbers_is_refused(monkeypatch):
    class Repeating(RecordedCalls):
        def replay(self):
            before = torch.get_rng_state()
            super().replay()
            torch.set_rng_state(before)

    monkeypatch.setattr(graphed_step, "Recorder", Repeating)
    with pytest.raises(RuntimeError, match="same random numbers"):
        Training().recorded()


def test_results_are_tensors_of_their_own(recorded):
    training = Training()

    def step(ids, labels):
        logits = training.model(ids)
        loss = F.cross_entropy(logits, labels)
        return {"both": Loss(loss, [logits, None])}

    run = rk.graphed(step, IDS, LABELS)
    results = [run(*batch)["both"] for batch in batches()]
    for result in results:
        assert type(result) is Loss and result.logits[1] is None and not result.loss.requires_grad
        assert torch.equal(result.loss, F.cross_entropy(result.logits[0], batches()[results.index(result)][1]))
    assert len({result.loss.item() for result in results}) == CALLS


def test_two_graphs_take_turns_over_one_model(recorded):
    """For batches of two shapes: the gradients are those of the latest call, whichever graph it was."""
    results = []
    for graphed in (False, True):
        training = Training()
        short = (IDS[:, :5], LABELS)
        runs = [training.step] * 2
        if graphed:
            runs = [rk.graphed(training.step, *short), training.graphed()]
        both = lambda ids, labels, runs=runs: runs[0](ids[:, :5], labels) + runs[1](ids, labels)
        results.append(outcome(training, both))
    assert_same_bits(*results)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_cleared_and_applied_outside(recorded, set_to_none):
    """Only forward and backward are recorded, with the gradients of two batches added up."""

    def train(graphed):
        training = Training()

        def backward(ids, labels):
            loss = F.cross_entropy(training.model(ids), labels)
            loss.backward()
            return loss

        run = rk.graphed(backward, IDS, LABELS) if graphed else backward
        torch.manual_seed(1)
        for number, batch in enumerate(batches()):
            run(*batch)
            if set_to_none or number % 2:
                training.optimizer.step()
                training.optimizer.zero_grad(set_to_none=set_to_none)
        return [parameter.detach() for parameter in trainable(training.model)]

    assert_same_bits(train(True), train(False))


def test_gradients_that_are_cleared_in_another_way_than_before_are_refused(recorded):
    training = Training(zero="never")
    run = training.recorded()
    training.optimizer.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="was another tensor when step was recorded"):
        run(IDS, LABELS)


def test_parameters_of_no_module_are_watched_too(recorded):
    weight = nn.Parameter(torch.randn(5))
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step(x):
        (weight * x).sum().backward()
        optimizer.step()

    run = rk.graphed(step, torch.randn(5))
    for _ in range(CALLS):
        run(torch.randn(5))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r".grad of a parameter of shape \(5,\) was another tensor"):
        run(torch.randn(5))


def test_clearing_gradients_between_calls_is_harmless_where_the_step_clears_them_too(recorded):
    def clear(training):
        return lambda: training.optimizer.zero_grad()

    eager, replayed = Training(), Training()
    expected = outcome(eager, eager.step, clear(eager))
    assert_same_bits(outcome(replayed, replayed.graphed(), clear(replayed)), expected)


def test_an_update_by_the_gradient_of_the_call_before_is_refused(recorded):
    training = Training()

    def step(ids, labels):
        training.optimizer.step()
        training.optimizer.zero_grad()
        F.cross_entropy(training.model(ids), labels).backward()

    run = rk.graphed(step, IDS, LABELS)
    run(IDS, LABELS)
    with pytest.raises(ValueError, match="gradient of the call before"):
        run(IDS, LABELS)


def test_autocast_inside_the_step(recorded):
    def cast(training):
        def step(ids, labels):
            with torch.autocast("cpu", torch.bfloat16):
                return training.step(ids, labels)

        return step

    eager, replayed = Training(), Training()
    expected = outcome(eager, cast(eager))
    assert_same_bits(outcome(replayed, rk.graphed(cast(replayed), IDS, LABELS)), expected)


def test_autocast_around_the_graph_is_refused(recorded):
    run = Training().graphed()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="put it inside step"):
        run(IDS, LABELS)


def test_a_gradient_scaler_with_a_fused_optimizer(recorded):
    def train(graphed):
        training, scaler = Training(), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

        def step(ids, labels):
            training.optimizer.zero_grad()
            loss = F.cross_entropy(training.model(ids), labels)
            scaler.scale(loss).backward()
            scaler.step(training.optimizer)
            scaler.update()
            return loss

        run = rk.graphed(step, IDS, LABELS) if graphed else step
        return (*outcome(training, run), scaler._scale)

    assert_same_bits(train(True), train(False))
