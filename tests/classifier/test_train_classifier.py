"""train_classifier.py from its command line to report.json, on reviews that a tiny model learns in seconds."""

import contextlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rosa_kernels as rk
import train_classifier
import training
from adaptation import ADAPTERS
from data import EncodedReviews, train_tokenizer
from options import PRESETS, parse_options
from report import COSTS
from reviews import Review
from scripts import run_script
from training import BestEpoch, TrainingSettings, accuracy, learning_rate_share, macro_f1
from transformer import ClassifierConfig, ReviewClassifier

MODELS = Path(train_classifier.__file__).parent
TINY = [
    "--vocabulary", "300", "--max-tokens", "24", "--width", "16", "--layers", "1", "--heads", "2",
    "--feed-forward", "16", "--base-epochs", "2", "--epochs", "4", "--batch-size", "16", "--base-lr", "0.01",
    "--lr", "0.01", "--r", "2", "--density", "0.1", "--embedding-density", "0.1", "--warmup-steps", "3",
    "--token-dropout", "0.1", "--threads", "1",
]  # fmt: skip
WORDS = {"source": ("dull slow weak", "bright quick strong"), "target": ("leaky noisy faulty", "sturdy silent handy")}


def write_reviews(path: Path, domain: str, count: int) -> Path:
    chance = random.Random(path.name)
    with open(path, "w", encoding="utf-8") as stream:
        for number in range(count):
            label = number % 2
            words = [
                chance.choice(WORDS[domain][label].split()),
                *chance.choices(["the", "a", "thing", "it", "was", "so"], k=6),
            ]
            chance.shuffle(words)
            stream.write(f"__label__{label + 1} Number {number}: {' '.join(words)}\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("reviews")
    return [
        "--base-train",
        str(write_reviews(folder / "base.txt", "source", 300)),
        "--train",
        str(write_reviews(folder / "train.txt", "target", 200)),
        "--test",
        str(write_reviews(folder / "test.txt", "target", 60)),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def process_settings():
    """The script sets them for its whole process, which here other tests share."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def run(out: Path, *options: str) -> dict:
    train_classifier.main([*TINY, *options, "--out", str(out), "--runs", str(out.parent)])
    return json.loads((out / "report.json").read_text())


def without_costs(report: dict) -> dict:
    return {name: value for name, value in report.items() if name not in COSTS}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_each_adapter_trains_and_reports(files, runs, adapter):
    report = run(runs / adapter, "--adapter", adapter, *files)
    confusion = torch.tensor(report["confusion_matrix"])
    assert report["adapter"] == adapter and confusion.sum() == 60 == report["test_reviews"]
    assert report["accuracy"] == accuracy(confusion) and report["macro_f1"] == macro_f1(confusion)
    assert set(COSTS) < set(report) and all(report[cost] > 0 for cost in COSTS)
    assert len(report["data"]) == 3 and all(len(file["sha256"]) == 64 for file in report["data"])
    assert {file["file"]: file["records"] for file in report["data"]} == {
        "base.txt": 300,
        "train.txt": 200,
        "test.txt": 60,
    }
    if adapter == "none":
        assert report["accuracy"] == report["base_accuracy"] and report["trainable_parameters"] == 0
    else:
        assert report["accuracy"] >= max(0.8, report["base_accuracy"] + 0.1)
    if adapter == "full":
        assert report["trainable_parameters"] == report["total_parameters"]
    if adapter in ("lora", "rosa", "sparse", "row"):
        assert 0 < report["trainable_parameters"] < 0.7 * report["total_parameters"]


def test_sparse_parts_end_where_the_options_say(files, runs):
    run(runs / "rosa-masks", "--adapter", "rosa", *files)
    from storage import load_run

    model, _ = load_run(runs / "rosa-masks")
    query, tokens = model.blocks[0].attention.q_proj, model.token_embedding
    assert query.sparse_pattern().nnz == round(0.1 * 16 * 16) and query.sparse_values.abs().min() > 0
    assert tokens.sparse_pattern().nnz == 16 * round(0.1 * tokens.num_embeddings)
    assert model.head.weight.shape == (2, 16) and type(model.head) is torch.nn.Linear


def test_the_frozen_base_stays_and_the_head_moves(files, runs):
    from safetensors.torch import load_file

    run(runs / "lora-head", "--adapter", "lora", *files)
    run(runs / "none-head", "--adapter", "none", *files)
    kept, base = (load_file(runs / name / "model.safetensors") for name in ("lora-head", "none-head"))
    assert kept.keys() == base.keys() and all(torch.equal(kept[name], base[name]) for name in base)
    adapter = load_file(runs / "lora-head" / "adapter" / "adapter_model.safetensors")
    assert not torch.equal(adapter["head.weight"], base["head.weight"])


@pytest.mark.parametrize("adapter", ["rosa", "full"])
def test_the_same_seed_gives_the_same_report(files, tmp_path, adapter):
    reports = [run(tmp_path / runs / "out", "--adapter", adapter, *files) for runs in ("first", "second")]
    assert without_costs(reports[0]) == without_costs(reports[1])
    weights = [tmp_path / runs / "out" / "model.safetensors" for runs in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_base_that_was_found_gives_the_report_of_one_that_was_trained(files, tmp_path, capsys):
    trained = run(tmp_path / "trained", "--adapter", "rosa", *files)
    assert "base: epoch" in capsys.readouterr().err
    found = run(tmp_path / "found", "--adapter", "rosa", *files)
    said = capsys.readouterr().err
    assert "base: found in" in said and "base: epoch" not in said
    assert without_costs(trained) == without_costs(found)


@pytest.mark.parametrize("change", [["--seed", "1"], ["--base-lr", "0.005"], ["--width", "32"], ["--dropout", "0.1"]])
def test_another_configuration_trains_another_base(files, runs, change):
    run(runs / "one", "--adapter", "none", *files)
    bases = len(list(runs.glob("base-*")))
    run(runs / "two", "--adapter", "none", *files, *change)
    assert len(list(runs.glob("base-*"))) == bases + 1


def test_changed_data_trains_another_base(files, tmp_path):
    base, *rest = files[1], *files[2:]
    grown = tmp_path / "base.txt"
    grown.write_text(Path(base).read_text() + "__label__1 one more, dull\n")
    run(tmp_path / "out", "--adapter", "none", *files)
    run(tmp_path / "out", "--adapter", "none", "--base-train", str(grown), *rest)
    assert len(list(tmp_path.glob("base-*"))) == 2


def test_bf16_trains(files, runs):
    assert run(runs / "bf16", "--adapter", "rosa", "--dtype", "bf16", *files)["accuracy"] >= 0.8


def test_five_classes_and_a_base_from_part_of_the_file(tmp_path):
    names = ["awful", "poor", "fair", "good", "superb"]
    lines = [f"__label__{1 + i % 5} number {i} is {names[i % 5]}\n" for i in range(600)]
    (tmp_path / "train.txt").write_text("".join(lines[:500]))
    (tmp_path / "test.txt").write_text("".join(lines[500:]))
    report = run(
        tmp_path / "out", "--adapter", "row", "--classes", "5",
        "--train", str(tmp_path / "train.txt"), "--test", str(tmp_path / "test.txt"),
    )  # fmt: skip
    assert torch.tensor(report["confusion_matrix"]).shape == (5, 5) and report["accuracy"] > 0.3


def test_malformed_lines_show_up_in_report_and_output(files, tmp_path, capsys):
    train = tmp_path / "train.txt"
    train.write_text(Path(files[3]).read_text() + "not a review\n")
    report = run(tmp_path / "out", "--adapter", "lora", *files[:2], "--train", str(train), *files[4:])
    assert {file["file"]: file["malformed"] for file in report["data"]}["train.txt"] == 1
    assert "train.txt: 1 of 201 records malformed" in capsys.readouterr().out


def interrupted(process: subprocess.Popen) -> str:
    """What it writes to stderr until Ctrl-C has ended it; once more where Python dropped one that met a finaliser."""
    for seconds in (20, 40):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=seconds)[1]
    raise AssertionError("two interrupts did not end the run")


@pytest.mark.exhaustive
def test_a_killed_run_leaves_its_base_and_no_report(files, tmp_path):
    command = [sys.executable, MODELS / "train_classifier.py", "--adapter", "lora", *files, *TINY]
    command += ["--epochs", "100000", "--out", tmp_path / "out", "--runs", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("lora: epoch 1/"):
                break
        said = interrupted(process)
    assert process.returncode == 1 and "interrupted" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in tmp_path.glob("base-*")] != []
    assert run(tmp_path / "out", "--adapter", "none", *files)["accuracy"] > 0.4
    assert len(list(tmp_path.glob("base-*"))) == 1, "the base was found, not trained again"


def test_a_run_that_is_written_over_leaves_no_old_adapter(files, runs):
    run(runs / "over", "--adapter", "lora", *files)
    assert (runs / "over" / "adapter").is_dir()
    run(runs / "over", "--adapter", "full", *files)
    assert not (runs / "over" / "adapter").exists()


def test_without_a_terminal_progress_is_a_line_an_epoch(files, runs, capsys):
    run(runs / "quiet", "--adapter", "lora", *files, "--seed", "7")
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.err.splitlines()] == [
        *(f"base: epoch {epoch}/2" for epoch in (1, 2)),
        *(f"lora: epoch {epoch}/4" for epoch in (1, 2, 3, 4)),
    ]
    assert "60 test reviews: the accuracy is known to ±" in said.out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train", "a.txt"], "--train and --test belong together"),
        (["--base-train", "a.txt"], "--base-train needs --train"),
        (["--classes", "5"], "the embedded sample has 2 classes"),
        (["--adapter", "dora"], "invalid choice"),
        (["--r", "0"], "at least 1"),
        (["--density", "1.5"], "must lie in"),
        (["--lr", "-1"], "must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_options_come_from_the_preset_unless_given():
    assert parse_options([]).preset == "sample" and parse_options([]).adapter == "rosa"
    options = parse_options(["--train", "a.txt", "--test", "b.txt", "--width", "64"])
    assert options.preset == "amazon" and options.width == 64
    assert options.vocabulary == PRESETS["amazon"]["vocabulary"]
    assert parse_options(["--token-dropout", "0"]).token_dropout == 0, "a zero is a choice"


def test_help_names_every_option_with_its_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        run_script(train_classifier.__file__, "--help")
    shown = capsys.readouterr().out
    assert not stopped.value.code
    options = "adapter train test base-train classes epochs batch-size lr r density seed dtype backend out"
    for option in options.split():
        assert f"--{option} " in shown
    for name in (*ADAPTERS, *PRESETS):
        assert f"\n  {name} " in shown


@pytest.mark.parametrize(
    "options, message",
    [(["--train", "absent.txt", "--test", "absent.txt"], "absent.txt"), (["--backend", "abacus"], "abacus")],
)
def test_a_missing_file_and_an_unknown_backend_say_so(tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run_script(train_classifier.__file__, *options, "--runs", tmp_path)


def test_measures():
    confusion = torch.tensor([[3, 1], [2, 4]])
    assert accuracy(confusion) == 0.7
    assert macro_f1(confusion) == pytest.approx((2 * 3 / 9 + 2 * 4 / 11) / 2)
    assert macro_f1(torch.tensor([[4, 0, 0], [0, 4, 0], [0, 0, 0]])) == pytest.approx(2 / 3)


def test_the_learning_rate_rises_then_falls():
    shares = [learning_rate_share(step, 100) for step in range(100)]
    assert max(shares) == 1.0 and shares.index(1.0) == 4 and 0 < shares[-1] < 0.02
    assert shares[:5] == sorted(shares[:5]) and shares[4:] == sorted(shares[4:], reverse=True)
    assert learning_rate_share(0, 1) == 1.0


def test_the_best_epoch_is_the_one_that_stays():
    model = torch.nn.Linear(1, 1)
    best = BestEpoch(model)
    for epoch, score in enumerate((0.5, 0.7, 0.7, 0.6), start=1):
        torch.nn.init.constant_(model.weight, epoch)
        best.offer(epoch, score)
    best.restore()
    assert (best.epoch, best.score, model.weight.item()) == (2, 0.7, 2.0)


def test_training_ends_with_its_best_epoch(monkeypatch):
    """Here the first of three: the model's parameters are those that were measured after it."""
    seen, scores = [], iter((0.9, 0.5, 0.7))

    def scripted_confusion(model, reviews, dtype):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        score = next(scores)
        return torch.tensor([[score, 1 - score], [0.0, 0.0]])

    monkeypatch.setattr(training, "confusion_matrix", scripted_confusion)
    reviews = [Review(i % 2, "good" if i % 2 else "bad") for i in range(32)]
    tokenizer = train_tokenizer([review.text for review in reviews], 280)
    encoded = EncodedReviews(reviews, tokenizer, max_tokens=4)
    config = ClassifierConfig(tokenizer.get_vocab_size(), max_tokens=4, width=8, layers=1, heads=2, feed_forward=8)
    model = ReviewClassifier(config)
    settings = TrainingSettings(3, 8, 0.01, 0.01, 0.0, "fp32", seed=0)
    result = training.train(model, encoded, encoded, settings, "test")
    assert result.best_epoch == 1 and len(seen) == 3
    assert all(torch.equal(parameter, best) for parameter, best in zip(model.parameters(), seen[0]))
    assert not torch.equal(model.head.weight, seen[2][-2])


def test_a_loss_that_is_no_number_stops_the_training(files, runs):
    with pytest.raises(FloatingPointError, match="--base-lr"):
        run(runs / "diverged", "--adapter", "none", *files, "--base-lr", "1e30")


def test_masks_are_chosen_after_the_warm_up(files, runs, monkeypatch):
    steps, select = [], rk.select_masks
    optimizer_step = torch.optim.AdamW.step

    def counting_step(self, *arguments):
        steps.append("step")
        return optimizer_step(self, *arguments)

    def recorded_select(*arguments):
        steps.append("select")
        return select(*arguments)

    run(runs / "rosa-base", "--adapter", "none", *files)
    monkeypatch.setattr(torch.optim.AdamW, "step", counting_step)
    monkeypatch.setattr(rk, "select_masks", recorded_select)
    run(runs / "rosa-order", "--adapter", "rosa", *files)
    assert steps.index("select") == 3 and steps.count("select") == 1
