"""Rows longer than a sequence are told of, at a cost that does not grow with the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from training_backends.core.dataset import DataFile, Dataset, Summary
from training_backends.tokens import overlong
from training_backends.tokens.overlong import overlong_rows

MODEL = "tiny-mistral"
"""A token is a byte, and each row has a few control tokens."""


def dataset(path: Path, lengths: list[int]) -> Dataset:
    """Write texts of so many bytes, and say what an inspection would."""
    rows = [json.dumps({"text": "x" * length}) for length in lengths]
    path.write_text("".join(row + "\n" for row in rows))
    file = DataFile(
        path=path,
        role="train",
        size=path.stat().st_size,
        sha256=f"{hash(tuple(lengths)):064x}"[-64:],
        rows=len(rows),
        summary=Summary(longest_row=max(map(len, rows))),
    )
    return Dataset(files=(file,))


def test_long_rows_are_counted(tmp_path: Path) -> None:
    """A warning says how many of how many, and what to do."""
    data = dataset(tmp_path / "a.jsonl", [10, 300, 99, 400])
    issue = overlong_rows(data, MODEL, 200, fix="shorten them")
    assert issue is not None
    assert (issue.severity, issue.fix) == ("warning", "shorten them")
    assert issue.message == "2 of 4 rows are longer than 200 tokens"


def test_data_without_long_rows_are_fine(tmp_path: Path) -> None:
    """Rows of as many bytes, but fewer tokens, are no matter."""
    data = dataset(tmp_path / "a.jsonl", [10, 195])
    assert data.train[0].summary.longest_row > 200
    assert overlong_rows(data, MODEL, 200, fix="") is None


def test_nothing_is_counted_where_no_row_has_so_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is shorter than a byte, so no tokenizer is loaded for that."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr(overlong, "count_tokens", never)
    assert overlong_rows(dataset(tmp_path / "a.jsonl", [100]), MODEL, 200, fix="") is None


def test_large_data_are_judged_by_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is said that the number is about right."""
    monkeypatch.setattr(overlong, "COUNTED_BYTES", 1000)
    data = dataset(tmp_path / "a.jsonl", [50, 300] * 600)
    issue = overlong_rows(data, MODEL, 200, fix="")
    assert issue is not None
    assert issue.message.startswith("about ")
    found = int(issue.message.split()[1].replace(",", ""))
    assert found == pytest.approx(600, rel=0.2)


def test_unknown_tokenizer_says_nothing(tmp_path: Path) -> None:
    """What cannot be counted is not guessed."""
    data = dataset(tmp_path / "a.jsonl", [300])
    assert overlong_rows(data, "nobody/knows-this", 200, fix="") is None
