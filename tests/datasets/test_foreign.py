"""Data of other tools becomes chats, all of it or none."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import ConfigError, DatasetError, DataSource
from training_backends.datasets.foreign import Columns, ConvertedData, convert_data
from training_backends.datasets.inspect import inspect_files

Convert = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Convert rows, and return the new rows."""

    def convert(*rows: Any, **options: Any) -> list[dict[str, Any]]:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return read(convert_data([source], tmp_path / "out.jsonl", **options))

    return convert


def read(done: ConvertedData) -> list[dict[str, Any]]:
    """Return the rows that were written."""
    return [json.loads(line) for line in done.path.read_bytes().splitlines()]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    """Return a row of ours."""
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


QA = chat(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            chat(("system", "s"), ("user", "q\n\ni"), ("assistant", "a")),
        ),
        (
            {"instruction": "q", "output": "a", "history": [["1", "2"]]},
            chat(("user", "1"), ("assistant", "2"), ("user", "q"), ("assistant", "a")),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            QA,
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "user", "value": "q"}, {"from": "bot", "value": "a"}],
            },
            chat(("system", "s"), ("user", "q"), ("assistant", "a")),
        ),
        (
            {
                "contents": [
                    {"role": "user", "parts": [{"text": "q"}]},
                    {"role": "model", "parts": [{"text": "a"}]},
                ]
            },
            QA,
        ),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"question": "q", "answer": "a", "id": 3}, QA),
        (QA, QA),
        ({"prompt": "q", "chosen": "a", "rejected": "b"},) * 2,
    ],
)
def test_a_row_becomes_a_chat(convert: Convert, row: Any, expected: Any) -> None:
    """Whatever tool it was made for; what is already ours is copied."""
    assert convert(row) == [expected]


def test_columns_can_be_named(convert: Convert) -> None:
    """For tables with names of their own."""
    rows = convert({"x": "q", "y": 4, "z": "s"}, columns=Columns("x", "y", "z"))
    assert rows == [chat(("system", "s"), ("user", "q"), ("assistant", "4"))]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"x": 1}, "unknown keys: 'x'"),
        ([1], "expected an object, not list"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "unknown role 'alien'"),
        ({"conversations": []}, "conversations: expected a list"),
        ({"instruction": "q", "output": None}, "unknown keys: 'instruction'"),
        ({"question": ["q"], "answer": {}}, "expected a turn as an object"),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(
    convert: Convert, tmp_path: Path, row: Any, text: str
) -> None:
    """With its line; nothing is written."""
    with pytest.raises(DatasetError) as error:
        convert(QA, row)
    (issue,) = error.value.issues
    assert (issue.line, text in issue.message) == (2, True)
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_can_be_left_out(convert: Convert) -> None:
    """If asked for."""
    assert convert({"x": 1}, QA, skip_invalid=True) == [QA]


def test_an_existing_file_is_kept(convert: Convert, tmp_path: Path) -> None:
    """Unless asked otherwise."""
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        convert(QA)
    assert convert(QA, force=True) == [QA]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_is_read_with_its_quotes_and_line_breaks(tmp_path: Path, ending: str) -> None:
    """As spreadsheets write it, with a byte-order mark."""
    source = tmp_path / f"rows.{ending}"
    with source.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter="\t" if ending == "tsv" else ";")
        table.writerows([["question", "answer"], ['a;"b"\tc', "one\ntwo"]])
    done = convert_data([source], tmp_path / "out.jsonl")
    assert read(done) == [chat(("user", 'a;"b"\tc'), ("assistant", "one\ntwo"))]


def test_a_row_of_a_table_with_too_few_cells_is_named(tmp_path: Path) -> None:
    """A missing quote would shift everything after it."""
    source = tmp_path / "rows.csv"
    source.write_text("question,answer\na,b\nc\n")
    with pytest.raises(DatasetError) as error:
        convert_data([source], tmp_path / "out.jsonl")
    assert (error.value.issues[0].line, "2 columns" in error.value.issues[0].message) == (3, True)


def test_a_json_array_is_read(tmp_path: Path) -> None:
    """The form in which Alpaca was published."""
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([{"instruction": "q", "output": "a"}], indent=2))
    assert read(convert_data([source], tmp_path / "out.jsonl")) == [QA]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """By the files that the library itself writes."""
    datasets = pytest.importorskip("datasets")
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert read(convert_data([tmp_path / "saved"], tmp_path / "out.jsonl")) == [QA]


def test_several_files_become_one(tmp_path: Path) -> None:
    """In the order in which they were named."""
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"prompt": ["1"], "response": ["2"]}), tmp_path / "one.parquet")
    (tmp_path / "two.jsonl").write_text(json.dumps(QA) + "\n")
    paths = [tmp_path / "one.parquet", tmp_path / "two.jsonl"]
    done = convert_data(paths, tmp_path / "out.jsonl")
    assert read(done) == [chat(("user", "1"), ("assistant", "2")), QA]
    assert done.formats == {"prompt and response": 1, "unchanged": 1}


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_what_is_written_is_valid_and_loses_no_character(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[str, str]]
) -> None:
    """For any texts."""
    directory = tmp_path_factory.mktemp("rows")
    source = directory / "rows.jsonl"
    pairs = [
        turn
        for question, answer in turns
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]
    source.write_text(json.dumps({"conversations": pairs}) + "\n")
    done = convert_data([source], directory / "out.jsonl")
    (row,) = read(done)
    assert [each["content"] for each in row["messages"]] == [each["value"] for each in pairs]
    assert not inspect_files([DataSource(path=done.path)], []).errors
