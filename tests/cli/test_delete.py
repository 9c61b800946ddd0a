"""`delete` with several ids, or with filters."""

import os
import pty
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import read_until
from tests.commands import Run
from tests.forking import Program
from training_backends import TrainingConfig, TrainingRun, TrainingStatus
from training_backends.core.run import utc_now
from training_backends.store import RunStore

RUNS = (
    ("old-failed", TrainingStatus.FAILED, 40),
    ("new-failed", TrainingStatus.FAILED, 1),
    ("old-done", TrainingStatus.COMPLETED, 40),
    ("live", TrainingStatus.RUNNING, 40),
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunStore]:
    """Store runs that finished days ago, the failed ones with a tag."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("TRAINING_BACKENDS_HOME", str(tmp_path / "home"))
    store = RunStore(f"sqlite:///{tmp_path / 'home' / 'runs.db'}")
    for run_id, status, days in RUNS:
        tags = {"grid": "s"} if status == "failed" else {}
        given = {"model": "m", "data": {"train": "a.jsonl"}, "tags": tags}
        run = TrainingRun(
            id=run_id,
            backend="local",
            config=TrainingConfig.model_validate(given),
            status=status,
            created_at=utc_now() - timedelta(days=50),
            finished_at=utc_now() - timedelta(days=days) if status.is_terminal else None,
        )
        store.insert(run)
    yield store
    store.close()


def kept(store: RunStore) -> set[str]:
    return {run.id for run in store.list()}


@pytest.mark.parametrize(
    ("words", "deleted"),
    [
        ("old-failed old-done old-failed", {"old-failed", "old-done"}),
        ("--status failed", {"old-failed", "new-failed"}),
        ("--status failed --older-than 30d", {"old-failed"}),
        ("--older-than 30d", {"old-failed", "old-done"}),
        ("--tag grid=s --older-than 12h", {"old-failed", "new-failed"}),
        ("--tag grid=other", set()),
    ],
)
def test_all_that_match_are_deleted(
    run: Run, store: RunStore, words: str, deleted: set[str]
) -> None:
    """An active run only if its status is asked for."""
    before = kept(store)
    done = run("delete", *words.split(), "--yes", "--json")
    assert (done.code, {*done.document["deleted"]}) == (0, deleted)
    assert before - kept(store) == deleted


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("old-done none", 5),
        ("old-done old", 5),
        ("old-done --status failed", 2),
        ("--older-than yesterday", 2),
        ("--status gone", 2),
        ("--tag grid", 2),
    ],
)
def test_an_error_deletes_nothing(run: Run, store: RunStore, words: str, code: int) -> None:
    """Not even the runs that were named before it."""
    assert run("delete", *words.split(), "--yes").code == code
    assert kept(store) == {run_id for run_id, *_ in RUNS}


def test_a_run_that_cannot_be_deleted_does_not_keep_the_others(run: Run, store: RunStore) -> None:
    """The exit code is that of its error."""
    store.update("live", lambda run: run.model_copy(update={"remote_id": "live"}))
    done = run("delete", "live", "old-done", "--yes")
    assert done.code != 0
    assert "Not deleted: live: " in done.err
    assert "1 of 2 runs were deleted." in done.err
    assert kept(store) == {"old-failed", "new-failed", "live"}


def test_a_terminal_is_asked_once(store: RunStore, tmp_path: Path, program: Program) -> None:
    """After a list of the runs with the disk space that they take up."""
    directory = tmp_path / "home" / "runs" / "old-done"
    directory.mkdir(parents=True)
    (directory / "model").write_bytes(b"m" * 100_000)
    terminal, theirs = pty.openpty()
    words = ["delete", "--older-than", "30d"]
    process = subprocess.Popen([*program.command, *words], stdin=theirs, stderr=theirs)
    os.close(theirs)
    try:
        asked = read_until(terminal, "[y/N]")
        os.write(terminal, b"n\n")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        os.close(terminal)
    (line,) = [line for line in asked.splitlines() if line.startswith("old-done")]
    assert "completed" in line
    assert "40d ago" in line
    assert "kB" in line
    assert "Delete these 2 runs (1" in asked
    assert len(kept(store)) == len(RUNS)
