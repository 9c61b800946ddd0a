"""`data inspect`: what is said of data files, where it is said, and the exit codes."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

Run = Any
Write = Callable[..., Path]

ANSWER = {"role": "assistant", "content": "Three francs."}


def chat(number: int, *more: dict[str, str]) -> dict[str, Any]:
    ask = {"role": "user", "content": f"How much is number {number}?"}
    return {"messages": [ask, ANSWER, *more]}


BAD = chat(0, {"role": "user", "content": "And then?"})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return path

    return write


def test_each_issue_names_file_line_and_field(run: Run, write: Write) -> None:
    """What, why and how to mend it stand on one line for people; the exit code is 3."""
    write(chat(1), BAD, chat(1))
    done = run("data", "inspect", "data.jsonl")
    assert (done.code, done.err) == (3, "")
    error, warning, *_ = done.out.splitlines()
    assert "error" in error
    assert "data.jsonl:2: messages[2].role: " in error
    assert "warning" in warning
    assert "data.jsonl:3: duplicate of line 1" in warning
    assert "3, 1 invalid" in done.out
    assert "Invalid for mistral: 1 error in 1 file." in done.out
    assert "\x1b" not in done.out + done.err


def test_warnings_alone_end_well(run: Run, write: Write) -> None:
    """They stop no launch."""
    write(chat(1), chat(1))
    done = run("data", "inspect", "data.jsonl")
    assert done.code == 0
    assert "Valid for mistral." in done.out


def test_programs_get_one_document(run: Run, write: Write) -> None:
    """It holds files, their summaries, all issues and the verdict, and nothing is beside it."""
    path = write(*map(chat, range(10)), BAD)
    done = run("data", "inspect", path.name, "--json", "--provider-format", "local")
    assert (done.code, done.err) == (3, "")
    document = done.document
    assert document["ok"] is False
    assert document["provider_format"] == "local"
    assert document["tokens"] is None
    (file,) = document["files"]
    assert (file["path"], file["rows"], file["bad_rows"]) == ("data.jsonl", 11, 1)
    assert file["summary"]["roles"] == {"user": 12, "assistant": 11}
    assert [issue["line"] for issue in document["issues"]] == [11]


def test_tokens_are_counted_when_a_model_is_named(run: Run, write: Write) -> None:
    """As that model reads the rows, with how long they are."""
    write(*map(chat, range(10)))
    tokens = run("data", "inspect", "data.jsonl", "--model", "tiny-mistral", "--json").document
    assert tokens["tokens"]["basis"] == "exact"
    assert tokens["tokens"]["rows"] == 10
    shown = run("data", "inspect", "data.jsonl", "--model", "tiny-mistral").out
    assert f"{tokens['tokens']['data_tokens']:,}, exact" in shown
    unknown = run("data", "inspect", "data.jsonl", "--model", "nobody-knows-it")
    assert unknown.code == 0
    assert "not counted" in unknown.out


def test_patterns_directories_and_packed_files_are_read(
    run: Run, write: Write, tmp_path: Path
) -> None:
    """A pattern that the shell has left alone, too."""
    (tmp_path / "sub").mkdir()
    write(chat(1), name="a.jsonl")
    write(chat(2), name="sub/b.jsonl.gz")
    for given in (["."], ["*.jsonl", "sub/*"]):
        done = run("data", "inspect", *given, "--json")
        assert done.code == 0
        assert [file["path"] for file in done.document["files"]] == ["a.jsonl", "sub/b.jsonl.gz"]
    nothing = run("data", "inspect", "*.nothing", "--json")
    assert nothing.code == 3
    assert nothing.document["error"]["issues"][0]["code"] == "missing_file"


def test_standard_input_is_read(run: Run) -> None:
    """Its name is a minus; its tokens cannot be counted, for it is gone then."""
    rows = "".join(json.dumps(row) + "\n" for row in (chat(1), BAD))
    done = run("data", "inspect", "-", "--model", "tiny-mistral", stdin=rows)
    assert done.code == 3
    assert "-:2: messages[2].role" in done.out
    assert "cannot be read twice" in done.out


def test_an_issue_is_shown_while_the_data_still_comes(tmp_path: Path) -> None:
    """Nobody waits for the end of a long file to hear of its third line."""
    command = [sys.executable, "-m", "training_backends", "data", "inspect", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        rows = [chat(1), chat(2), BAD, *map(chat, range(5, 2000))]
        process.stdin.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        assert b"-:3: messages[2].role" in process.stdout.readline()
        process.stdin.close()
        process.stdout.read()
    assert process.returncode == 3


def test_rows_to_validate_on_are_held_against_those_to_train_on(run: Run, write: Write) -> None:
    """A row in both is a warning, too much of them an error where the provider says so."""
    write(*map(chat, range(10)), name="train.jsonl")
    write(chat(3), chat(99), name="validation.jsonl")
    given = ("data", "inspect", "train.jsonl", "--validation", "validation.jsonl")
    shared = run(*given, "--provider-format", "local")
    assert shared.code == 0
    assert "validation.jsonl:1: also in the training data: line 4 of train.jsonl" in shared.out
    limited = run(*given, "--json")
    assert limited.code == 3
    assert "validation_too_large" in [issue["code"] for issue in limited.document["issues"]]


def test_a_configuration_brings_its_files_and_targets(
    run: Run, write: Write, tmp_path: Path
) -> None:
    """Its backend's rules hold, and what stands in it is named by its own line."""
    write({"text": "Good.", "labels": {"mood": "hapy"}}, name="train.jsonl")
    write({"text": "Bad.", "labels": {"mood": "sad"}}, name="validation.jsonl")
    (tmp_path / "run.yaml").write_text(
        "backend: mistral\nmodel: m\nmethod: classifier\n"
        "data: {train: train.jsonl, validation: validation.jsonl}\n"
        "classifier_targets:\n  - {name: mood, labels: [happy, sad]}\n"
    )
    done = run("data", "inspect", "--config", "run.yaml", "--json")
    assert done.code == 3
    issues = {issue["code"]: issue for issue in done.document["issues"]}
    assert issues["unknown_label"]["line"] == 1
    assert issues["validation_too_large"]["path"].endswith("run.yaml")
    assert issues["validation_too_large"]["line"] == 4


def test_only_so_many_issues_are_shown_as_wanted(run: Run, write: Write) -> None:
    """The rest is counted by kind."""
    write(*[chat(n, {"role": "user", "content": "?"}) for n in range(40)])
    done = run("data", "inspect", "data.jsonl", "--max-issues", "3")
    assert len([one for one in done.out.splitlines() if "data.jsonl:" in one]) == 3
    assert "18 more" in done.out
    assert "40  last_not_assistant" in " ".join(done.out.split(" "))


@pytest.mark.parametrize(
    "arguments",
    [(), ("data.jsonl", "--config", "run.yaml"), ("data.jsonl", "--provider-format", "klingon")],
)
def test_a_wrong_command_line_ends_with_2(
    run: Run, write: Write, arguments: tuple[str, ...]
) -> None:
    """Nothing is read then."""
    write(chat(1))
    assert run("data", "inspect", *arguments).code == 2
