"""A run of train_classifier.py that version 0.1.0 (commit 91eed36) saved still loads and predicts the same."""

from pathlib import Path

import pytest

from predict import predict
from storage import load_run

HERE = Path(__file__).parent


def test_it_predicts_what_it_predicted():
    expected = [line.split("\t") for line in (HERE / "saved_run_predictions.tsv").read_text().splitlines()]
    model, tokenizer = load_run(HERE / "saved_run")
    predicted = list(predict(model, tokenizer, [text for _, _, text in expected]))
    assert len(predicted) == len(expected) > 0
    for (label, probability, text), (expected_label, expected_probability, expected_text) in zip(predicted, expected):
        assert (label, text) == (expected_label, expected_text)
        assert probability == pytest.approx(float(expected_probability), abs=6e-4)  # printed with three decimals
