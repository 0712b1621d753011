"""Classify reviews with a run of train_classifier.py. Each review gives a line `label <tab> probability <tab> text`.

python models/predict.py runs/rosa "The battery died after a week."
python models/predict.py runs/rosa < reviews.txt
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from data import EncodedReviews
from reviews import Review
from storage import load_run
from transformer import ReviewClassifier

BATCH = 64


def class_name(label: int, classes: int) -> str:
    """Name a class: negative or positive of two classes, else stars. Label 0 is the worst."""
    return ("negative", "positive")[label] if classes == 2 else f"{label + 1} star{'s' if label else ''}"


@torch.inference_mode()
def predict(model: ReviewClassifier, tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, float, str]]:
    """Yield (name of the likeliest class, its probability, text) for each text that is not blank."""
    texts = (text.strip() for text in texts if text.strip())
    while chunk := list(islice(texts, BATCH)):
        encoded = EncodedReviews((Review(0, text) for text in chunk), tokenizer, model.config.max_tokens)
        batch = encoded.batch(range(len(chunk)))
        probabilities, labels = model(batch.tokens, batch.is_token).softmax(dim=1).max(dim=1)
        for text, label, probability in zip(chunk, labels.tolist(), probabilities.tolist()):
            yield class_name(label, model.config.classes), probability, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="DIR", help="the folder that train_classifier.py wrote, for example runs/rosa"
    )
    parser.add_argument("text", nargs="*", help="reviews; without any, each line of standard input is one")
    arguments = parser.parse_args()
    try:
        model, tokenizer = load_run(arguments.run)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    for name, probability, text in predict(model, tokenizer, arguments.text or sys.stdin):
        print(f"{name}\t{probability:.3f}\t{text}", flush=True)


if __name__ == "__main__":
    main()
