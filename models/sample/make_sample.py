"""Remake the sample next to this file from PyPI's sdist of vaderSentiment 0.5.

    pip download --no-binary :all: --no-deps vaderSentiment==0.5
    python models/sample/make_sample.py vaderSentiment-0.5.zip

Every choice is made by the SHA-256 of a text or of a review's number, so that the same files come out everywhere.
"""

import argparse
import bz2
import hashlib
import io
import re
import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
CLEAR_RATING = 1.0  # mean of 20 raters or more on a scale from -4 to +4; what lies nearer to 0 is not a clear opinion
AMAZON_TEST_LINES, AMAZON_VALIDATION_LINES, FILM_VALIDATION_LINES = 600, 300, 600


class Snippet(NamedTuple):
    group: str  # snippets of one group stay in one split
    label: int  # 1 negative, 2 positive, as in the Kaggle set
    text: str


def hash_order(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def clear_snippets(table: str) -> list[Snippet]:
    """Rows `id <tab> mean rating <tab> text` with a clear rating, each text once; an Amazon id is `review_sentence`."""
    by_text: dict[str, Snippet] = {}
    labels: dict[str, set[int]] = defaultdict(set)
    for row in table.splitlines():
        identity, rating, text = row.split("\t")
        if abs(float(rating)) < CLEAR_RATING:
            continue
        key = re.sub(r"\W+", " ", text.lower()).strip()
        label = 2 if float(rating) > 0 else 1
        labels[key].add(label)
        by_text.setdefault(key, Snippet(identity.split("_")[0], label, " ".join(text.split())))
    return [snippet for key, snippet in by_text.items() if len(labels[key]) == 1]


def take_groups(snippets: list[Snippet], lines: int) -> tuple[list[Snippet], list[Snippet]]:
    """Split off whole groups that hold exactly `lines` snippets: (taken, rest)."""
    sizes: dict[str, int] = defaultdict(int)
    for snippet in snippets:
        sizes[snippet.group] += 1
    taken, free = set(), lines
    for group in sorted(sizes, key=hash_order):
        if sizes[group] <= free:
            taken.add(group)
            free -= sizes[group]
    assert free == 0, f"no set of whole reviews holds exactly {lines} snippets"
    return [s for s in snippets if s.group in taken], [s for s in snippets if s.group not in taken]


def write_split(directory: Path, name: str, snippets: list[Snippet]) -> None:
    ordered = sorted(snippets, key=lambda snippet: hash_order(snippet.text))
    lines = "".join(f"__label__{snippet.label} {snippet.text}\n" for snippet in ordered)
    (directory / f"{name}.txt.bz2").write_bytes(bz2.compress(lines.encode()))
    positive = sum(snippet.label == 2 for snippet in ordered)
    print(f"{name:18} {len(ordered):5} lines, {positive / len(ordered):.1%} positive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="vaderSentiment-0.5.zip")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the splits go (default: here)")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.sdist) as sdist, tarfile.open(fileobj=io.BytesIO(sdist.read(ARCHIVE))) as archive:
        amazon, film = (
            clear_snippets(
                archive.extractfile(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt").read().decode()
            )
            for kind in ("amazon", "movie")
        )
    film_validation, film_train = take_groups(film, FILM_VALIDATION_LINES)
    amazon_test, amazon_rest = take_groups(amazon, AMAZON_TEST_LINES)
    amazon_validation, amazon_train = take_groups(amazon_rest, AMAZON_VALIDATION_LINES)
    write_split(arguments.out, "film.train", film_train)
    write_split(arguments.out, "film.validation", film_validation)
    write_split(arguments.out, "amazon.train", amazon_train)
    write_split(arguments.out, "amazon.validation", amazon_validation)
    write_split(arguments.out, "amazon.test", amazon_test)


if __name__ == "__main__":
    main()
