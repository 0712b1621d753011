"""What each --adapter adds to the frozen base, and when its masks are chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import rosa_kernels as rk
from data import EncodedReviews
from training import TrainingSettings, review_loss
from transformer import ReviewClassifier

ADAPTERS = {
    "none": "the base as it is, tested",
    "full": "every parameter trains on",
    "lora": "low-rank: scaling · B A beside each linear layer and the token embedding",
    "rosa": "low-rank and sparse: B A + S, S the entries with the largest gradients",
    "sparse": "S alone",
    "row": "S alone, whole rows of each weight",
}
HEAD = "head"  # the classifier's last layer trains whole with every adapter
EMBEDDING = "token_embedding"
TARGETS = rf".*_proj|{EMBEDDING}"  # adapters go on every linear layer but the head, and on the token embedding
# Training shuffles its batches by (seed, epoch) with epochs from 1; the batches that choose the masks take this number.
MASK_ROUND = 0


@dataclass(frozen=True)
class AdapterSizes:
    r: int
    alpha: float
    density: float  # S holds this share of each linear layer's entries
    embedding_density: float  # this share of the tokens gets a row of its own in S
    mask: str
    warmup_steps: int  # the low-rank part trains alone for so many steps, then the masks are chosen


def add_adapter(model: ReviewClassifier, adapter: str, sizes: AdapterSizes) -> None:
    """Add the adapter and freeze what it does not train. The model still computes what it did before."""
    if adapter == "none":
        model.requires_grad_(False)
    elif adapter == "full":
        model.requires_grad_(True)
    else:
        rk.add_adapters(model, adapter_config(adapter, sizes))


def adapter_config(adapter: str, sizes: AdapterSizes) -> rk.LoRAConfig:
    common = {"lora_alpha": sizes.alpha, "target_modules": TARGETS, "modules_to_save": (HEAD,)}
    if adapter == "lora":
        return rk.LoRAConfig(r=sizes.r, **common)
    return rk.RoSAConfig(
        r=sizes.r if adapter == "rosa" else 0,
        density=sizes.density,
        density_pattern={EMBEDDING: sizes.embedding_density},
        structure="row" if adapter == "row" else "unstructured",
        mask=sizes.mask,
        warmup_steps=sizes.warmup_steps,
        **common,
    )


def mask_selection(
    model: ReviewClassifier, adapter: str, sizes: AdapterSizes, reviews: EncodedReviews, settings: TrainingSettings
) -> Callable[[int], bool]:
    """Make the function that train calls before each step: it chooses the masks once the warm-up is over, and says so.

    Without a low-rank part there is nothing to warm up but the head, so the masks are chosen before the first step.
    """
    selecting_step = {"rosa": sizes.warmup_steps, "sparse": 0, "row": 0}.get(adapter)

    def before_step(step: int) -> bool:
        if step == selecting_step:
            rk.select_masks(model, reviews.batches(settings.batch_size, (settings.seed, MASK_ROUND)), review_loss)
        return step == selecting_step

    return before_step
