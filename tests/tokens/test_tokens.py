"""Tokens are counted, never guessed; what cannot be counted says why."""

import gzip
import json
import random
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import is_thorough
from training_backends import tokens
from training_backends.core.dataset import DataFile, Dataset
from training_backends.datasets.rows import TextRow, byte_encode, parse_row
from training_backends.tokens import TokenCount, jinja, row_counter, tokenizer_of
from training_backends.tokens import tokenizers as token_models
from training_backends.tokens.counters import OpenAICounter, Reference, count_row
from training_backends.tokens.counts import Lengths, Uncountable, bucket_of
from training_backends.tokens.mistral_layout import Layout
from training_backends.tokens.text_counters import sentencepiece_count, shipped, tekken_count

ROOT = Path(__file__).parents[2]
MISTRAL = "open-mistral-7b"

Rows = Sequence[dict[str, Any] | bytes]
MakeDataset = Callable[..., Dataset]


def count_tokens(
    dataset: Dataset,
    model: str,
    *,
    seq_len: int | None = None,
    processes: int | None = None,
    **counting: Any,
) -> TokenCount:
    """Count as the dataset says, with some of it changed."""
    asked = replace(dataset.counting, **counting)
    dataset = dataset.model_copy(update={"counting": asked})
    return tokens.count_tokens(dataset, model, seq_len=seq_len, processes=processes)


def chat(question: Any, answer: Any, **fields: Any) -> dict[str, Any]:
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer}], **fields}


def image_part(width: int, height: int) -> dict[str, Any]:
    """Make an image that is in the row itself."""
    image = pytest.importorskip("PIL.Image")
    file = BytesIO()
    image.new("RGB", (width, height)).save(file, "png")
    url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def line(row: dict[str, Any] | bytes) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def data_file(path: Path, rows: int, **fields: Any) -> DataFile:
    data = path.read_bytes()
    known = {"role": "train", "sample_type": "instruct", **fields}
    digest = sha256(data).hexdigest()
    return DataFile(path=path, size=len(data), sha256=digest, rows=rows, **known)


@pytest.fixture
def dataset(tmp_path: Path) -> MakeDataset:
    """Write rows to files, one list a file."""

    def make(*files: Rows, **fields: Any) -> Dataset:
        made = []
        for number, rows in enumerate(files):
            path = tmp_path / f"{number}.jsonl"
            path.write_bytes(b"".join(line(row) + b"\n" for row in rows))
            made.append(data_file(path, len(rows), **fields))
        return Dataset(files=tuple(made))

    return make


@pytest.fixture
def seeing(tmp_path: Path, small_tekken: Path) -> str:
    """Make the directory of a model of Mistral's that reads images."""
    directory = tmp_path / "seeing"
    directory.mkdir()
    (directory / "tekken.json").symlink_to(small_tekken)
    return str(directory)


def varied(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make rows of very different lengths, and of different tokens a byte."""
    chance = random.Random(seed)
    words = ["a", "word", "\u00e9t\u00e9", "\N{GRINNING FACE}", "\n", "1234567"]
    return [
        chat("How?", " ".join(chance.choices(words, k=int(chance.paretovariate(1)) % 500 + 1)))
        for _ in range(number)
    ]


def byte_length(row: dict[str, Any]) -> int:
    return len(byte_encode(parse_row(line(row)))[0])


def reference_count(dataset: Dataset, tokenizer: Path) -> int:
    """Count the rows of the only file with mistral-common itself."""
    reference = Reference(tokenizer)
    rows = dataset.files[0].path.read_bytes().splitlines()
    return sum(sum(count_row(reference, parse_row(row))) for row in rows)


# Equality with mistral-common


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the program that compares, as a module."""
    pytest.importorskip("mistral_common")
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.tokens")


def agree(benchmark: Any, path: Path) -> None:
    for compared in benchmark.compared(path, 50 if is_thorough() else 15):
        assert compared.differences == []
        if compared.form in ("instruct", "pretrain", "preference"):
            assert (compared.refused, compared.asked) == (0, 0)


@pytest.mark.parametrize("name", token_models.SHIPPED)
def test_mistral_common_is_the_measure(benchmark: Any, name: str) -> None:
    """Every format has the count of mistral-common, and rows that it refuses have none."""
    agree(benchmark, shipped(token_models.SHIPPED[name]))


def test_later_versions_are_laid_out_as_mistral_common_does(benchmark: Any, tmp_path: Path) -> None:
    """Versions that only come with a model's own file are counted too."""
    for _, path in benchmark.later_tokenizers(tmp_path):
        agree(benchmark, path)


def test_a_broken_layout_is_noticed(
    benchmark: Any, small_tekken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison finds one token too many."""
    right = Layout.chat
    monkeypatch.setattr(Layout, "chat", lambda self, row: (right(self, row) or 0) + 1)
    found = next(benchmark.compared(small_tekken, 5))
    assert len(found.differences) == 5


def test_without_the_fast_library_another_counts_the_same(
    small_tekken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that mistral-common uses takes over where the fast one is missing."""
    texts = ["How are you?  Fine.\n\n\tx", "[INST]\u00e9t\u00e9\u3000\N{GRINNING FACE}", "", " "]
    fast = tekken_count(small_tekken)
    monkeypatch.setitem(sys.modules, "splintr", None)
    assert list(map(tekken_count(small_tekken), texts)) == list(map(fast, texts))


@pytest.mark.parametrize("name", [name for name in token_models.SHIPPED if "tekken" not in name])
def test_words_counted_one_by_one_are_the_whole_text(name: str) -> None:
    """However spaces, line ends and the sign that stands for a space come together."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shipped(token_models.SHIPPED[name])
    count, encode = (
        sentencepiece_count(path),
        sentencepiece.SentencePieceProcessor(str(path)).encode,
    )

    @given(st.text(st.sampled_from(" \n\u2581ab\u00e9\u3000\t.<>") | st.characters(codec="utf-8")))
    @example("  a  \n  the ing \u2581 x")
    def counts_alike(text: str) -> None:
        assert count(text) == len(encode(text))

    counts_alike()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split_by_whitespace": False},
        {"user_defined_symbols": ["\n"]},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
)
def test_a_strangers_sentencepiece_file_is_counted_right(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Word by word where it reads so, and otherwise by whole texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "tokenizer.model"
    mistrals = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    chance = random.Random(0)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(chance.choices("abc", k=9)) for _ in range(200)]),
            model_writer=file,
            model_type="bpe",
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=3,
            **{"byte_fallback": True, **mistrals, **changes},
        )
    count, processor = sentencepiece_count(path), sentencepiece.SentencePieceProcessor(str(path))
    texts = ["a b", "  a\n\n b ", "\u2603\n\u2603 \ufb01", "a b c a b\na", "\n", " ", ""]
    assert [count(text) for text in texts] == [len(processor.encode(text)) for text in texts]


def test_a_wrong_library_is_found_out_and_left(
    dataset: MakeDataset, tmp_path: Path, small_tekken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a row differs from mistral-common, that counts all, and the count says so."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "tekken.json").symlink_to(small_tekken)
    wrong = SimpleNamespace(encode_flat=lambda text: b"1234" * (len(text) + 1))
    splintr = SimpleNamespace(Tokenizer=SimpleNamespace(from_bytes=lambda *_: wrong))
    monkeypatch.setitem(sys.modules, "splintr", splintr)
    data = dataset([chat(f"Question {n}?", "An answer.") for n in range(30)])
    found = count_tokens(data, str(directory))
    assert found.data_tokens == reference_count(data, small_tekken)
    assert "All rows were counted with mistral-common" in found.notes[0]
    assert str(data.files[0].path) in found.notes[0]
    sampled = count_tokens(data, str(directory), sample=10)
    assert "All rows were counted with mistral-common" in sampled.notes[0]


# Files


def test_the_tiny_models_tokens_are_those_it_trains_on(dataset: MakeDataset) -> None:
    """The count is what encoding every row gives, over all files."""
    rows = [chat("How?", "Like this, \u00e9t\u00e9."), {"text": "x" * 5}]
    count = count_tokens(dataset(rows[:1], rows[1:]), "tiny-mistral")
    expected = sum(map(byte_length, rows))
    assert (count.data_tokens, count.basis, count.interval) == (expected, "exact", None)
    assert (count.tokenizer, count.rows) == ("bytes", 2)


def test_only_training_files_count(tmp_path: Path, dataset: MakeDataset) -> None:
    """What is validated on is left out."""
    data = dataset([chat("a", "b")])
    path = tmp_path / "validation.jsonl"
    path.write_bytes(line(chat("c", "d")))
    both = Dataset(files=(*data.files, data_file(path, 1, role="validation")))
    assert count_tokens(both, "tiny-mistral") == count_tokens(data, "tiny-mistral")


def test_weights_change_nothing(dataset: MakeDataset) -> None:
    """A message that the loss leaves out is read all the same."""
    pytest.importorskip("mistral_common")
    row = chat("a", "b")
    plain = count_tokens(dataset([row]), MISTRAL)
    row["messages"][1]["weight"] = 0
    assert count_tokens(dataset([row]), MISTRAL).data_tokens == plain.data_tokens


def test_blank_lines_and_a_missing_end_are_no_rows(tmp_path: Path) -> None:
    """What is between rows is not counted, and the last row is."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + line(chat("a", "b")) + b"\r\n \n\n" + line(chat("c", "d")))
    count = count_tokens(Dataset(files=(data_file(path, 2),)), "tiny-mistral")
    assert count.rows == 2
    assert count.data_tokens == byte_length(chat("a", "b")) + byte_length(chat("c", "d"))


def test_packed_files_are_counted_too(tmp_path: Path, dataset: MakeDataset) -> None:
    """A file that is packed counts as what is in it, however it is asked for."""
    rows = varied(300)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(line, rows))))
    data = Dataset(files=(data_file(path, len(rows)),))
    count = count_tokens(data, "tiny-mistral", sample=200)
    assert count == count_tokens(dataset(rows), "tiny-mistral")


def test_a_pair_counts_both_conversations(dataset: MakeDataset) -> None:
    """A preference costs what its two conversations cost, and is as long as the longer one."""
    asked = [{"role": "user", "content": "How?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("So.", "No idea."))
    lengths = [byte_length({"messages": asked + answer}) for answer in (good, bad)]
    openai = {"input": {"messages": asked}, "preferred_output": good, "non_preferred_output": bad}
    for row in (
        openai,
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": "How?", "chosen": "So.", "rejected": "No idea."},
    ):
        count = count_tokens(dataset([row]), "tiny-mistral")
        assert (count.data_tokens, count.longest) == (sum(lengths), max(lengths))


def test_several_processes_count_what_one_does(tmp_path: Path, dataset: MakeDataset) -> None:
    """Parts of files have each row once, and the numbers of lines go on from part to part."""
    rows = [line(row) for row in varied(1_000)] * 20
    rows += [line(chat("x" * 3_000_000, "y")), *rows, b"", *rows]
    data = dataset(rows, [chat("a", "b")])
    assert data.files[0].size > 8 << 20
    seen: list[tuple[Path, int, int]] = []
    tell = lambda *told: seen.append(told)  # noqa: E731
    one = count_tokens(data, "tiny-mistral", processes=1)
    two = count_tokens(data, "tiny-mistral", processes=2, on_progress=tell)
    assert one == two
    assert {told[0] for told in seen} == {file.path for file in data.files}
    assert seen[-1][1] == seen[-1][2] == data.files[1].size
    rows[-1] = b"{"
    broken = count_tokens(dataset(rows), "tiny-mistral", processes=2)
    assert broken.data_tokens is None
    assert f"0.jsonl:{len(rows)}: the row is invalid" in (broken.reason or "")


def test_progress_may_stop_the_count(dataset: MakeDataset) -> None:
    """What the callback raises comes through."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_tokens(dataset([chat("a", "b")]), "tiny-mistral", on_progress=stop)


# Samples


def mixed(number: int, seed: int) -> list[dict[str, Any]]:
    """Make rows as of several sources, one after the other and one of them rare."""
    chance = random.Random(seed)
    emoji = [chat("How?", "\N{GRINNING FACE}" * chance.randint(1, 60)) for _ in range(number // 50)]
    plain = [chat("1+1", "2" * chance.randint(1, 200)) for _ in range(number // 3)]
    return [*varied(number - len(emoji) - len(plain), seed), *plain, *emoji]


@pytest.mark.parametrize("rows", [varied, mixed])
def test_an_interval_holds_the_true_count_as_often_as_promised(
    dataset: MakeDataset, rows: Callable[[int, int], Rows]
) -> None:
    """Nineteen of twenty contain the full count and are narrow; the same data give the same."""
    within, seeds = 0, 40
    for seed in range(seeds):
        data = dataset(rows(600, seed), rows(300, -seed))
        exact = count_tokens(data, "tiny-mistral")
        sampled = count_tokens(data, "tiny-mistral", sample=300)
        assert (exact.basis, sampled.basis) == ("exact", "sampled")
        assert sampled.interval
        assert exact.data_tokens
        low, high = sampled.interval
        assert low <= (sampled.data_tokens or 0) <= high
        assert high - low < 0.15 * exact.data_tokens
        within += low <= exact.data_tokens <= high
    assert sampled == count_tokens(data, "tiny-mistral", sample=300)
    assert within >= 0.95 * seeds


def test_a_samples_histogram_stands_for_all_rows(dataset: MakeDataset) -> None:
    """Long rows are drawn more often, and count less for it."""
    data = dataset(varied(5000))
    exact = count_tokens(data, "tiny-mistral")
    sampled = count_tokens(data, "tiny-mistral", sample=2000)
    assert exact.histogram
    assert sampled.histogram
    assert sampled.rows == exact.rows == 5000
    rows, commonest = max((rows, bound) for bound, rows in exact.histogram.items())
    share = sampled.histogram[commonest] / rows
    assert 0.8 < share < 1.2
    assert sampled.rows_over(64) is None


def test_huge_data_are_sampled_unasked(
    dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a size a sample is drawn, unless all rows are wished for."""
    monkeypatch.setattr("training_backends.tokens.count.EXACT_BYTES", 1000)
    data = dataset(varied(3000))
    assert count_tokens(data, "tiny-mistral").basis == "sampled"
    assert count_tokens(data, "tiny-mistral", exact=True).basis == "exact"


def test_several_files_share_one_sample(
    dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are small alone are sampled if together they are large."""
    data = dataset(varied(900), varied(900, 1), varied(900, 2))
    bound = max(file.size for file in data.files)
    monkeypatch.setattr("training_backends.tokens.count.EXACT_BYTES", bound)
    counts = tokens.count_files(data, "tiny-mistral")
    assert [count.basis for count in counts] == ["sampled"] * 3
    total = count_tokens(data, "tiny-mistral").data_tokens
    assert abs(sum(count.data_tokens or 0 for count in counts) - (total or 0)) <= 3


def test_a_sample_that_takes_every_row_is_exact(dataset: MakeDataset) -> None:
    """Few rows are counted in full."""
    data = dataset([chat("a", "word " * 2000) for _ in range(5)])
    assert count_tokens(data, "tiny-mistral", sample=2).basis == "exact"


def test_a_row_drawn_without_a_count_is_named(dataset: MakeDataset) -> None:
    """Also of a sample, one row without a count leaves none for the whole."""
    count = count_tokens(dataset([b"{}" * 50] * 500), "tiny-mistral", sample=10)
    assert count.data_tokens is None
    assert "0.jsonl, byte " in (count.reason or "")


# Lengths


def test_buckets_are_few_and_have_every_power_of_two() -> None:
    """A bucket's bound is never below the length, and at most a fourth above."""
    bounds = {bucket_of(length) for length in range(1, 1 << 16)}
    assert len(bounds) < 60
    assert {1 << power for power in range(4, 17)} <= bounds
    for length in range(17, 5000):
        assert length <= bucket_of(length) < length * 1.25 + 1
        assert bucket_of(bucket_of(length)) == bucket_of(length)


def test_rows_over_a_length_are_exact_or_not_known(dataset: MakeDataset) -> None:
    """The length asked for, bounds of buckets, and what is beyond the longest row."""
    rows = varied(500)
    lengths = [byte_length(row) for row in rows]
    count = count_tokens(dataset(rows), "tiny-mistral", seq_len=77)
    for seq_len in (77, 64, 80, 1024, max(lengths), max(lengths) + 1):
        assert count.rows_over(seq_len) == sum(length > seq_len for length in lengths)
    assert count.rows_over(79) is None
    assert (count.shortest, count.longest) == (min(lengths), max(lengths))
    assert count.mean == sum(lengths) / len(lengths)
    assert sum((count.histogram or {}).values()) == 500


def test_lengths_put_together_are_those_of_all() -> None:
    """Parts may be merged in any order."""
    whole, first, second = Lengths(), Lengths(), Lengths()
    for length in (5, 500, 17, 40_000):
        whole.add((length,), 100)
    second.add((40_000,), 100)
    second.add((5,), 100)
    first.add((500,), 100)
    first.add((17,), 100)
    first.merge(second)
    assert first == whole
    assert first.histogram() == {16: 1, 20: 1, 512: 1, 40_960: 1}


# Cache


def scramble(file: DataFile) -> None:
    """Make a file unreadable without changing its size."""
    file.path.write_bytes(b"x" * file.size)


def test_a_count_is_kept(dataset: MakeDataset, tmp_path: Path) -> None:
    """The same content is not read twice; another question about it is."""
    cache = tmp_path / "cache"
    data = dataset(varied(50), varied(60, 1))
    first = count_tokens(data, "tiny-mistral", seq_len=64, cache=cache)
    assert len(list(cache.iterdir())) == 2
    for file in data.files:
        scramble(file)
    assert count_tokens(data, "tiny-mistral", seq_len=64, cache=cache) == first
    assert count_tokens(data, "tiny-mistral", seq_len=64, sample=5, cache=cache) == first
    assert count_tokens(data, "tiny-mistral", seq_len=65, cache=cache).data_tokens is None
    assert count_tokens(data, "tiny-mistral", seq_len=64).data_tokens is None


def test_a_sample_is_replaced_by_a_kept_count(dataset: MakeDataset, tmp_path: Path) -> None:
    """A file that was once counted completely needs no sample."""
    data = dataset(varied(600))
    cache = tmp_path / "cache"
    assert count_tokens(data, "tiny-mistral", sample=200, cache=cache).basis == "sampled"
    exact = count_tokens(data, "tiny-mistral", cache=cache)
    assert count_tokens(data, "tiny-mistral", sample=200, cache=cache) == exact


def test_counts_of_models_that_see_are_not_those_of_blind_ones(
    dataset: MakeDataset, tmp_path: Path
) -> None:
    """Two tokenizers with files of the same content keep their counts apart."""
    pytest.importorskip("mistral_common")
    data = dataset([chat([image_part(33, 16)], "So.")])
    seen = count_tokens(data, "pixtral-large-2411", cache=tmp_path / "cache")
    assert seen.data_tokens
    blind = count_tokens(data, "mistral-large-2411", cache=tmp_path / "cache")
    assert blind.data_tokens is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}\xff", b'{"tokens": 5, "rows": 3}', b"[1]"])
def test_a_broken_entry_is_written_anew(
    dataset: MakeDataset, tmp_path: Path, content: bytes
) -> None:
    """What cannot be read from the cache counts as not there."""
    data = dataset(varied(50))
    first = count_tokens(data, "tiny-mistral", cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(content)
    assert count_tokens(data, "tiny-mistral", cache=tmp_path / "cache") == first
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_stops_nothing(dataset: MakeDataset, tmp_path: Path) -> None:
    """A file where the directory should be is left alone."""
    (tmp_path / "cache").write_text("mine")
    data = dataset(varied(5))
    assert count_tokens(data, "tiny-mistral", cache=tmp_path / "cache").data_tokens
    assert (tmp_path / "cache").read_text() == "mine"


# Reasons


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("mistral-large-latest", "different tokenizers"),
        ("mistral-small-2409", "two tokenizers"),
        ("nobody-knows", "no tokenizer is known"),
        ("nobody/knows-it", "no tokenizer is known"),
    ],
)
def test_an_unknown_tokenizer_is_no_number(dataset: MakeDataset, model: str, reason: str) -> None:
    """Instead of a guess there is a reason."""
    count = count_tokens(dataset([chat("a", "b")]), model)
    assert count.data_tokens is None
    assert reason in (count.reason or "")
    assert row_counter(model) is None


def test_images_count_where_they_are_in_the_row(dataset: MakeDataset, seeing: str) -> None:
    """A model that reads images has a token for each patch, and one more a row of patches."""
    row = chat("How?", "So.")
    plain = count_tokens(dataset([row]), seeing)
    text = {"type": "text", "text": "How?"}
    row["messages"][0]["content"] = [text, image_part(33, 16)]
    seen = count_tokens(dataset([row]), seeing)
    assert (seen.data_tokens or 0) - (plain.data_tokens or 0) == 3 + 1
    assert seen.notes == ()
    blind = count_tokens(dataset([row]), MISTRAL)
    assert "0.jsonl:1: mistral-common rejects the row" in (blind.reason or "")


def test_rows_that_cannot_be_counted_are_named(dataset: MakeDataset, seeing: str) -> None:
    """One row without a count leaves none for the whole."""
    image = [{"type": "image_url", "image_url": "https://example.org/a.png"}]
    rows = [chat("a", "b"), chat("a", "b")]
    rows[1]["messages"][0]["content"] = image
    for model in (MISTRAL, seeing, "tiny-mistral"):
        count = count_tokens(dataset(rows), model)
        assert count.data_tokens is None
        assert "0.jsonl:2: " in (count.reason or "")
        assert "images" in (count.reason or "")
    refused = count_tokens(dataset([{"messages": rows[0]["messages"][1:]}]), MISTRAL)
    assert refused.data_tokens is None
    assert "0.jsonl:1: mistral-common rejects the row" in (refused.reason or "")


def test_classifier_rows_have_no_count_but_that_of_their_texts(dataset: MakeDataset) -> None:
    """How the service lays them out was never told; what is known is told."""
    rows: list[dict[str, Any]] = [{"text": "abc", "labels": {"x": "y"}}]
    rows += [{"messages": [{"role": "user", "content": "de"}], "labels": {"x": "y"}}]
    count = count_tokens(dataset(rows, sample_type="classifier"), "tiny-mistral")
    assert count.data_tokens is None
    assert "is not documented; the texts alone have 5 tokens" in (count.reason or "")


def test_a_file_that_went_away_is_a_reason(dataset: MakeDataset) -> None:
    """Counting reads the files again; one that is gone raises nothing."""
    data = dataset([chat("a", "b")])
    data.files[0].path.unlink()
    count = count_tokens(data, "tiny-mistral")
    assert count.data_tokens is None
    assert "could not read" in (count.reason or "")


def test_a_file_that_changed_is_a_reason(dataset: MakeDataset) -> None:
    """What was inspected is what is counted."""
    data = dataset([chat("a", "b")])
    data.files[0].path.write_bytes(line(chat("a", "bcd")))
    count = count_tokens(data, "tiny-mistral")
    assert count.data_tokens is None
    assert "has changed since it was inspected" in (count.reason or "")


def test_without_mistral_common_the_reason_names_the_extra(dataset: MakeDataset) -> None:
    """The extra is needed only where it is used, and its absence is told."""
    path = dataset([chat("a", "b")]).files[0].path
    program = (
        "import sys\n"
        "sys.modules['mistral_common'] = None\n"
        "from pathlib import Path\n"
        "from training_backends.core.dataset import DataFile, Dataset\n"
        "from training_backends.tokens import count_tokens\n"
        f"path = Path({str(path)!r})\n"
        "file = DataFile(path=path, role='train', size=path.stat().st_size, sha256='', rows=1)\n"
        "print(count_tokens(Dataset(files=(file,)), 'tiny-mistral').data_tokens)\n"
        "print(count_tokens(Dataset(files=(file,)), 'open-mistral-nemo').reason)\n"
        "print(sorted(sys.modules.keys() & {'tiktoken', 'splintr', 'transformers'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    tokens, reason, loaded = done.stdout.splitlines()
    assert int(tokens) > 0
    assert "pip install 'training-backends[tokens]'" in reason
    assert loaded == "[]"


# Models


def test_every_tokenizer_that_is_named_is_there() -> None:
    """Each name leads to a file that mistral-common ships."""
    pytest.importorskip("mistral_common")
    assert tokenizer_of("open-mistral-7b") == "v3"
    assert all(shipped(name).is_file() for name in token_models.SHIPPED.values())
    assert set(token_models._TABLE.values()) <= set(token_models.SHIPPED)


def test_the_table_says_what_mistral_common_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that mistral-common knows have its tokenizer."""
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    # Which file it would load, without loading it.
    monkeypatch.setattr(mistral.MistralTokenizer, "from_file", lambda path, **_: Path(path))
    for model, load in mistral.MODEL_NAME_TO_TOKENIZER_CLS.items():
        try:
            found = token_models.find_tokenizer(model)
        except Uncountable as error:
            assert "two tokenizers" in str(error)  # noqa: PT017  # else it says which
        else:
            assert found.path == load()


def test_a_fine_tuned_model_reads_as_its_base() -> None:
    """The names of fine-tuned models say what they were made of."""
    assert tokenizer_of("ft:open-mistral-nemo:abc:20250101:def") == "v3-tekken"
    pytest.importorskip("tiktoken")
    assert tokenizer_of("ft:gpt-4.1-mini-2025-04-14:me::id") == "o200k_base"


def test_single_rows_can_be_counted() -> None:
    """A counter for rows is there for who has them already."""
    count = row_counter("tiny-mistral")
    assert count
    assert count(TextRow("abc")) == 5
    row = parse_row(line(chat("a", [{"type": "image_url", "image_url": "x"}])))
    with pytest.raises(ValueError, match="images"):
        count(row)


def test_openai_encodings_are_not_fetched(
    dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoding that is not here has no count, and the reason says how to fetch it."""
    pytest.importorskip("tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    count = count_tokens(dataset([chat("a", "b")]), "gpt-4o-mini")
    assert (count.data_tokens, count.tokenizer) == (None, "o200k_base")
    assert 'get_encoding("o200k_base")' in (count.reason or "")


def test_openais_rule_is_the_documented_one() -> None:
    """Three tokens a message, one a name, three at the end; tools are not documented."""
    counter = OpenAICounter(lambda text: len(text.split()))
    named = {"role": "user", "content": "one two", "name": "Bob"}
    row = {"messages": [named, {"role": "assistant", "content": "three"}]}
    parsed = parse_row(line(row))
    assert counter.row(parsed) == 3 + (3 + 1 + 2 + 1 + 1) + (3 + 1 + 1)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(ValueError, match="does not document"):
        counter.row(parse_row(line({**row, "tools": [tool]})))


def test_a_local_model_of_mistrals_reads_with_its_own_file(
    dataset: MakeDataset, tmp_path: Path, small_tekken: Path
) -> None:
    """The directory of a model is as good as its name."""
    sources = {
        "tokenizer.model.v3": shipped(token_models.SHIPPED["v3"]),
        "tekken.json": small_tekken,
    }
    for name, source in sources.items():
        directory = tmp_path / source.stem
        directory.mkdir()
        (directory / name).symlink_to(source)
        data = dataset(varied(20))
        count = count_tokens(data, str(directory))
        assert count.data_tokens == reference_count(data, source)
        assert count.tokenizer == name


@pytest.fixture
def templated(tmp_path: Path) -> Path:
    """Make the directory of a model with a chat template."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} "
        "{{ eos_token }}{% endfor %}"
    )
    directory = tmp_path / "templated"
    made.save_pretrained(directory)
    return directory


def test_another_model_reads_with_its_own_template(dataset: MakeDataset, templated: Path) -> None:
    """Its tokenizer and chat template decide; control tokens in texts have no count."""
    count = count_tokens(dataset([chat("a b", "b a a"), {"text": "a b"}]), str(templated))
    # <s>, then a role, words and </s> for both messages; <s>, two words, </s> for the text.
    assert count.data_tokens == 1 + (1 + 2 + 1) + (1 + 3 + 1) + 4
    control = count_tokens(dataset([chat("a </s>", "b")]), str(templated))
    assert control.data_tokens is None
    assert "the text contains the control token </s>" in (control.reason or "")


ENDLESS = "{% for a in range(99999) %}" * 9 + "{% set b = a %}" + "{% endfor %}" * 9


def test_a_template_that_never_ends_is_a_reason(
    dataset: MakeDataset, templated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted, and the next row is counted as before."""
    monkeypatch.setattr(jinja, "RENDER_SECONDS", 1.0)
    file = templated / "chat_template.jinja"
    plain = file.read_text()
    file.write_text(f"{{% if messages[0].content == 'a' %}}{ENDLESS}{{% endif %}}{plain}")
    count = count_tokens(dataset([chat("b", "b"), chat("a", "b")]), str(templated))
    assert "did not finish" in (count.reason or "")
    assert ":2: " in (count.reason or "")
    assert count_tokens(dataset([chat("b", "b")]), str(templated)).data_tokens == 7


def test_whatever_ends_at_the_limit_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption is raised here or taken back: none arrives in later code."""
    monkeypatch.setattr(jinja, "RENDER_SECONDS", 1e-4)
    limit = jinja.TimeLimit()
    late = 0
    for number in range(300):
        try:
            assert limit.run(partial(sum, range(number * 50))) >= 0
        except jinja.EndlessTemplate:
            late += 1
    with pytest.raises(jinja.EndlessTemplate):
        limit.run(lambda: [None for _ in iter(int, 1)])
    assert sum(range(10_000)) == 49_995_000
    assert late <= 300


def test_a_directory_without_a_tokenizer_is_a_reason(dataset: MakeDataset, tmp_path: Path) -> None:
    """Nothing is guessed about an empty directory."""
    (tmp_path / "empty").mkdir()
    count = count_tokens(dataset([chat("a", "b")]), str(tmp_path / "empty"))
    assert isinstance(count, TokenCount)
    assert "no tokenizer found" in (count.reason or "")
