"""Stores in files and on a server, and runs to put into them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.client import conftest as clients
from tests.store.worker import work
from training_backends import LogRecord, TrainingConfig, TrainingRun, TrainingStatus
from training_backends.core.run import LogSource
from training_backends.store import RunStore
from training_backends.store.database import create_file, sqlite_file
from training_backends.store.schema import as_text

new_url, url = clients.new_url, clients.url

MakeRun = Callable[..., TrainingRun]
WriteVersion1 = Callable[..., None]

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)

# Processes are forked from one that has imported the package, which takes most of a second.
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.store.worker"])

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


def sqlite_url(tmp_path: Path) -> str:
    """Return where the tests of what is about SQLite alone have their store."""
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

    def write(url: str, *runs: TrainingRun) -> None:
        execute(url, *version_1(*runs))

    return write


def version_1(*runs: TrainingRun) -> Iterator[str]:
    """Yield the statements that write such a store."""
    yield from VERSION_1.strip().removesuffix(";").split(";\n")
    for run in runs:
        row = (run.id, run.backend, run.status.value, as_text(run.created_at))
        yield f"INSERT INTO runs VALUES {(*row, run.model_dump_json())}"
        step = (run.id, "create", "2026-01-01T00:00:00+00:00", f'"{run.remote_id}"')
        yield f"INSERT INTO journal VALUES {step}"


def execute(url: str, *statements: str) -> list[Any]:
    """Do something to a database behind the store's back; return what the last one tells."""
    file = sqlite_file(url)
    if file is not None:
        create_file(file)
    engine = sa.create_engine(url)
    rows: list[Any] = []
    with engine.begin() as connection:
        for statement in statements:
            done = connection.execute(sa.text(statement.replace(":", r"\:")))
            rows = list(done) if done.returns_rows else []
    engine.dispose()
    return rows


def told(
    message: str, second: float = 0, source: LogSource = "event", **fields: object
) -> LogRecord:
    """Make a log record as a provider tells it, so many seconds after the beginning."""
    at = BEGINNING + timedelta(seconds=second)
    return LogRecord(at=at, message=message, source=source, fields=fields, cursor="theirs")


@dataclass(frozen=True)
class Worker:
    """A process that is ready to do one of the things in `worker.py`."""

    process: BaseProcess
    _pipe: "Connection[str, str]"

    def release(self) -> None:
        """Let it begin."""
        self._pipe.send("go")

    def result(self) -> str:
        """Wait for what it reports; afterwards it still has the store open."""
        return self._pipe.recv()

    def end(self) -> None:
        """Let it close the store and end."""
        self._pipe.send("end")
        self.process.join()
        assert self.process.exitcode == 0


def at_once(count: int, *arguments: object) -> Sequence[str]:
    """Let so many processes do the same at the same instant; return what they report."""
    workers = [start_worker(*arguments) for _ in range(count)]
    for worker in workers:
        worker.release()
    results = [worker.result() for worker in workers]
    for worker in workers:
        worker.end()
    return results


def start_worker(*arguments: object) -> Worker:
    """Start a process and wait until it is ready."""
    ours, its = _PROCESSES.Pipe()
    process = _PROCESSES.Process(target=work, args=(its, *map(str, arguments)), daemon=True)
    process.start()
    its.close()
    assert ours.recv() == "ready"
    return Worker(process, ours)
