"""A store in a file, and runs to put into it."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from training_backends import LogRecord, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.client.store import RunStore

MakeRun = Callable[..., TrainingRun]
WriteVersion1 = Callable[..., Path]

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)
WORKER = Path(__file__).with_name("worker.py")

VERSION_1 = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE runs (
    id VARCHAR(128) NOT NULL,
    backend VARCHAR(128) NOT NULL,
    status VARCHAR(32) NOT NULL,
    created_at VARCHAR(40) NOT NULL,
    document TEXT NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE journal (
    run_id VARCHAR(128) NOT NULL,
    name VARCHAR(200) NOT NULL,
    begun_at VARCHAR(40) NOT NULL,
    result TEXT,
    PRIMARY KEY (run_id, name),
    FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO schema_version VALUES (1);
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state' / 'runs.db'}"


@pytest.fixture
def store(url: str) -> Iterator[RunStore]:
    store = RunStore(url)
    yield store
    store.close()


@pytest.fixture
def make_run(make_config: Callable[..., TrainingConfig]) -> MakeRun:
    def make(run_id: str, **fields: object) -> TrainingRun:
        values = {"backend": "scripted", "config": make_config(), **fields}
        return TrainingRun.model_validate({"id": run_id, **values})

    return make


@pytest.fixture
def running(make_run: MakeRun) -> MakeRun:
    """Make a run that its provider is at."""

    def make(run_id: str, **fields: object) -> TrainingRun:
        values = {"status": TrainingStatus.RUNNING, "remote_id": f"job-{run_id}", **fields}
        return make_run(run_id, **values)

    return make


@pytest.fixture
def write_version_1() -> WriteVersion1:
    """Write a store as the first version of this package wrote it, with a journal per run."""

    def write(path: Path, *runs: TrainingRun) -> Path:
        path.parent.mkdir(exist_ok=True)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(VERSION_1)
            for run in runs:
                created_at = run.created_at.isoformat(timespec="microseconds")
                connection.execute(
                    "INSERT INTO runs VALUES (?, ?, ?, ?, ?)",
                    (run.id, run.backend, run.status.value, created_at, run.model_dump_json()),
                )
                connection.execute(
                    "INSERT INTO journal VALUES (?, 'create', '2026-01-01T00:00:00+00:00', ?)",
                    (run.id, f'"{run.remote_id}"'),
                )
        return path

    return write


def told(message: str, second: float = 0, source: str = "event", **fields: object) -> LogRecord:
    """Make a log record as a provider tells it, so many seconds after the beginning."""
    at = BEGINNING + timedelta(seconds=second)
    return LogRecord(at=at, message=message, source=source, fields=fields, cursor="theirs")


def at_once(count: int, *arguments: object) -> Sequence[str]:
    """Let so many processes do the same at the same instant; return what they say.

    See `worker.py` for what they can do.
    """
    workers = [start_worker(*arguments) for _ in range(count)]
    answers = []
    for worker in workers:
        release(worker)
    for worker in workers:
        answer, _ = worker.communicate()
        assert worker.returncode == 0
        answers.append(answer.strip())
    return answers


def start_worker(*arguments: object) -> "subprocess.Popen[str]":
    """Start a process and wait until it stands ready."""
    worker = subprocess.Popen(
        [sys.executable, WORKER, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    return worker


def release(worker: "subprocess.Popen[str]") -> None:
    """Let a process that stands ready begin."""
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
