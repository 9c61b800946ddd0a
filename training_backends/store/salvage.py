"""Check a damaged run store, back it up and recover what is readable.

Damage is not always visible: a lost write-ahead log leaves an older, consistent state. So no
recovered journal counts as complete. `RunStore.restore` treats every missing step as begun: a
repeated launch looks for the step's effect first, and fails if it cannot be looked up. This may
cost a needless look-up, but never creates a job twice.
"""

import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from training_backends.core.errors import StoreError
from training_backends.core.files import sync_directory
from training_backends.core.run import TrainingRun
from training_backends.store.database import sqlite_file
from training_backends.store.gateway_schema import GATEWAY_TABLES
from training_backends.store.journal import SavedStep
from training_backends.store.schema import REVISION

__all__ = ["Salvage", "check", "salvage", "set_aside"]

_PARTS: Final = ("", "-wal", "-shm")
"""Suffixes of the files of a SQLite database in WAL mode."""
_MAGIC: Final = b"SQLite format 3\0"
_HEADER: Final = 100
_STEPS: Final = 10_000
"""Instructions of SQLite between two readings of the clock; some milliseconds."""
_LOCKED_BYTES: Final = (510, 0x40000002)
"""Every process with an open database in WAL mode holds a shared lock in this range
(https://www.sqlite.org/src/file/src/os.h, SHARED_FIRST and SHARED_SIZE)."""
_FARTHEST: Final = 2**62


@dataclass(frozen=True, slots=True)
class Salvage:
    """The readable content of a damaged store.

    Attributes:
        runs: In no particular order.
        steps: Steps of launch journals by run id; possibly incomplete, and possibly of runs that
            could not be read.
        gateway: Rows of the gateway's tables, by table.
    """

    runs: list[TrainingRun] = field(default_factory=list)
    steps: dict[str, list[SavedStep]] = field(default_factory=dict)
    gateway: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def check(url: str, *, within: float | None = None) -> list[str]:
    """Return the problems of a store, one line each, without changing it.

    A store that does not exist yet has no problems.

    Args:
        within: Seconds after which to return what was found; None: check everything.
    """
    path = sqlite_file(url)
    if path is None or not path.exists():
        return []
    problems = []
    try:
        with closing(_open(path, "ro")) as connection, _limited(connection, within):
            for problem in _problems(connection):
                problems.append(problem)  # noqa: PERF402  # keep those found before an error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_INTERRUPT:
            problems.append(str(error))
    return problems


def set_aside(url: str, at: datetime) -> Path | None:
    """Back up a SQLite store by renaming its files to `<name>.damaged-<time>`.

    Close this process's own stores first. If interrupted, each file keeps its old or new name.

    Returns:
        The new path; None if there is no such file, or the store is not SQLite.

    Raises:
        StoreError: Another process uses the store, or the files cannot be renamed.
    """
    path = sqlite_file(url)
    if path is None or not path.exists():
        return None
    target = path.with_name(f"{path.name}.damaged-{at.astimezone(UTC):%Y%m%dT%H%M%SZ}")
    try:
        _require_unused(path)
        parts = [part for part in _PARTS if _part(path, part).exists()]
        for part in parts:
            os.link(_part(path, part), _part(target, part))
        sync_directory(path.parent)
        # The database first: SQLite deletes a log without a database.
        for part in parts:
            _part(path, part).unlink()
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"Cannot back up the run store {path}: {error}",
            hint=f"Move the files {path.name}* in {path.parent} to another directory.",
        ) from error
    return target


def salvage(path: Path) -> Salvage:
    """Read everything readable in a SQLite store of any revision, without changing it.

    Damaged rows are left out. Reads a copy, which needs free disk space.

    Raises:
        StoreError: The file cannot be copied.
    """
    found = Salvage()
    try:
        with tempfile.TemporaryDirectory(prefix="training-backends-") as directory:
            copy = Path(directory) / "copy.db"
            for part in _PARTS[:2]:
                with suppress(FileNotFoundError):
                    shutil.copyfile(_part(path, part), _part(copy, part))
            _mend_header(copy)
            with suppress(sqlite3.Error), closing(_open(copy, "rw")) as connection:
                # Makes SQLite read truncated files and malformed schemas.
                connection.execute("PRAGMA writable_schema=ON")
                # A damaged table may return a row twice.
                found.runs.extend({run.id: run for run in _runs(connection)}.values())
                for run_id, step in _steps(connection):
                    found.steps.setdefault(run_id, []).append(step)
                found.gateway.update(_gateway(connection))
    except OSError as error:
        raise StoreError(
            f"Cannot copy the run store {path}: {error}",
            hint="Check free disk space; TMPDIR sets the directory for the copy.",
        ) from error
    return found


@contextmanager
def _limited(connection: sqlite3.Connection, seconds: float | None) -> Iterator[None]:
    """Interrupt the statements of a connection after some seconds; None: never."""
    if seconds is None:
        yield
        return
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
    # quick_check reads the pages in a single step.
    timer = threading.Timer(seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _problems(connection: sqlite3.Connection) -> Iterator[str]:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "alembic_version" in tables:
        # Revisions compare as text. An older one is no problem: it is migrated on open.
        (found,) = connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()
        if found is None or found > REVISION:
            yield f"its revision is {found}; this version supports {REVISION}"
    elif tables and "schema_version" not in tables:
        yield "it is the database of another program"
    for (found,) in connection.execute("PRAGMA quick_check(20)"):
        if found != "ok":
            yield str(found)
    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} has no parent row in {parent}"


def _require_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, *_LOCKED_BYTES)
    except BlockingIOError:
        raise StoreError(
            f"The run store {path} is in use by another process, which would lose data.",
            hint="Stop the other training-backends processes first.",
        ) from None
    finally:
        os.close(descriptor)


def _part(path: Path, part: str) -> Path:
    return path.with_name(path.name + part)


def _open(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)
    connection.execute("PRAGMA busy_timeout=30000")
    return connection


def _mend_header(path: Path) -> None:
    """Replace an overwritten header with that of an intact database of the same page size."""
    with path.open("r+b") as file:
        if file.read(len(_MAGIC)) == _MAGIC:
            return
        with tempfile.NamedTemporaryFile(dir=path.parent) as sound:
            with closing(sqlite3.connect(sound.name)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE t (c)")
                (page,) = connection.execute("PRAGMA page_size").fetchone()
            header = bytearray(Path(sound.name).read_bytes()[:_HEADER])
        header[28:32] = (path.stat().st_size // page).to_bytes(4, "big")
        # Reading needs no list of free pages.
        header[32:40] = bytes(8)
        file.seek(0)
        file.write(header)


def _runs(connection: sqlite3.Connection) -> Iterator[TrainingRun]:
    seen_at = dict(_rows(connection, "runs", "id", "seen_at"))
    # Before revision 0002, documents were stored in the runs table.
    for table, key in (("documents", "run_id"), ("runs", "id")):
        for name, document in _rows(connection, table, key, "document"):
            with suppress(ValidationError, TypeError):
                run = TrainingRun.model_validate_json(document)
                if run.id.encode() == name:
                    yield _with_sight(run, seen_at.get(name))


def _with_sight(run: TrainingRun, seen_at: bytes | None) -> TrainingRun:
    with suppress(ValueError):
        if seen_at is not None:
            seen = datetime.fromisoformat(seen_at.decode())
            return run.model_copy(update={"last_seen_at": seen})
    return run


def _steps(connection: sqlite3.Connection) -> Iterator[tuple[str, SavedStep]]:
    columns = ("run_id", "name", "begun_at", "result")
    for row in _rows(connection, "journal", *columns):
        with suppress(ValueError, AttributeError):  # not text, or the result is not JSON
            run_id, name, begun_at = (value.decode() for value in row[:3])
            result = None if row[3] is None else row[3].decode()
            if result is not None:
                json.loads(result)
            yield run_id, SavedStep(name, begun_at, result)


def _gateway(connection: sqlite3.Connection) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for table in GATEWAY_TABLES:
        columns = [_decoded(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")]
        if columns:
            rows = _rows(connection, table, *columns)
            yield table, [dict(zip(columns, map(_decoded, row), strict=True)) for row in rows]


def _decoded(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _rows(connection: sqlite3.Connection, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the readable rows of a table once each, text as bytes.

    Scans forwards, skipping damage, then backwards from the last row found, for rows that a
    forward skip missed.
    """
    connection.text_factory = bytes
    rows = f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid"  # noqa: S608  # ours
    found: dict[int, tuple[Any, ...]] = {}
    _walk(connection, f"{rows} > ? ORDER BY rowid", found, start=-1, way=1)
    end = max(found, default=0)
    _walk(connection, f"{rows} < ? ORDER BY rowid DESC", found, start=end, way=-1)
    yield from found.values()


def _walk(
    connection: sqlite3.Connection,
    query: str,
    found: dict[int, tuple[Any, ...]],
    *,
    start: int,
    way: int,
) -> None:
    place, jump = start, 1
    while abs(place) < _FARTHEST and place >= -1:
        try:
            for rowid, *values in connection.execute(query, (place,)):
                found[rowid] = tuple(values)
                if (rowid - place) * way > 0:  # damage may change the order
                    place, jump = rowid, 1
        except sqlite3.Error:
            place, jump = place + way * jump, jump * 2
        else:
            return
