"""Which commands take a prefix of a run's id, and which ask before they delete."""

import json
import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import read_until
from tests.forking import Program
from training_backends import Checkpoint, RunNotFound, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.core.run import utc_now
from training_backends.store import RunStore

Run = Any


@pytest.fixture
def store(tmp_path: Path, make_config: Callable[..., TrainingConfig]) -> Iterator[RunStore]:
    """Two finished runs, `exp-1` and `exp-10`."""
    home = tmp_path / "home"
    home.mkdir()
    store = RunStore(f"sqlite:///{home / 'runs.db'}")
    for name in ("exp-1", "exp-10"):
        store.insert(
            TrainingRun(
                id=name,
                backend="local",
                config=make_config(),
                remote_id=name,
                status=TrainingStatus.COMPLETED,
                checkpoints=(Checkpoint(step=1, at=utc_now()),),
                result_model="/models/it",
            )
        )
    yield store
    store.close()


def ids(store: RunStore) -> list[str]:
    return sorted(run.id for run in store.list())


@pytest.mark.usefixtures("store")
def test_commands_that_read_take_a_unique_prefix(run: Run) -> None:
    """Several that fit are named, and an exact id wins."""
    assert run("status", "exp-10", "--json").document["id"] == "exp-10"
    assert run("status", "exp-1", "--json").document["id"] == "exp-1"
    assert run("metrics", "exp-10", "--json").code == 0
    several = run("wait", "exp", "--json")
    assert several.code == 5
    assert "exp-1, exp-10" in several.document["error"]["message"]


@pytest.mark.parametrize("command", ["stop", "resume", "delete"])
def test_commands_that_change_something_take_complete_ids(
    run: Run, store: RunStore, command: str
) -> None:
    """A retried `delete exp-1` does not reach `exp-10`; the ids that would fit are offered."""
    store.delete("exp-1")
    done = run(command, "exp-1", "--json", *(["--yes"] if command != "stop" else []))
    error = done.document["error"]
    assert (done.code, error["type"]) == (5, "RunNotFound")
    assert "exp-10" in error["hint"]
    assert ids(store) == ["exp-10"]


def test_delete_without_a_terminal_needs_yes(run: Run, store: RunStore) -> None:
    """A usage error that says so; the id is repeated once it is done."""
    refused = run("delete", "exp-1", "--json")
    assert (refused.code, refused.document["error"]["exit_code"]) == (2, 2)
    assert "--yes" in refused.err
    assert ids(store) == ["exp-1", "exp-10"]
    done = run("delete", "exp-1", "--yes", "--json")
    assert (done.code, done.document) == (0, {"deleted": ["exp-1"], "freed_bytes": 0})
    assert ids(store) == ["exp-10"]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_delete_on_a_terminal_asks(store: RunStore, answer: str, program: Program) -> None:
    """The question names the complete id and what goes with it."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*program.command, "delete", "exp-1", "--json"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "200"},
    )
    os.close(theirs)
    try:
        asked = read_until(terminal, "[y/N]")
        os.write(terminal, f"{answer}\n".encode())
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(terminal)
    assert "Delete exp-1 (completed) with 1 checkpoint and the model /models/it?" in asked
    if answer == "y":
        assert (process.returncode, json.loads(out)) == (
            0,
            {"deleted": ["exp-1"], "freed_bytes": 0},
        )
        with pytest.raises(RunNotFound):
            store.get("exp-1")
    else:
        assert process.returncode == 130
        assert ids(store) == ["exp-1", "exp-10"]
