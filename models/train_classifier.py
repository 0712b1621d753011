"""Train a base model on some reviews, adapt it to others, test it before and after, write report.json.

python models/train_classifier.py --adapter rosa
python models/train_classifier.py --adapter rosa --train train.ft.txt.bz2 --test test.ft.txt.bz2
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

# This must be set before torch loads OpenMP. Where cores are shared, workers that spin between two small ops starve one
# another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import rosa_kernels as rk
from adaptation import AdapterSizes, add_adapter, mask_selection
from base import BaseRecipe, base_facts, trained_base
from data import EncodedReviews
from options import parse_options
from report import make_report
from sources import Sources, file_sources, sample_sources
from storage import load_classifier, save_run
from training import TrainingSettings, confusion_matrix, train
from transformer import ClassifierConfig


def main(arguments: list[str] | None = None) -> None:
    began = time.perf_counter()
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    # AdamW's averages of rarely seen tokens decay into denormal numbers, and a CPU computes those many times slower.
    torch.set_flush_denormal(True)
    with rk.use_backend(options.backend):
        report = run(options, began)
    print_summary(report, options.out)


def run(options: argparse.Namespace, began: float) -> dict:
    sources = chosen_sources(options)
    recipe = BaseRecipe(sources, model_config(options), base_settings(options))
    base = trained_base(recipe, options.runs, options.device)
    model, tokenizer = load_classifier(base)
    model.to(options.device)
    test_set = EncodedReviews(sources.test, tokenizer, options.max_tokens)
    confusion = base_confusion = confusion_matrix(model, test_set, options.dtype)
    torch.manual_seed(options.seed)  # from here on all is the same, whether the base was trained or found
    sizes = adapter_sizes(options)
    add_adapter(model, options.adapter, sizes)
    parameters = rk.trainable_parameters(model)
    adapting = None
    if options.adapter != "none":
        settings = adapter_settings(options)
        train_set = EncodedReviews(sources.train, tokenizer, options.max_tokens)
        validation_set = EncodedReviews(sources.validation, tokenizer, options.max_tokens)
        choose_masks = mask_selection(model, options.adapter, sizes, train_set, settings)
        adapting = train(model, train_set, validation_set, settings, options.adapter, before_step=choose_masks)
        confusion = confusion_matrix(model, test_set, options.dtype)
    report = make_report(
        options, sources, base_facts(base), base_confusion, adapting, confusion, parameters, time.perf_counter() - began
    )
    save_run(options.out, model, tokenizer, report, base, adapted=options.adapter not in ("none", "full"))
    return report


def chosen_sources(options: argparse.Namespace) -> Sources:
    if options.train is None:
        return sample_sources()
    return file_sources(options.train, options.test, options.base_train, options.base_share, options.classes)


def model_config(options: argparse.Namespace) -> ClassifierConfig:
    return ClassifierConfig(
        vocabulary=options.vocabulary,
        classes=options.classes,
        max_tokens=options.max_tokens,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        feed_forward=options.feed_forward,
        token_dropout=options.token_dropout,
        dropout=options.dropout,
    )


def base_settings(options: argparse.Namespace) -> TrainingSettings:
    return _settings(options, options.base_epochs, options.base_lr, options.base_lr)


def adapter_settings(options: argparse.Namespace) -> TrainingSettings:
    return _settings(options, options.epochs, options.lr, options.sparse_lr)


def _settings(options: argparse.Namespace, epochs: int, lr: float, sparse_lr: float) -> TrainingSettings:
    return TrainingSettings(
        epochs,
        options.batch_size,
        lr,
        sparse_lr,
        options.weight_decay,
        options.dtype,
        options.seed,
        options.cuda_graph,
    )


def adapter_sizes(options: argparse.Namespace) -> AdapterSizes:
    return AdapterSizes(
        options.r, options.alpha, options.density, options.embedding_density, options.mask, options.warmup_steps
    )


def print_summary(report: dict, out: Path) -> None:
    tested = report["test_reviews"]
    margin = 1.96 * math.sqrt(report["accuracy"] * (1 - report["accuracy"]) / tested)
    for file in report["data"]:
        if file["malformed"]:
            print(f"{file['file']}: {file['malformed']} of {file['records']} records malformed and left out")
    print(
        f"{report['adapter']}: accuracy {report['accuracy']:.3f} (before adapting {report['base_accuracy']:.3f}), "
        f"macro F1 {report['macro_f1']:.3f}; {report['trainable_parameters']:,} of {report['total_parameters']:,} "
        f"parameters trained; {report['seconds']:.0f} s"
    )
    print(f"{tested} test reviews: the accuracy is known to ±{100 * margin:.0f} points (95 %)")
    print(f"report and checkpoint: {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; a finished base stays under runs/, no report was written")
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
