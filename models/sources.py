"""Which reviews train the base, adapt it, choose the best epoch and test the result."""

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from reviews import Review, ReviewFile

SAMPLE = Path(__file__).parent / "sample"
VALIDATION_SHARE = 0.05  # so much of a training file validates, where no validation file comes with it


@dataclass(frozen=True)
class Part:
    """The reviews of a file whose text hashes into [begin, end) of [0, 1).

    They are the same on every run, and equal texts stay together.
    """

    file: ReviewFile
    begin: float = 0.0
    end: float = 1.0

    def __iter__(self) -> Iterator[Review]:
        return (review for review in self.file if self.begin <= hash_position(review.text) < self.end)

    def describe(self) -> dict:
        return {"file": self.file.path.name, "sha256": file_sha256(self.file.path), "part": [self.begin, self.end]}


@dataclass(frozen=True)
class Sources:
    base_train: Part
    base_validation: Part
    train: Part
    validation: Part
    test: Part

    def training_texts(self) -> Iterator[str]:
        return (review.text for review in chain(self.base_train, self.train))

    def base_parts(self) -> tuple[Part, ...]:
        """Return what the base is made of, the tokenizer's texts included."""
        return self.base_train, self.base_validation, self.train

    def base_files(self) -> list[ReviewFile]:
        return distinct_files(*self.base_parts())

    def files(self) -> list[ReviewFile]:
        return distinct_files(*self.base_parts(), self.validation, self.test)


def distinct_files(*parts: Part) -> list[ReviewFile]:
    return list({part.file.path: part.file for part in parts}.values())


def file_facts(file: ReviewFile) -> dict:
    """Return what a report says of a file that was read to its end."""
    return {
        "file": file.path.name,
        "sha256": file_sha256(file.path),
        "records": file.records,
        "malformed": file.malformed,
    }


def sample_sources() -> Sources:
    """Return the snippets in the repository, of two classes: films for the base, Amazon's products for the adapter."""

    def part(name: str) -> Part:
        return Part(ReviewFile(SAMPLE / f"{name}.txt.bz2"))

    return Sources(
        part("film.train"),
        part("film.validation"),
        part("amazon.train"),
        part("amazon.validation"),
        part("amazon.test"),
    )


def file_sources(train: Path, test: Path, base_train: Path | None, base_share: float, classes: int) -> Sources:
    """Return the user's files as sources. 5 % of each training file choose the best epoch and train nothing.

    Without a file of its own, the base learns from `base_share` of the training reviews. The adapter learns from the
    others.
    """
    target, testing = ReviewFile(train, classes), ReviewFile(test, classes)
    validation = Part(target, 0.0, VALIDATION_SHARE)
    if base_train is None:
        boundary = VALIDATION_SHARE + base_share * (1 - VALIDATION_SHARE)
        base, rest = Part(target, VALIDATION_SHARE, boundary), Part(target, boundary, 1.0)
        return Sources(base, validation, rest, validation, Part(testing))
    source = ReviewFile(base_train, classes)
    base, base_validation = Part(source, VALIDATION_SHARE, 1.0), Part(source, 0.0, VALIDATION_SHARE)
    return Sources(base, base_validation, Part(target, VALIDATION_SHARE, 1.0), validation, Part(testing))


def hash_position(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
