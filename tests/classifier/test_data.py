"""Reading reviews from every format, the tokenizer, batches, and which review goes where."""

import bz2
import csv
import gzip
import itertools
import tracemalloc

import numpy as np
import pytest

from data import PAD_ID, EncodedReviews, train_tokenizer
from reviews import Review, ReviewFile
from sources import file_sources, sample_sources

REVIEWS = [Review(1, "Great: it works, and well"), Review(0, "Bad: it broke"), Review(1, "naïve – but good ☺")]
KAGGLE = "".join(f"__label__{review.label + 1} {review.text}\n" for review in REVIEWS)


@pytest.fixture
def tokenizer():
    return train_tokenizer([review.text for review in REVIEWS] * 3, 300)


def write_kaggle(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending, opener", [("", open), (".bz2", bz2.open), (".gz", gzip.open)])
def test_kaggle_text_plain_and_compressed(tmp_path, ending, opener):
    path = tmp_path / f"train.ft.txt{ending}"
    with opener(path, "wb") as stream:
        stream.write(KAGGLE.encode())
    file = ReviewFile(path)
    assert list(file) == REVIEWS
    assert list(file) == REVIEWS, "a second iteration reads the file anew"
    assert (file.records, file.malformed) == (3, 0)


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("ending, opener", [("", open), (".gz", gzip.open)])
def test_csv_with_title_text_and_quotes(tmp_path, header, ending, opener):
    path = tmp_path / f"train.csv{ending}"
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        if header:
            writer.writerow(["label", "title", "text"])
        writer.writerow(["2", 'A "quoted" title', "two lines\\nin one, and\na real break"])
        writer.writerow(["1", "", "no title"])
    assert list(ReviewFile(path)) == [
        Review(1, 'A "quoted" title: two lines in one, and\na real break'),
        Review(0, "no title"),
    ]


def test_csv_of_label_and_text_with_five_classes(tmp_path):
    path = tmp_path / "stars.csv"
    path.write_text("5,superb\n1,awful\n3,so so\n")
    assert list(ReviewFile(path, classes=5)) == [Review(4, "superb"), Review(0, "awful"), Review(2, "so so")]


def test_parquet_counts_labels_from_zero(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet is an optional extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet is an optional extra")
    path = tmp_path / "train.parquet"
    table = pyarrow.table({"label": [1, 0], "title": ["Great", None], "content": ["it works", "it broke"]})
    parquet.write_table(table, path)
    assert list(ReviewFile(path)) == [Review(1, "Great: it works"), Review(0, "it broke")]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"rosa_kernels\[parquet\]"):
        list(ReviewFile(tmp_path / "train.parquet"))


@pytest.mark.parametrize(
    "record, reason",
    [
        (b"no label here", "does not read"),
        (b"__label__2", "does not read"),
        (b"__label__2    ", "does not read"),
        (b"__label__3 out of range", "number 3 of 2"),
        (b"__label__0 out of range", "number 0 of 2"),
        (b"__label__1 \xff\xfe not utf-8", "not UTF-8"),
        (b"", "does not read"),
    ],
)
def test_malformed_lines_are_counted_and_left_out(tmp_path, record, reason):
    path = tmp_path / "train.txt"
    good = [b"__label__1 fine"] * 100
    path.write_bytes(b"\n".join([*good[:50], record, *good[50:]]))
    file = ReviewFile(path)
    assert len(list(file)) == 100
    assert (file.records, file.malformed) == (101, 1)
    assert file.first_malformed.startswith("record 51: ") and reason in file.first_malformed


@pytest.mark.parametrize("row", ["two,no label,text", "1,a,b,c", "1,,", "7,a,b"])
def test_malformed_csv_rows_are_counted(tmp_path, row):
    path = tmp_path / "train.csv"
    path.write_text("1,a,b\n" * 100 + row + "\n")
    file = ReviewFile(path)
    assert len(list(file)) == 100
    assert (file.records, file.malformed) == (101, 1)


def test_more_than_one_percent_malformed_is_an_error(tmp_path):
    path = write_kaggle(tmp_path / "train.txt", ["__label__1 fine"] * 98 + ["nothing"] * 2)
    with pytest.raises(ValueError, match=r"2 of 100 records are malformed.*record 99"):
        list(ReviewFile(path))


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_file_without_reviews_is_an_error(tmp_path, content):
    path = tmp_path / "train.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match="train.txt"):
        list(ReviewFile(path))


@pytest.mark.parametrize("name", ["train.json", "train", "train.zip", "train.parquet.gz"])
def test_an_unknown_ending_is_an_error(name):
    with pytest.raises(ValueError, match=name):
        ReviewFile(name)


def test_reading_takes_the_same_memory_for_a_longer_file(tmp_path):
    def peak(reviews):
        path = tmp_path / f"{reviews}.txt.gz"
        with gzip.open(path, "wb") as stream:
            stream.writelines(itertools.repeat(b"__label__1 " + b"word " * 50 + b"\n", reviews))
        tracemalloc.start()
        assert sum(1 for _ in ReviewFile(path)) == reviews
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(20_000) < peak(200) + 50_000


def test_the_tokenizer_knows_its_training_texts_alone(tmp_path):
    train = write_kaggle(tmp_path / "train.txt", [f"__label__{1 + i % 2} zebrastripe number {i}" for i in range(400)])
    test = write_kaggle(tmp_path / "test.txt", ["__label__1 quagmirish quagmirish"] * 10)
    sources = file_sources(train, test, base_train=None, base_share=0.5, classes=2)
    texts = list(sources.training_texts())
    held_out = {review.text for review in sources.validation}
    assert held_out and not held_out & set(texts) and len(held_out) + len(texts) == 400
    tokenizer = train_tokenizer(texts, 400)
    assert tokenizer.encode("Zebrastripe").tokens == ["Ġzebrastripe"]
    assert len(tokenizer.encode("quagmirish").tokens) > 3


def test_the_tokenizer_is_a_function_of_its_texts_and_knows_every_text(tokenizer):
    again = train_tokenizer([review.text for review in REVIEWS] * 3, 300)
    assert tokenizer.to_str() == again.to_str()
    for text in ("漢字 and 😀", "\u200b", "WORKS"):
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() != "" or text == "\u200b"
        assert tokenizer.encode(text).ids and PAD_ID not in tokenizer.encode(text).ids
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(["a"], 256)


def test_reviews_survive_encoding_and_are_cut(tokenizer):
    encoded = EncodedReviews(iter(REVIEWS), tokenizer, max_tokens=6)
    assert len(encoded) == 3 and encoded.labels.tolist() == [1, 0, 1]
    batch = encoded.batch(np.arange(3))
    for row, review in enumerate(REVIEWS):
        expected = tokenizer.encode(review.text).ids[:6]
        assert batch.tokens[row][batch.is_token[row]].tolist() == expected
        assert (batch.tokens[row][~batch.is_token[row]] == PAD_ID).all()
    assert batch.labels.tolist() == [1, 0, 1]


def test_ids_beyond_16_bits_survive(tokenizer):
    class WideTokenizer:
        def get_vocab_size(self):
            return 70_000

        def encode_batch_fast(self, texts):
            return [type("Encoding", (), {"ids": [69_999, len(text)]}) for text in texts]

    encoded = EncodedReviews([Review(0, "abc")], WideTokenizer(), max_tokens=6)
    assert encoded.batch(np.arange(1)).tokens.tolist() == [[69_999, 3]]


def test_no_reviews_cannot_be_encoded(tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        EncodedReviews([], tokenizer, max_tokens=6)


@pytest.fixture
def many(tokenizer):
    lengths = np.random.default_rng(0).integers(1, 60, size=1000)
    return EncodedReviews((Review(i % 2, "x " * length) for i, length in enumerate(lengths)), tokenizer, max_tokens=64)


def test_batches_hold_each_review_once_with_little_padding(many):
    batches = list(many.batches(16, shuffle_seed=(0, 1)))
    assert sum(len(batch.labels) for batch in batches) == 1000
    counts = [sorted(batch.is_token.sum(1).tolist()) for batch in batches]
    assert sorted(itertools.chain(*counts)) == sorted(many.lengths.tolist())
    padded = sum(batch.is_token.numel() for batch in batches)
    assert padded < 1.1 * many.lengths.sum()
    in_order = list(many.batches(16))
    assert sum(len(batch.labels) for batch in in_order) == 1000


def test_batches_follow_their_seed(many):
    def tokens(seed):
        return [batch.tokens for batch in many.batches(16, shuffle_seed=seed)]

    def equal(left, right):
        return len(left) == len(right) and all(a.shape == b.shape and bool((a == b).all()) for a, b in zip(left, right))

    assert equal(tokens((3, 1)), tokens((3, 1)))
    assert not equal(tokens((3, 1)), tokens((3, 2)))
    assert not equal(tokens((3, 1)), tokens((4, 1)))


def test_parts_of_one_file_share_no_text(tmp_path):
    lines = [f"__label__{1 + i % 2} text {i % 500}" for i in range(1000)]
    train = write_kaggle(tmp_path / "train.txt", lines)
    sources = file_sources(train, train, base_train=None, base_share=0.7, classes=2)
    parts = [{review.text for review in part} for part in (sources.validation, sources.base_train, sources.train)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 500
    assert 0.02 < len(parts[0]) / 500 < 0.09 and 0.6 < len(parts[1]) / 500 < 0.75


def test_the_base_may_have_a_file_of_its_own(tmp_path):
    train = write_kaggle(tmp_path / "train.txt", [f"__label__1 target {i}" for i in range(200)])
    base = write_kaggle(tmp_path / "base.txt", [f"__label__2 source {i}" for i in range(200)])
    sources = file_sources(train, train, base_train=base, base_share=0.5, classes=2)
    assert {review.text.split()[0] for review in (*sources.base_train, *sources.base_validation)} == {"source"}
    assert {review.text.split()[0] for review in (*sources.train, *sources.validation)} == {"target"}
    assert len(list(sources.train)) + len(list(sources.validation)) == 200


def test_the_sample_is_what_its_readme_says():
    sources = sample_sources()
    parts = {
        name: list(getattr(sources, name)) for name in ("base_train", "base_validation", "train", "validation", "test")
    }
    assert {name: len(part) for name, part in parts.items()} == {
        "base_train": 8571,
        "base_validation": 600,
        "train": 1539,
        "validation": 300,
        "test": 600,
    }
    texts = [{review.text for review in part} for part in parts.values()]
    assert len(set.union(*texts)) == sum(map(len, parts.values())), "no sentence is in two files"
    assert [round(sum(review.label for review in part) / len(part), 3) for part in parts.values()] == [
        0.5,
        0.517,
        0.625,
        0.557,
        0.622,
    ]
    assert sum(file.malformed for file in sources.files()) == 0
