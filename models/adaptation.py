"""What each choice of --adapter adds to the frozen base, and when its masks are chosen."""

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
HEAD = "head"  # the classifier's last layer; it trains whole with every adapter
EMBEDDING = "token_embedding"
TARGETS = rf".*_proj|{EMBEDDING}"  # every linear layer but the head, and the tokens' rows
MASK_ROUND = 0  # stands where training has its epoch, from 1, in the seed of the batches that choose the masks


@dataclass(frozen=True)
class AdapterSizes:
    r: int
    alpha: float
    density: float  # of S in each linear layer
    embedding_density: float  # share of the tokens that get a row of their own
    mask: str
    warmup_steps: int  # of low-rank training before the masks are chosen


def add_adapter(model: ReviewClassifier, adapter: str, sizes: AdapterSizes) -> None:
    """Leave trainable what the choice trains, adapters included; the model computes what it did before."""
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
) -> Callable[[int], None]:
    """For train(before_step=...): after the warm-up, choose the masks from training batches.

    Without a low-rank part there is nothing to warm up but the head, so that masks are chosen at once.
    """
    selecting_step = {"rosa": sizes.warmup_steps, "sparse": 0, "row": 0}.get(adapter)

    def before_step(step: int) -> None:
        if step == selecting_step:
            rk.select_masks(model, reviews.batches(settings.batch_size, (settings.seed, MASK_ROUND)), review_loss)

    return before_step
