"""Whatever data, files, providers and arguments hold, the terminal gets no command from it."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import needs_torch
from training_backends.cli.views.console import show_text, stdout
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.e2e

Run = Any

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ereversed\u2028\nerror: forged\x7f"
"""Sets the title, clears the screen, reverses a word, and writes a line of its own."""


def is_raw(text: str) -> bool:
    """Tell whether a terminal would take commands from a text of several lines."""
    return any(
        one != "\n" and (unicodedata.category(one) in {"Cc", "Zl", "Zp"} or one == "\u202e")
        for one in text
    )


def assert_harmless(done: Any) -> None:
    """Check both outputs, and that no line was forged."""
    assert not is_raw(done.out + done.err)
    assert "owned" in done.out + done.err
    assert not any(line.startswith("error: forged") for line in done.err.splitlines())


@pytest.fixture
def evil_data(tmp_path: Path) -> Path:
    path = tmp_path / f"{EVIL[:11]}.jsonl"
    answer = {"role": "assistant", "content": "Rome.", EVIL: 1}
    rows = [
        {"messages": [{"role": "user", "content": "Where?"}, answer], EVIL: 2},
        {"messages": [{"role": EVIL, "content": "x"}]},
        {"text": "Good.", "labels": {EVIL: EVIL}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(tmp_path: Path, data: Path, *more: str) -> Path:
    path = tmp_path / f"{EVIL[:11]}.yaml"
    content = {
        "backend": "local",
        "model": EVIL,
        "data": {"train": data.name},
        "labels": {"x": EVIL},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("data", "inspect"),
        ("data", "inspect", "--provider-format=local"),
        ("data", "repair", "--output=new.jsonl"),
        ("data", "split", "--fraction=0.5"),
        ("data", "shard", "--limit=1KB"),
    ],
)
def test_data_files_cannot_command_the_terminal(
    run: Run, evil_data: Path, command: tuple[str, ...]
) -> None:
    """Field names, roles, labels and the name of the file are escaped, in --json by JSON."""
    shown = run(*command, evil_data.name)
    assert_harmless(shown)
    if "inspect" in command:
        document = run(*command, evil_data.name, "--json")
        assert not is_raw(document.out)
        assert document.document["files"][0]["path"] == evil_data.name


@pytest.mark.parametrize("command", ["validate", "launch", "estimate"])
def test_configurations_cannot_command_the_terminal(
    run: Run, tmp_path: Path, evil_data: Path, command: str
) -> None:
    """Values of the file, and its name."""
    needs_torch()
    assert_harmless(run(command, config(tmp_path, evil_data).name))


@pytest.mark.parametrize("log_level", ["warning", "debug"])
def test_a_provider_cannot_command_the_terminal(
    run: Run, tmp_path: Path, train_file: Path, log_level: str
) -> None:
    """Neither by an error's text nor, with logs on, by anything else that it answers."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"backend: mistral\nmodel: open-mistral-7b\ndata:\n  train: {train_file.name}\n"
    )

    def answer(_: Received) -> StubReply:
        body = {"object": "error", "message": EVIL, "type": EVIL}
        return StubReply(status=422, content=json.dumps(body).encode())

    with LoopbackServer(answer) as server:
        done = run(
            "launch",
            path.name,
            "--yes",
            MISTRAL_API_KEY="k" * 32,
            TRAINING_BACKENDS_MISTRAL__BASE_URL=server.base_url,
            TRAINING_BACKENDS_LOG_LEVEL=log_level,
        )
    assert done.code != 0
    assert_harmless(done)


@pytest.mark.parametrize(
    "arguments",
    [
        ("launch", EVIL),
        (EVIL,),
        ("launch", f"--{EVIL}"),
        ("status", EVIL),
        ("list", "--status", EVIL),
        ("credentials", "set", EVIL),
        ("keys", "revoke", EVIL),
        ("launch", "run.yaml", "--set", EVIL),
    ],
)
def test_arguments_are_quoted_harmlessly(run: Run, arguments: tuple[str, ...]) -> None:
    """A script may pass on what it got from elsewhere."""
    done = run(*arguments)
    assert not is_raw(done.out + done.err)
    assert not any(line.startswith("error: forged") for line in done.err.splitlines())


def test_an_answer_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Code that a model writes is shown as code; what would command the terminal is not."""
    show_text("def f():\n\treturn 1\n\x1b[2J [red]x[/]", stdout())
    assert capsys.readouterr().out == "def f():\n        return 1\n\\x1b[2J [red]x[/]\n"
