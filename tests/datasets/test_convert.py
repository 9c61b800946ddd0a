"""Rows converted to another provider's format."""

import json
from pathlib import Path
from typing import Any

import pytest

from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.convert import Converted, convert
from training_backends.datasets.provider_formats import LOCAL, MISTRAL, OPENAI, TOGETHER

ASK = {"role": "user", "content": "Is it far?"}
ANSWER = {"role": "assistant", "content": "Two stops."}
PAIR = {
    "input": {"messages": [ASK]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "Yes."}],
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def converted(tmp_path: Path, provider_format: ProviderFormat, *rows: Any) -> Converted:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return convert([path], tmp_path / "out.jsonl", provider_format=provider_format)


@pytest.mark.parametrize(
    ("provider_format", "row", "expected"),
    [
        (
            ProviderFormat(formats=("chosen",)),
            PAIR,
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": PAIR["non_preferred_output"]},
        ),
        (
            LOCAL,
            {"prompt": "Is it far?", "completion": "Two stops."},
            {"messages": [ASK, ANSWER]},
        ),
        (
            TOGETHER,
            {"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]},
            {"messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER]},
        ),
        (MISTRAL, {"messages": [ASK, ANSWER, ASK]}, {"messages": [ASK, ANSWER]}),
    ],
    ids=["preference", "completion", "developer", "trailing"],
)
def test_a_row_gets_an_accepted_format(
    tmp_path: Path, provider_format: ProviderFormat, row: Any, expected: Any
) -> None:
    """What is trained on stays the same."""
    done = converted(tmp_path, provider_format, row)
    assert (done.rows, done.invalid, done.path) == (1, 0, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == expected


def test_valid_rows_keep_their_bytes(tmp_path: Path) -> None:
    """Others are counted by conversion; what cannot be converted is copied."""
    valid, text = {"messages": [ASK, ANSWER]}, {"text": "plain"}
    pair = {"prompt": "Is it far?", "chosen": "No.", "rejected": "Yes."}
    done = converted(tmp_path, OPENAI, valid, pair, text)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert (json.loads(lines[0]), json.loads(lines[2])) == (valid, text)
    assert (done.rows, done.invalid) == (3, 1)
    assert done.first_error.startswith("row 3: ")
    assert done.notes == ("1 row from prompt, chosen, rejected to preference",)


def test_nothing_is_written_without_a_conversion(tmp_path: Path) -> None:
    """The original file serves as well."""
    assert converted(tmp_path, OPENAI, {"text": "plain"}).path is None
    assert not (tmp_path / "out.jsonl").exists()


def test_call_ids_are_replaced(tmp_path: Path) -> None:
    """For a provider with ids of its own form."""
    row = {
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    done = converted(tmp_path, MISTRAL, row)
    new = json.loads((tmp_path / "out.jsonl").read_text())["messages"]
    assert new[1]["tool_calls"][0]["id"] == new[2]["tool_call_id"] != "call_1"
    assert (done.invalid, done.notes) == (0, ("1 row repaired: call ids",))
