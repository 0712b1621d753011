"""predict.py on a finished run, as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import predict
import rosa_kernels as rk
from data import train_tokenizer
from scripts import run_script
from storage import save_run
from transformer import ClassifierConfig, ReviewClassifier

TEXTS = ["good good good", "bad bad bad", "good bad"]


def make_run(directory: Path, classes: int, adapted: bool) -> ReviewClassifier:
    """An untrained model in directory/run, its base in directory/base."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS * 3, 280)
    model = ReviewClassifier(
        ClassifierConfig(tokenizer.get_vocab_size(), classes, 16, width=8, layers=1, heads=2, feed_forward=8)
    )
    torch.nn.init.normal_(model.token_embedding.weight)
    torch.nn.init.normal_(model.head.weight)
    save_run(directory / "base", model, tokenizer, {}, base=directory, adapted=False)
    if adapted:
        rk.add_adapters(model, rk.LoRAConfig(r=2, modules_to_save=("head",)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    save_run(directory / "run", model, tokenizer, {}, base=directory / "base", adapted=adapted)
    return model.eval()


def rows_of(output: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines()]


def test_texts_as_arguments(tmp_path, capsys):
    make_run(tmp_path, classes=2, adapted=True)
    run_script(predict.__file__, tmp_path / "run", *TEXTS)
    rows = rows_of(capsys.readouterr().out)
    assert [row[2] for row in rows] == TEXTS
    assert all(row[0] in ("negative", "positive") and 0.5 <= float(row[1]) <= 1 for row in rows)


def test_lines_on_standard_input_blank_ones_left_out(tmp_path):
    make_run(tmp_path, classes=5, adapted=False)
    command, lines = [sys.executable, predict.__file__, tmp_path / "run"], "good\n\n  \nbad – naïve ☺\n"
    process = subprocess.run(command, input=lines, capture_output=True, text=True, encoding="utf-8", check=False)
    assert process.returncode == 0, process.stderr
    rows = rows_of(process.stdout)
    assert [row[2] for row in rows] == ["good", "bad – naïve ☺"]
    assert all(row[0] in {"1 star", "2 stars", "3 stars", "4 stars", "5 stars"} for row in rows)


def test_predictions_are_the_saved_models(tmp_path):
    model = make_run(tmp_path, classes=2, adapted=True)
    loaded, tokenizer = predict.load_run(tmp_path / "run")
    texts = [f"good {'bad ' * (i % 9)}{i}" for i in range(150)]
    for (name, probability, text), expected_text in zip(predict.predict(loaded, tokenizer, texts), texts, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids[:16]])
        expected = model(ids, torch.ones_like(ids, dtype=torch.bool)).softmax(1)[0]
        assert text == expected_text and name == ("negative", "positive")[int(expected.argmax())]
        assert probability == pytest.approx(expected.max().item(), abs=1e-5)


def test_the_adapter_counts(tmp_path):
    make_run(tmp_path, classes=2, adapted=True)
    with_adapter, tokenizer = predict.load_run(tmp_path / "run")
    without, _ = predict.load_run(tmp_path / "base")
    adapted, base = (list(predict.predict(model, tokenizer, TEXTS)) for model in (with_adapter, without))
    assert adapted != base


@pytest.mark.parametrize("unfinished", [False, True])
def test_no_finished_run_is_an_error(tmp_path, unfinished):
    if unfinished:
        make_run(tmp_path, classes=2, adapted=False)
        (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(SystemExit, match="^error: .*no finished run"):
        run_script(predict.__file__, tmp_path / "run", "good")
