"""--cuda-graph, on recorded calls in place of a GPU: trainings by replays, and what runs without a graph."""

import pytest
import torch

import rosa_kernels as rk
import train_classifier
from data import Batch, EncodedReviews, train_tokenizer
from options import parse_options
from recorded_calls import RecordedCalls
from reviews import Review
from rosa_kernels.graphs import graphed_step
from step_graphs import padded
from storage import REPORT
from training import TrainingSettings, train
from transformer import ClassifierConfig, ReviewClassifier

WORDS = "dull slow weak bright quick strong thing film"
EPOCHS, BATCH, REVIEWS = 3, 8, 85  # ten full batches and a short one in each epoch
SELECTING_STEP = 13


class Eager:
    """In the place of a graph: the same batches, without one."""

    replays = 0

    def __init__(self, step, *examples):
        self.step = step

    def __call__(self, *batch):
        return self.step(*batch)


def reviews():
    words = WORDS.split()
    texts = [" ".join(words[(number * step) % 8] for step in range(1, 3 + number % 50)) for number in range(REVIEWS)]
    return [Review(number % 2, text) for number, text in enumerate(texts)]


def training(monkeypatch, graph):
    """(the TrainingRun, the trained parameters, where the random numbers are) with this in a graph's place."""
    monkeypatch.setattr(rk, "graphed", graph)
    tokenizer = train_tokenizer((review.text for review in reviews()), 300)
    encoded = EncodedReviews(reviews(), tokenizer, 48)
    assert len({-(-length // 32) for length in encoded.lengths.tolist()}) == 2, "graphs of two shapes"
    torch.manual_seed(0)
    config = ClassifierConfig(tokenizer.get_vocab_size(), max_tokens=48, width=16, layers=1, heads=2, feed_forward=16)
    model = ReviewClassifier(config)
    rosa = rk.RoSAConfig(r=2, lora_dropout=0.2, density=0.1, mask="random", target_modules=["q_proj", "up_proj"])
    rk.add_adapters(model, rosa)

    def choose_masks(step):
        if step == SELECTING_STEP:
            rk.select_masks(model)
        return step == SELECTING_STEP

    settings = TrainingSettings(EPOCHS, BATCH, 0.01, 0.02, 0.1, "fp32", seed=0, cuda_graph=True)
    run = train(model, encoded, encoded, settings, "test", before_step=choose_masks)
    return run, [parameter.detach() for parameter in model.parameters()], torch.get_rng_state()


def test_replays_train_as_the_steps_themselves(monkeypatch):
    graph, replays = rk.graphed, []

    class Counted(RecordedCalls):
        def replay(self):
            replays.append(self)
            super().replay()

    eager, parameters, random_numbers = training(monkeypatch, Eager)
    monkeypatch.setattr(graphed_step, "Recorder", Counted)
    run, same_parameters, same_random_numbers = training(monkeypatch, graph)
    assert all(map(torch.equal, same_parameters, parameters)) and torch.equal(same_random_numbers, random_numbers)
    assert run.validation_accuracy == eager.validation_accuracy and eager.graphed_steps == 0
    # Of each of two shapes three steps warm up, before the masks are chosen and after.
    assert run.graphed_steps == len(replays) == EPOCHS * (REVIEWS // BATCH) - 2 * 2 * graphed_step.WARM_UPS


def test_padding_changes_no_logit_beyond_rounding():
    torch.manual_seed(0)
    model = ReviewClassifier(ClassifierConfig(40, max_tokens=32, width=16, layers=1, heads=2, feed_forward=16)).eval()
    batch = Batch(torch.randint(1, 40, (3, 5)), torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
    longer = padded(batch, 32)
    assert longer.tokens.shape == longer.is_token.shape == (3, 32)
    assert not longer.tokens[:, 5:].any() and not longer.is_token[:, 5:].any()
    torch.testing.assert_close(model(*longer[:2]), model(*batch[:2]))


def test_a_cpu_is_refused_with_the_reason(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--cuda-graph"])
    assert stopped.value.code == 2 and "--device is cpu; add --device cuda" in capsys.readouterr().err
    assert parse_options(["--cuda-graph", "--device", "cuda:0"]).cuda_graph and not parse_options([]).cuda_graph


def test_the_report_notes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(graphed_step, "Recorder", RecordedCalls)
    arguments = ["--epochs", "1", "--base-epochs", "1", "--width", "16", "--heads", "2", "--feed-forward", "16"]
    arguments += ["--vocabulary", "300", "--warmup-steps", "4", "--max-tokens", "16", "--threads", "1"]
    options = parse_options([*arguments, "--runs", str(tmp_path), "--out", str(tmp_path / "out")])
    for cuda_graph in (False, True):
        options.cuda_graph = cuda_graph
        report = train_classifier.run(options, 0.0)
        assert report["options"]["cuda_graph"] is cuda_graph and (report["graphed_steps"] > 0) is cuda_graph
        assert (tmp_path / "out" / REPORT).exists()
