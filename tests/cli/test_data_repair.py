"""`data repair`: what is written, what is said of it, and the exit codes."""

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

Run = Any

ASK = {"role": "user", "content": "How much is it?"}
ANSWER = {"role": "assistant", "content": "Three francs."}
KINDS = ("repair", "issue")
GOOD = {"messages": [ASK, ANSWER]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_a_file_is_repaired_into_a_new_one(run: Run, write: Callable[..., Path]) -> None:
    """Each repair is told with its line, and the file that was given is left alone."""
    path = write(GOOD, GOOD, {"messages": [ASK, ANSWER, ASK]}, {})
    before = path.read_bytes()
    done = run("data", "repair", path.name)
    assert (done.code, done.err) == (0, "")
    assert "line 2: removed duplicate row" in done.out
    assert "line 4: removed empty row" in done.out
    assert "data.jsonl: 4 rows read, 2 written to data.repaired.jsonl" in done.out
    assert path.read_bytes() == before
    new = path.with_name("data.repaired.jsonl").read_text().splitlines()
    assert [len(json.loads(row)["messages"]) for row in new] == [2, 2]


def test_what_cannot_be_repaired_ends_with_3(run: Run, write: Callable[..., Path]) -> None:
    """It is named as by `data inspect`, and stays in the file unless it is to be dropped."""
    write(GOOD, {"messages": [ASK]})
    done = run("data", "repair", "data.jsonl")
    assert done.code == 3
    assert "data.jsonl:2: messages: there is no assistant message" in done.out
    assert "rows still invalid: 1" in done.out
    dropped = run("data", "repair", "data.jsonl", "--drop-invalid", "--force")
    assert dropped.code == 0
    assert "line 2: removed invalid row: messages: there is no assistant message" in dropped.out


def test_json_has_everything(run: Run, write: Callable[..., Path]) -> None:
    """Every repair and every error, however many there are; nothing else on standard output."""
    write(*[{"text": "a"}] * 300, {"text": ""}, {"messages": [ASK]})
    done = run("data", "repair", "data.jsonl", "--json")
    assert done.code == 3
    lines = [json.loads(line) for line in done.out.splitlines()]
    repairs, issues = ([one for one in lines if one["type"] == kind] for kind in KINDS)
    file = lines[-1]
    assert len(lines) == len(repairs) + len(issues) + 1
    assert (file["source"], file["target"]) == ("data.jsonl", "data.repaired.jsonl")
    assert (file["rows"], file["written"], file["invalid"]) == (302, 2, 1)
    assert file["counts"] == {"duplicate_row": 299, "empty_row": 1}
    assert [one["line"] for one in repairs] == list(range(2, 302))
    assert [(one["line"], one["code"]) for one in issues] == [(302, "no_assistant")]


def test_many_repairs_are_counted_on_the_screen(run: Run, write: Callable[..., Path]) -> None:
    """The first ones are shown."""
    write(*[{"text": "a"}] * 300)
    done = run("data", "repair", "data.jsonl")
    assert "line 51: " in done.out
    assert "line 52: " not in done.out
    assert "… and 249 more (use --json to show all)" in done.out
    assert "duplicate rows removed: 299" in done.out


def test_in_place_keeps_what_it_was(run: Run, write: Callable[..., Path]) -> None:
    """Once; a second repair would lose it."""
    path = write(GOOD, GOOD)
    before = path.read_bytes()
    done = run("data", "repair", "data.jsonl", "--in-place")
    assert done.code == 0
    assert "original backed up to" in done.out
    assert path.with_name("data.jsonl.orig").read_bytes() == before
    again = run("data", "repair", "data.jsonl", "--in-place")
    assert again.code == 3
    assert "data.jsonl.orig already exists" in again.err


def test_in_place_a_right_file_is_left_alone(run: Run, write: Callable[..., Path]) -> None:
    """There is nothing to keep."""
    path = write(GOOD)
    done = run("data", "repair", "data.jsonl", "--in-place")
    assert done.code == 0
    assert "data.jsonl: nothing to repair" in done.out
    assert not path.with_name("data.jsonl.orig").exists()


def test_several_files_at_once(run: Run, write: Callable[..., Path], tmp_path: Path) -> None:
    """By pattern and packed; each has its own new file."""
    write(GOOD, GOOD, name="a.jsonl")
    packed = gzip.compress(json.dumps(GOOD).encode() + b"\n\n")
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    done = run("data", "repair", "[ab].jsonl*")
    assert done.code == 0
    assert (tmp_path / "a.repaired.jsonl").read_text() == json.dumps(GOOD) + "\n"
    assert (tmp_path / "b.repaired.jsonl").read_text() == json.dumps(GOOD) + "\n"


def test_standard_input_is_read(run: Run, tmp_path: Path) -> None:
    """It needs a name for what is written."""
    row = json.dumps(GOOD) + "\n"
    done = run("data", "repair", "-", "--output", "new.jsonl", stdin=row + row)
    assert done.code == 0
    assert (tmp_path / "new.jsonl").read_text() == row
    assert run("data", "repair", "-", stdin=row).code == 2


def test_the_provider_format_decides(run: Run, write: Callable[..., Path]) -> None:
    """An id that one provider takes another does not."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {
        "messages": [
            ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "3"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    write(row)
    mistral = run("data", "repair", "data.jsonl", "--json").out.splitlines()
    openai = run("data", "repair", "data.jsonl", "--force", "--provider-format", "openai", "--json")
    assert json.loads(mistral[-1])["counts"] == {"call_ids": 1}
    assert openai.document["counts"] == {}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.jsonl"], 3, "none.jsonl: no such file"),
        (["data.jsonl", "--output", "other.jsonl"], 3, "other.jsonl already exists"),
        (
            ["data.jsonl", "--output", "data.jsonl", "--force"],
            3,
            "data.jsonl is both the input and the output",
        ),
        (
            ["data.jsonl", "other.jsonl", "--output", "new.jsonl"],
            2,
            "--output requires a single file",
        ),
        (
            ["data.jsonl", "--output", "new.jsonl", "--in-place"],
            2,
            "--output requires a single file",
        ),
        (["data.jsonl", "--output", "new.jsonl.gz"], 2, "use .jsonl, not .gz"),
        (["data.jsonl", "--provider-format", "mistrl"], 2, "Unknown provider format 'mistrl'"),
        (["empty.jsonl"], 3, "no rows would be left"),
        (["directory"], 3, "the directory contains no data files"),
        ([], 2, "Missing argument"),
    ],
)
def test_wrong_input_is_explained(
    run: Run, write: Callable[..., Path], arguments: list[str], code: int, said: str
) -> None:
    """With the exit code that scripts know; nothing is written."""
    tmp_path = write(GOOD).parent
    write(GOOD, name="other.jsonl")
    write(name="empty.jsonl")
    (tmp_path / "directory").mkdir()
    before = sorted(tmp_path.iterdir())
    done = run("data", "repair", *arguments)
    assert done.code == code
    assert said in done.err
    assert sorted(path for path in tmp_path.iterdir() if path.name != "home") == before


def test_ctrl_c_leaves_nothing_behind(write: Callable[..., Path], tmp_path: Path) -> None:
    """Exit code 130, and no part of a file."""
    row = json.dumps(GOOD).encode() + b"\n"
    command = [sys.executable, "-m", "training_backends", "data", "repair", "-", "-o", "new.jsonl"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdin
        process.stdin.write(row * 100_000)
        process.stdin.flush()
        assert any(tmp_path.glob(".new.jsonl.*.tmp"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Interrupted" in err
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".new*"))
