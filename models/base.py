"""The base model is trained once for each configuration and data, and found again under runs/."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch

import data
import reviews
import step_graphs
import training
import transformer
from data import EncodedReviews, train_tokenizer
from sources import Sources, file_facts
from storage import save_classifier, write_json
from training import TrainingSettings, train
from transformer import ClassifierConfig, ReviewClassifier

FACTS = "base.json"


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that decides the base's weights."""

    sources: Sources
    config: ClassifierConfig  # its vocabulary is an upper limit, as a small training set has fewer tokens
    settings: TrainingSettings

    def key(self) -> str:
        """Return 16 hexadecimal digits that change with the data, the configuration, the code and its libraries."""
        described = {
            "reviews": [part.describe() for part in self.sources.base_parts()],
            "config": self.config.to_dict(),
            "settings": asdict(self.settings),
            "threads": torch.get_num_threads(),
            "code": [
                Path(module.__file__).read_text() for module in (reviews, data, transformer, training, step_graphs)
            ],
            "versions": [torch.__version__, tokenizers.__version__],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def trained_base(recipe: BaseRecipe, runs: Path, device: torch.device | str = "cpu") -> Path:
    """Return the directory runs/base-KEY with the trained base, and train the base first if there is none.

    The directory appears whole: an interrupted training leaves one of another name, which is never read.
    """
    directory = runs / f"base-{recipe.key()}"
    if directory.is_dir():
        print(f"base: found in {directory}", file=sys.stderr)
        return directory
    model, tokenizer, facts = _train_base(recipe, device)
    partial = runs / f".{directory.name}-{os.getpid()}"
    save_classifier(partial, model, tokenizer)
    write_json(partial / FACTS, facts)
    try:
        os.rename(partial, directory)
    except OSError:
        if not directory.is_dir():
            raise
        shutil.rmtree(partial)  # another process was faster, and the same recipe gives the same base
    return directory


def base_facts(directory: Path) -> dict:
    """Return the fields of the base's TrainingRun, and under "data" the file_facts of the files it was trained on."""
    return json.loads((directory / FACTS).read_text())


def _train_base(recipe: BaseRecipe, device: torch.device | str):
    sources, settings = recipe.sources, recipe.settings
    tokenizer = train_tokenizer(sources.training_texts(), recipe.config.vocabulary)
    max_tokens = recipe.config.max_tokens
    train_set = EncodedReviews(sources.base_train, tokenizer, max_tokens)
    validation_set = EncodedReviews(sources.base_validation, tokenizer, max_tokens)
    torch.manual_seed(settings.seed)
    config = ClassifierConfig(**{**recipe.config.to_dict(), "vocabulary": tokenizer.get_vocab_size()})
    model = ReviewClassifier(config).to(device)
    run = train(model, train_set, validation_set, settings, "base")
    return model, tokenizer, {**asdict(run), "data": [file_facts(file) for file in sources.base_files()]}
