"""What each command writes to standard output and what to standard error."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from tests.commands import Run
from training_backends import TrainingRun, TrainingStatus
from training_backends.backends.local.spec import build_spec
from training_backends.cli.main import app
from training_backends.client.config_file import load_config
from training_backends.core.run import utc_now
from training_backends.rundir.directory import ExitRecord, MetricsRow, RunDir
from training_backends.store import RunStore


class Case(NamedTuple):
    """A command line with a text on each stream; an empty text: the stream is empty."""

    words: str
    out: str
    err: str = ""
    json: bool = True
    code: int = 0


RESULTS = (
    Case("backends", "local (training-backends)"),
    Case("validate run.yaml", "run.yaml on local: ready to launch"),
    Case("estimate run.yaml", "data tokens"),
    Case("list", "done  completed                2/2  tiny-mistral  local", "note: run live"),
    Case("list --cached", "done  running (as of 6h ago)", "note: 2 live runs were last updated"),
    Case("list --status failed", "", "No runs match these filters."),
    Case("status done", "done  completed\n"),
    Case("status live --cached", "live  running", "note: run live was last updated 6h ago"),
    Case("logs done", "step 2/2"),
    Case("metrics done", "step  train_loss"),
    Case("metrics done --csv", "step,epoch,learning_rate,tokens,train_loss", json=False),
    Case("metrics done --plot", "train_loss 2", json=False),
    Case("metrics live --cached", "", "No metrics yet"),
    Case("status done --watch", "done  completed, step 2/2", ""),
    Case("logs done --tail 1", "completed"),
    Case("compare done live", "status", "note: run live"),
    Case("checkpoints done", "", "Run done has no checkpoints."),
    Case("wait done", "done  completed\n", "done  running\n"),
    Case("wait live --until running", "live  running\n", "live  running\n"),
    Case("init new.yaml", "", "Wrote new.yaml"),
    Case("init --schema", '"definitions"'),
    Case("port run.yaml --to openai", "backend: openai\n", "lost model: ", code=3),
    Case("port done --to local", "backend: local\n", "mapped model, "),
    Case("stop done", "done  completed\n"),
    Case("delete done --yes", "", "Deleted done, freed "),
    Case("delete --status failed --yes", "", "No runs match these filters."),
    Case("data inspect train.jsonl", "Valid for mistral."),
    Case("data preview run.yaml --rows 1", "⟦"),
    Case("data repair train.jsonl", "20 rows read, 20 written to train.repaired.jsonl", json=False),
    Case("data convert train.jsonl -o new.jsonl", "data:\n  train:\n", "new.jsonl  20 rows"),
    Case("data split train.jsonl --rows 2", "data:\n  train:\n", "train.train.jsonl"),
    Case("data shard train.jsonl --limit 1KB", "data:\n  train:\n", "Add to the configuration"),
    Case("credentials list", "mistral   environment  MISTRAL_API_KEY", "Sources searched"),
    Case("keys create", "tb-", "shown only once"),
    Case("keys create --quiet", "tb-"),
    Case("keys list", "", "No keys yet."),
    Case("projects list", "", "No projects yet."),
    Case("projects set demo --bytes 5GB", "", "Project demo: bytes 5,000,000,000."),
    Case("projects cleanup --dry-run", "", "Nothing to delete."),
    Case("audit export", "", "No entries.", json=False),
    Case("doctor", "failed  mistral: ", code=1),
)
"""Commands with a result."""

FAILURES = (
    "quickstart --dir home",
    "init run.yaml",
    "init --schema --with-schema",
    "port run.yaml --to none",
    "port none --to local",
    "port run.yaml --to local --output run.yaml",
    "validate none.yaml",
    "launch none.yaml",
    "launch run.yaml --grid epochs",
    "status none",
    "logs none",
    "metrics none",
    "checkpoints none",
    "wait none",
    "stop none",
    "pause none",
    "resume none",
    "download none out",
    "push none hf://org/name",
    "generate none hello",
    "eval none train.jsonl",
    "delete none --yes",
    "delete done",
    "delete",
    "list --status none",
    "data inspect",
    "data preview none.yaml",
    "data repair none.jsonl",
    "compare done",
    "compare done none",
    "data convert none.jsonl -o new.jsonl",
    "data split none.jsonl",
    "data shard none.jsonl",
    "credentials set mistral",
    "credentials delete mistral",
    "credentials test nothing",
    "keys revoke 00000000",
    "keys create --expires never",
    "projects set demo",
    "projects set Demo --steps 5",
    "projects set demo --bytes much",
    "projects set demo --keep runs=30d",
    "projects cleanup",
    "audit export --since never",
    "serve --port 0",
)
"""Commands that end with an error."""


@pytest.fixture(autouse=True)
def stored(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Store two runs seen six hours ago: `done` has completed since, `live` has not."""
    monkeypatch.setenv("MISTRAL_API_KEY", "k" * 32)
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__ATTEMPTS", "1")
    home = config_file.parent / "home"
    home.mkdir()
    config = load_config(config_file).config
    store = RunStore(f"sqlite:///{home / 'runs.db'}")
    for run_id in ("done", "live"):
        store.insert(
            TrainingRun(
                id=run_id,
                backend="local",
                config=config,
                remote_id=run_id,
                status=TrainingStatus.RUNNING,
                created_at=utc_now() - timedelta(days=2),
                last_seen_at=utc_now() - timedelta(hours=6),
            )
        )
    directory = RunDir(home / "runs" / "done")
    directory.write_spec(build_spec("done", config, home / "slots"))
    for step in (1, 2):
        row = MetricsRow(step=step, total_steps=2, epoch=1, train_loss=4 / step, learning_rate=0.1)
        directory.add_metrics(row)
    directory.write_exit(ExitRecord(status="completed", code=0))
    yield
    store.close()


def documents(text: str) -> list[Any]:
    """Return the JSON documents of a text: one, or one per line."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def commands(command: Any = None, *path: str) -> Iterator[tuple[str, Any]]:
    """Return all commands and groups of the program with their words."""
    command = command or typer.main.get_command(app)
    yield " ".join(path), command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, *path, name)


COMMANDS = [words for words, command in commands() if not hasattr(command, "commands")]
GROUPS = [words for words, command in commands() if hasattr(command, "commands")]


def test_every_command_is_covered() -> None:
    """A new command gets its line in the tables."""
    lines = [*(case.words for case in RESULTS), *FAILURES]
    for words in COMMANDS:
        assert any(f"{line} ".startswith(f"{words} ") for line in lines), words


@pytest.mark.parametrize("case", RESULTS, ids=lambda case: case.words)
def test_results_go_to_standard_output(run: Run, case: Case) -> None:
    """Notes and progress go to standard error, and there is nothing that nobody asked for."""
    done = run(*case.words.split())
    assert done.code == case.code, done.err
    for text, expected in ((done.out, case.out), (done.err, case.err)):
        assert expected in text
        assert bool(text) is bool(expected)
    assert "\x1b" not in done.out + done.err
    assert not any(line.endswith(" ") for line in done.out.splitlines())


@pytest.mark.parametrize("case", [case for case in RESULTS if case.json], ids=lambda c: c.words)
def test_json_is_all_there_is_on_standard_output(run: Run, case: Case) -> None:
    """A program reads one document, or one per line of a stream."""
    done = run(*case.words.split(), "--json")
    assert done.code == case.code, done.err
    assert len(documents(done.out)) == 1 or case.words.startswith("logs")


@pytest.mark.parametrize("words", FAILURES)
def test_errors_go_to_standard_error(run: Run, words: str) -> None:
    """A script that pipes results is not fed with a message; with --json it reads a document."""
    done = run(*words.split())
    assert done.code not in {0, 1}
    assert done.out == ""
    assert done.err.startswith(("error: ", "Usage: "))
    (document,) = documents(run(*words.split(), "--json").out)
    assert document["error"]["exit_code"] == done.code


@pytest.mark.parametrize("words", GROUPS)
def test_summaries_fit_on_a_line(run: Run, words: str) -> None:
    """No summary is cut at 80 columns, and no line is longer."""
    lines = run(*words.split(), "--help", COLUMNS="80").out.splitlines()
    summaries = lines[lines.index("Commands:") :]
    assert not [line for line in summaries if line.endswith("...") or len(line) > 80]


@pytest.mark.parametrize("words", COMMANDS)
def test_help_fits_the_terminal(run: Run, words: str) -> None:
    """Each command explains itself at 80 columns."""
    lines = run(*words.split(), "--help", COLUMNS="80").out.splitlines()
    assert "[[" not in lines[0], "an optional argument is put in brackets twice"
    assert lines[2].endswith((".", ",")) or lines[3]
    assert max(map(len, lines)) <= 80


def closed(directory: Path, words: str) -> tuple[int, bytes]:
    """Run a command whose standard output nobody reads; return its exit code and errors."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "training_backends", *words.split()],
            stdout=out,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={**os.environ, "TRAINING_BACKENDS_HOME": str(directory / "home")},
            check=False,
            timeout=100,
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", ["status done --json", "backends", "logs done --json"])
def test_a_closed_pipe_ends_a_command_quietly(config_file: Path, words: str) -> None:
    """`| head` has read all it wants: no error, no traceback."""
    assert closed(config_file.parent, words) == (0, b"")


def test_a_closed_pipe_does_not_hide_a_failure(config_file: Path) -> None:
    """The exit code of an error needs no reader."""
    code, errors = closed(config_file.parent, "validate none.yaml --json")
    assert code == 3
    assert b"Broken pipe" not in errors
