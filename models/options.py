"""The command line of train_classifier.py. A preset fills in what the user does not say."""

import argparse
from pathlib import Path

import torch

from adaptation import ADAPTERS

PRESETS = {
    "sample": {
        "about": "the snippets in the repository: a few thousand single sentences",
        "vocabulary": 8000, "max_tokens": 64, "width": 128, "layers": 1, "heads": 4, "feed_forward": 256,
        "token_dropout": 0.2, "dropout": 0.2, "weight_decay": 0.1, "batch_size": 64,
        "base_epochs": 8, "base_lr": 1e-3, "epochs": 12, "lr": 1e-3, "embedding_density": 0.25,
    },
    "amazon": {
        "about": "tens of thousands of whole reviews and more",
        "vocabulary": 16000, "max_tokens": 320, "width": 128, "layers": 1, "heads": 4, "feed_forward": 256,
        "token_dropout": 0.4, "dropout": 0.4, "weight_decay": 0.1, "batch_size": 64,
        "base_epochs": 3, "base_lr": 1e-3, "epochs": 3, "lr": 5e-4, "embedding_density": 0.5,
    },
}  # fmt: skip


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options with every default filled in; a wrong option ends the process with a message."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test belong together")
    if options.base_train is not None and options.train is None:
        parser.error("--base-train needs --train and --test")
    if options.train is None and options.classes != 2:
        parser.error("the embedded sample has 2 classes; --classes needs --train and --test")
    if options.cuda_graph and options.device.type != "cuda":
        parser.error(
            f"--cuda-graph records the work of a CUDA or ROCm GPU, and --device is {options.device}; add --device cuda"
        )
    options.preset = options.preset or ("sample" if options.train is None else "amazon")
    for name, value in PRESETS[options.preset].items():
        if name != "about" and getattr(options, name) is None:
            setattr(options, name, value)
    options.sparse_lr = options.lr if options.sparse_lr is None else options.sparse_lr
    options.out = options.out or options.runs / options.adapter
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a review classifier, adapt it to other reviews, test it before and after.\n"
        "Without files: a base from film snippets, adapted to Amazon snippets, both in the repository.",
        epilog="adapters:\n"
        + "".join(f"  {name:8} {what}\n" for name, what in ADAPTERS.items())
        + "presets:\n"
        + "".join(f"  {name:8} for {preset['about']}:\n{_listed(preset)}" for name, preset in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapter", choices=tuple(ADAPTERS), default="rosa", help="default: rosa; see below")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: sample without --train, amazon with it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="report.json and the checkpoint; default: runs/ADAPTER")
    _add_data(parser.add_argument_group("data (.txt or .csv, with .bz2 or .gz or without, or .parquet)"))
    _add_model(parser.add_argument_group("model (defaults from the preset)"))
    _add_training(parser.add_argument_group("training (defaults from the preset)"))
    _add_adapter(parser.add_argument_group("adapter"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _listed(preset: dict) -> str:
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in preset.items() if name != "about"]
    return "".join(f"           {' '.join(flags[at : at + 4])}\n" for at in range(0, len(flags), 4))


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--train", type=Path, metavar="FILE", help="reviews to adapt to; 5 %% of them choose the epoch")
    group.add_argument("--test", type=Path, metavar="FILE", help="reviews to test on")
    group.add_argument("--base-train", type=Path, metavar="FILE", help="reviews for the base")
    group.add_argument(
        "--base-share",
        type=_share,
        default=0.5,
        metavar="P",
        help="without --base-train: the base learns from this share of --train, the adapter from the rest; default 0.5",
    )
    group.add_argument("--classes", type=_at_least(2), default=2, metavar="N", help="labels 1 ... N; default 2")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--vocabulary", type=_at_least(257), metavar="N", help="tokens of the BPE tokenizer at most")
    group.add_argument("--max-tokens", type=_at_least(1), metavar="N", help="longer reviews are cut")
    group.add_argument("--width", type=_at_least(1), metavar="N", help="features of a token")
    group.add_argument("--layers", type=_at_least(1), metavar="N", help="blocks of attention and feed-forward")
    group.add_argument("--heads", type=_at_least(1), metavar="N", help="attention heads; they divide the width")
    group.add_argument("--feed-forward", type=_at_least(1), metavar="N", help="features inside the feed-forward part")
    group.add_argument("--token-dropout", type=_share, metavar="P", help="chance that a token is left out of a step")
    group.add_argument("--dropout", type=_share, metavar="P", help="of the pooled features")


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-epochs", type=_at_least(1), metavar="N", help="passes over the base's reviews")
    group.add_argument("--base-lr", type=_positive, metavar="X", help="AdamW's learning rate for the base")
    group.add_argument("--epochs", type=_at_least(1), metavar="N", help="passes over --train with the adapter")
    group.add_argument("--lr", type=_positive, metavar="X", help="AdamW's learning rate for what adapts it")
    group.add_argument("--sparse-lr", type=_positive, metavar="X", help="learning rate of S; default: as --lr")
    group.add_argument("--weight-decay", type=_not_negative, metavar="X", help="of the matrices")
    group.add_argument("--batch-size", type=_at_least(1), metavar="N", help="reviews in a step")


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--r", type=_at_least(1), default=8, metavar="N", help="rank of B A; default 8")
    group.add_argument(
        "--alpha", type=_positive, default=16.0, metavar="X", help="scaling of B A is alpha / r; default 16"
    )
    group.add_argument(
        "--density",
        type=_share,
        default=0.02,
        metavar="P",
        help="share of the entries in S, in linear layers; default 0.02",
    )
    group.add_argument(
        "--embedding-density", type=_share, metavar="P", help="share of tokens with a row in S; see presets"
    )
    group.add_argument(
        "--warmup-steps",
        type=_at_least(0),
        default=64,
        metavar="N",
        help="low-rank steps before the masks are chosen; default 64",
    )
    group.add_argument(
        "--mask",
        choices=("gradient", "fisher", "snip", "magnitude", "random"),
        default="gradient",
        help="how S's entries are chosen; default gradient",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default 0")
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the linear layers' arithmetic")
    group.add_argument("--backend", default="auto", metavar="NAME", help="see python -m rosa_kernels; default auto")
    group.add_argument("--device", type=torch.device, default="cpu", metavar="NAME", help="default cpu")
    group.add_argument(
        "--cuda-graph",
        action="store_true",
        help="on a GPU: replay the training steps as CUDA graphs, one for each padded length of a batch",
    )
    threads = torch.get_num_threads()
    group.add_argument("--threads", type=_at_least(1), default=threads, metavar="N", help=f"default here: {threads}")
    group.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="the folder where trained bases are kept; default runs",
    )


def _at_least(smallest: int):
    def integer(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
        return value

    return integer


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0.0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0.0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value
