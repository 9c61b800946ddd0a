"""Processes that use a store and are killed on the way: `crashing.py DIRECTORY URL FIRST APART`.

In the directory lie `run.json`, the record of a run `r`, and `old.json`, the statements that make
a store of an older version. For the points that a killing can fall on, so far apart, a process of
its own does the same `sequence` on such a store, at the URL with `NAME` replaced, and is killed
there. The `.done` file of that name gets one byte for each call that returned, so that is what
must have lasted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import alembic.command  # noqa: F401  # here, so that the many processes need not
import sqlalchemy as sa

from training_backends.core.run import LogRecord, RunState, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.store import Lease, RunStore

AT = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
RUNNING = RunState(status=TrainingStatus.RUNNING, remote_id="job-1")
OVER = RunState(status=TrainingStatus.COMPLETED)
RECORDS = [
    LogRecord(at=AT, message="begun", source="status", cursor=""),
    LogRecord(at=AT, message="1", source="metrics", step=1, fields={"loss": 2.0}, cursor=""),
]


def sequence(store: RunStore, run: TrainingRun) -> Iterator[Callable[[], object]]:
    """Yield calls that write to a store all that a run's life writes."""

    def saw(state: RunState) -> Callable[[TrainingRun], TrainingRun]:
        return lambda run: run.updated(state, seen_at=AT)

    held: list[Lease | None] = []
    yield lambda: store.insert(run)
    yield lambda: held.append(store.take("launch:r", "me", HOUR, is_gone=lambda _: True))
    (lease,) = held
    assert lease is not None
    yield lambda: store.begin("r", "upload", lease=lease)
    yield lambda: store.uploaded("server", "hash", "file-1")
    yield lambda: store.finish("r", "upload", "file-1", lease=lease)
    yield lambda: store.begin("r", "create", lease=lease)
    yield lambda: store.forget("r", "create", lease=lease)
    yield lambda: store.update("r", saw(RUNNING))
    yield lambda: store.release(lease)
    yield lambda: store.observed("r", saw(RUNNING), RECORDS, after=None, cursor="1")
    yield lambda: store.seen(["r"], AT + HOUR)
    yield lambda: store.delivered([1])
    yield lambda: store.insert(run.model_copy(update={"id": "s"}))
    yield lambda: store.update_all(["r", "s"], lambda run: run.model_copy(update={"step": 3}))
    yield lambda: store.note("s", lambda run: run, RECORDS)
    yield lambda: store.observed("r", saw(OVER), RECORDS, after="1", cursor="2")
    yield lambda: store.delete("r")


def die() -> None:
    """End as if the power had gone."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: int) -> None:
    """Die before a statement or a commit, counted from 0; behind one is before the next."""
    passed = 0

    def pass_by(*_: object) -> None:
        nonlocal passed
        if passed == point:
            die()
        passed += 1

    for place in ("before_cursor_execute", "commit"):
        sa.event.listen(sa.Engine, place, pass_by)


def live(directory: Path, url: str, name: str, told: int | None = None) -> None:
    """Do the sequence on a store of its own; say of each call that it is done."""
    run = TrainingRun.model_validate_json((directory / "run.json").read_bytes())
    store = RunStore(at(url, name))
    done = os.open(directory / f"{name}.done", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for call in sequence(store, run):
        call()
        os.write(done, b".")
        if told is not None:
            os.write(told, b".")


def at(url: str, name: str) -> str:
    """Return the place of a store."""
    return url.replace("NAME", name)


def make_old(url: str, name: str, statements: Iterable[str]) -> None:
    """Make a store of an older version."""
    engine = sa.create_engine(at(url, name))
    with engine.begin() as connection:
        if engine.name == "postgresql":
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        else:
            connection.exec_driver_sql("PRAGMA synchronous=OFF")
        for statement in statements:
            connection.execute(sa.text(statement.replace(":", r"\:")))
    engine.dispose()


def forked(directory: Path, url: str, name: str, work: Callable[[], None]) -> int:
    """Do something with a store of its own in a process of its own; return the process's id."""
    make_old(url, name, json.loads((directory / "old.json").read_bytes()))
    (directory / f"{name}.done").touch()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


def killed_at(directory: Path, url: str, point: int) -> bool:
    """Have a process die at a point; False if it did all there is to do before."""
    name = f"point_{point}"

    def work() -> None:
        die_at(point)
        live(directory, url, name)

    _, status = os.waitpid(forked(directory, url, name, work), 0)
    return os.WIFSIGNALED(status)


def killed_behind(directory: Path, url: str, calls: int) -> None:
    """Kill a process from outside once it has done so many calls, wherever it is by then."""
    name = f"call_{calls}"
    ours, its = os.pipe()
    child = forked(directory, url, name, lambda: live(directory, url, name, told=its))
    for _ in range(calls):
        os.read(ours, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ours)
    os.close(its)


def main(directory: Path, url: str, first: int, apart: int) -> None:
    """Kill at points so far apart from within, and behind every call from outside."""
    point = first
    while killed_at(directory, url, point):
        point += apart
    for calls in range(int((directory / f"point_{point}.done").stat().st_size)):
        killed_behind(directory, url, calls)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
