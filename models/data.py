"""From reviews to batches.

A BPE tokenizer is trained on the texts. Reviews become token ids in a file, outside the Python heap. A batch holds
reviews of about equal length.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from reviews import Review

PAD, PAD_ID = "[PAD]", 0
TOKENIZER_REVIEWS = 500_000  # more reviews take minutes and no longer change a vocabulary of this size
SMALLEST_VOCABULARY = 257  # it holds the padding and every byte
POOL_BATCHES = 64  # the reviews of so many batches are sorted by length together


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a lower-casing byte-level BPE tokenizer of at most `vocabulary` tokens on the first 500,000 texts.

    Bytes are its smallest tokens, so it can encode any text; id 0 is the padding. The same texts give the same
    tokenizer. Pass training texts only: a test set that the tokenizer has seen is no longer unseen.

    Raises:
        ValueError: vocabulary below 257.
    """
    if vocabulary < SMALLEST_VOCABULARY:
        raise ValueError(f"vocabulary must be at least {SMALLEST_VOCABULARY}, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(texts, TOKENIZER_REVIEWS), trainer)
    return tokenizer


class Batch(NamedTuple):
    tokens: Tensor  # (B, T) int64, PAD_ID after a review's last token
    is_token: Tensor  # (B, T) bool, False at padding
    labels: Tensor  # (B,) int64

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


class EncodedReviews:
    """Reviews as token ids, in a nameless temporary file that is mapped into memory.

    Beside the file it keeps 17 bytes a review.

    Args:
        reviews: they are read once, 1024 at a time.
        tokenizer: it gives each text its ids.
        max_tokens: a longer review is cut to so many tokens.
    """

    def __init__(self, reviews: Iterable[Review], tokenizer: Tokenizer, max_tokens: int) -> None:
        id_type = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
        labels, ends = array("B"), array("q")
        end = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it is open as long as this object lives
        reviews = iter(reviews)
        while chunk := list(islice(reviews, 1024)):
            encodings = tokenizer.encode_batch_fast([review.text for review in chunk])
            for review, encoding in zip(chunk, encodings):
                ids = np.asarray(encoding.ids[:max_tokens], dtype=id_type)
                self._file.write(ids.tobytes())
                end += len(ids)
                ends.append(end)
                labels.append(review.label)
        if not labels:
            raise ValueError("reviews: expected at least one, got none")
        self._file.flush()
        self.labels = np.frombuffer(labels, dtype=np.uint8)
        self._bounds = np.concatenate([[0], np.frombuffer(ends, dtype=np.int64)])
        self.lengths = np.diff(self._bounds)  # (n,) int64: how many tokens each review has
        self._tokens = np.memmap(self._file, dtype=id_type, mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """Return the reviews at these indices, padded to the longest of them."""
        lengths = self.lengths[indices]
        is_token = np.arange(lengths.max()) < lengths[:, None]
        tokens = np.full(is_token.shape, PAD_ID, dtype=np.int64)
        tokens[is_token] = np.concatenate([self._tokens[self._bounds[i] : self._bounds[i + 1]] for i in indices])
        labels = self.labels[indices].astype(np.int64)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(is_token), torch.from_numpy(labels))

    def batches(self, batch_size: int, shuffle_seed: tuple[int, ...] | None = None) -> Iterator[Batch]:
        """Yield each review once, in batches of about equal lengths.

        shuffle_seed: the same numbers, for example (seed, epoch), give the same batches in the same order. None yields
        the reviews from the shortest to the longest.
        """
        if shuffle_seed is None:
            order = np.argsort(self.lengths, kind="stable")
            yield from (self.batch(order[at : at + batch_size]) for at in range(0, len(order), batch_size))
            return
        generator = np.random.default_rng(shuffle_seed)
        order = generator.permutation(len(self))
        for at in range(0, len(order), batch_size * POOL_BATCHES):
            pool = order[at : at + batch_size * POOL_BATCHES]
            order[at : at + len(pool)] = pool[np.argsort(self.lengths[pool], kind="stable")]
        starts = np.arange(0, len(order), batch_size)
        for at in generator.permutation(starts):
            yield self.batch(order[at : at + batch_size])
