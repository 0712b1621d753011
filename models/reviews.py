"""Read labelled reviews from a file as a stream, so the memory in use does not depend on the file's length.

| ending | a record | labels |
|---|---|---|
| .txt | `__label__2 Title: text`, UTF-8, one line a review (Kaggle bittlingmayer/amazonreviews, fastText) | from 1 |
| .csv | `"2","title","text"` or `"2","text"`, a header row allowed (amazon_polarity, amazon_review_full) | from 1 |
| .parquet | columns label, title (optional), and text, content or review (Hugging Face; needs pyarrow) | from 0 |

.txt and .csv may further end in .bz2 or .gz. A title goes before its text as `title: text`.
"""

import bz2
import csv
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MALFORMED_SHARE_ALLOWED = 0.01
KAGGLE_LINE = re.compile(r"__label__(\d+)\s+(.*\S)")
PARQUET_TEXT_COLUMNS = ("text", "content", "review")


class Review(NamedTuple):
    label: int  # 0 is the worst, classes - 1 the best
    text: str


class MalformedRecord(ValueError):
    """A record is no review; the message says why."""


class ReviewFile:
    """The reviews of one file. Each iteration reads the file and counts its records again.

    After an iteration `records` says how many records were seen, and `malformed` how many of them were no reviews: no
    label, a label outside 1 ... classes, no text, or no UTF-8. `first_malformed` says what was wrong with the first.

    Args:
        path: its ending is one of the module's table; any other raises ValueError.
        classes: how many labels there are.

    At its end an iteration raises ValueError if the file has no reviews or more than 1 % malformed records.
    """

    def __init__(self, path: str | Path, classes: int = 2) -> None:
        self.path, self.classes = Path(path), classes
        self._records, self._parse = _format_of(self.path)
        self.records = self.malformed = 0
        self.first_malformed: str | None = None

    def __iter__(self) -> Iterator[Review]:
        self.records = self.malformed = 0
        self.first_malformed = None
        for record in self._records(self.path):
            self.records += 1
            try:
                label, text = self._parse(record)
                review = self._checked(label, text)
            except MalformedRecord as reason:
                self.malformed += 1
                self.first_malformed = self.first_malformed or f"record {self.records}: {reason}"
            else:
                yield review
        self._check_counts()

    def _checked(self, label: int, text: str) -> Review:
        if not 0 <= label < self.classes:
            raise MalformedRecord(f"its label is number {label + 1} of {self.classes}")
        text = text.strip()
        if not text:
            raise MalformedRecord("it has no text")
        return Review(label, text)

    def _check_counts(self) -> None:
        if self.records == 0:
            raise ValueError(f"{self.path}: holds no reviews")
        if self.malformed > MALFORMED_SHARE_ALLOWED * self.records:
            raise ValueError(
                f"{self.path}: {self.malformed} of {self.records} records are malformed, more than "
                f"{MALFORMED_SHARE_ALLOWED:.0%}; {self.first_malformed}"
            )


def _format_of(path: Path) -> tuple[Callable, Callable]:
    """Return what iterates over a path's records, and what parses a record into (label from 0, text)."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in (".bz2", ".gz"):
        suffixes = suffixes[:-1]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet" and path.suffix != kind:
        raise ValueError(f"{path}: a .parquet file is compressed inside; unpack it first")
    formats = {
        ".txt": (_lines, _parse_line),
        ".csv": (_csv_rows, _parse_csv_row),
        ".parquet": (_parquet_rows, _parse_parquet_row),
    }
    if kind not in formats:
        raise ValueError(f"{path}: expected a name that ends in .txt, .csv (or these + .bz2, .gz) or .parquet")
    return formats[kind]


def _open(path: Path) -> BinaryIO:
    openers = {".bz2": bz2.open, ".gz": gzip.open}
    return openers.get(path.suffix, open)(path, "rb")


def _lines(path: Path) -> Iterator[bytes]:
    with _open(path) as stream:
        yield from stream


def _parse_line(line: bytes) -> tuple[int, str]:
    try:
        match = KAGGLE_LINE.match(line.decode())
    except UnicodeDecodeError as error:
        raise MalformedRecord(f"it is not UTF-8 ({error.reason})") from error
    if match is None:
        raise MalformedRecord("it does not read `__label__N text`")
    return int(match[1]) - 1, match[2]


def _csv_rows(path: Path) -> Iterator[list[str] | csv.Error]:
    with _open(path) as stream:
        rows = csv.reader(line.decode(errors="replace") for line in stream)
        first = True
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield error
                continue
            if row and not (first and not row[0].strip().isdigit()):  # blank lines and a header are skipped
                yield row
            first = False


def _parse_csv_row(row: list[str] | csv.Error) -> tuple[int, str]:
    if isinstance(row, csv.Error):
        raise MalformedRecord(str(row))
    if len(row) not in (2, 3) or not row[0].strip().isdigit():
        raise MalformedRecord("it does not read label,title,text or label,text")
    # amazon_polarity writes line breaks inside a text as the two characters \n
    return int(row[0]) - 1, _joined(*row[1:]).replace("\\n", " ")


def _parquet_rows(path: Path) -> Iterator[tuple]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install rosa_kernels[parquet]") from error
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        text = next((name for name in PARQUET_TEXT_COLUMNS if name in names), None)
        if "label" not in names or text is None:
            raise ValueError(f"{path}: expected the columns label and {' or '.join(PARQUET_TEXT_COLUMNS)}, got {names}")
        columns = ["label", *(["title"] if "title" in names else []), text]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns))


def _parse_parquet_row(row: tuple) -> tuple[int, str]:
    label, *texts = row
    if not isinstance(label, int) or not all(text is None or isinstance(text, str) for text in texts):
        raise MalformedRecord("its label is no integer or its text no string")
    return label, _joined(*(text or "" for text in texts))


def _joined(*texts: str) -> str:
    return ": ".join(text.strip() for text in texts if text.strip())
