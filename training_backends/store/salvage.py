"""A damaged run store: what is wrong with it, putting it aside, saving what can be read.

What damage took cannot always be seen: a lost write-ahead log leaves an older state that
looks sound. So no saved journal is taken for complete. `RunStore.restore` makes every step
that it does not tell of count as begun: a repeated launch then looks for the step's effect
before it does anything, and refuses where nobody can look. It may find a job that it need not
have looked for; it cannot make one twice.
"""

import fcntl
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from training_backends.core.errors import StoreError
from training_backends.core.files import sync_directory
from training_backends.core.run import TrainingRun
from training_backends.store.database import sqlite_file
from training_backends.store.journal import SavedStep
from training_backends.store.schema import REVISION

__all__ = ["Salvage", "check", "salvage", "set_aside"]

_PARTS: Final = ("", "-wal", "-shm")
"""What a SQLite database in WAL mode consists of, by the ends of the files' names."""
_MAGIC: Final = b"SQLite format 3\0"
_HEADER: Final = 100
_LOCKED_BYTES: Final = (510, 0x40000002)
"""Every process that has a database open in WAL mode holds a shared lock in this range
(https://www.sqlite.org/src/file/src/os.h, SHARED_FIRST and SHARED_SIZE)."""
_FARTHEST: Final = 2**62


@dataclass(frozen=True, slots=True)
class Salvage:
    """What could still be read.

    Attributes:
        runs: In no order.
        steps: Of the launch journals, by run id; perhaps not all, and perhaps of runs that
            could not be read.
    """

    runs: list[TrainingRun] = field(default_factory=list)
    steps: dict[str, list[SavedStep]] = field(default_factory=dict)


def check(url: str) -> list[str]:
    """Return what is wrong with a store, one line each; changes nothing.

    A store that is not there yet has nothing wrong with it.
    """
    path = sqlite_file(url)
    if path is None or not path.exists():
        return []
    problems = []
    try:
        with closing(_open(path, "ro")) as connection:
            for problem in _problems(connection):
                problems.append(problem)  # noqa: PERF402  # those before an error count too
    except sqlite3.Error as error:
        problems.append(str(error))
    return problems


def set_aside(url: str, at: datetime) -> Path | None:
    """Give a SQLite store's files another name, `<name>.damaged-<time>`, and return it.

    Close this process's own stores first. Whatever interrupts it, each file keeps at least one
    of its names.

    Returns:
        None if there is no such file, or the store is another kind of database.

    Raises:
        StoreError: Some process still uses the store, or the files cannot be renamed.
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
        # The database first: SQLite throws away a log that it finds alone.
        for part in parts:
            _part(path, part).unlink()
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"The run store {path} cannot be set aside: {error}",
            hint=f"Move the files {path.name}* of {path.parent} elsewhere by hand.",
        ) from error
    return target


def salvage(path: Path) -> Salvage:
    """Read all that can still be read of a SQLite store of any revision; changes nothing.

    Damage only makes the result smaller. What is read is a copy, so there must be room for one.

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
                # Has SQLite read on in a file that is too short, or whose tables are odd.
                connection.execute("PRAGMA writable_schema=ON")
                # Damage may show a row twice.
                found.runs.extend({run.id: run for run in _runs(connection)}.values())
                for run_id, step in _steps(connection):
                    found.steps.setdefault(run_id, []).append(step)
    except OSError as error:
        raise StoreError(
            f"The run store {path} cannot be copied to be read: {error}",
            hint="Check the disk; TMPDIR names the directory for copies.",
        ) from error
    return found


def _problems(connection: sqlite3.Connection) -> Iterator[str]:
    for (found,) in connection.execute("PRAGMA quick_check(20)"):
        if found != "ok":
            yield str(found)
    for table, row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        yield f"row {row} of {table} belongs to nothing in {parent}"
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if "alembic_version" in tables:
        # Revisions are numbers of one width. An older one is no problem: it migrates itself.
        (found,) = connection.execute("SELECT max(version_num) FROM alembic_version").fetchone()
        if found is None or found > REVISION:
            yield f"it has revision {found}, and this version knows {REVISION}"
    elif tables and "schema_version" not in tables:
        yield "it is another program's database"


def _require_unused(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, *_LOCKED_BYTES)
    except BlockingIOError:
        raise StoreError(
            f"The run store {path} is in use by another process, whose work would be lost.",
            hint="End the other training-backends processes first.",
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
    """Give a database whose first bytes were overwritten those of a sound one like it."""
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
        # No list of free pages is known, and none is needed for reading.
        header[32:40] = bytes(8)
        file.seek(0)
        file.write(header)


def _runs(connection: sqlite3.Connection) -> Iterator[TrainingRun]:
    seen_at = dict(_rows(connection, "runs", "id", "seen_at"))
    # Before revision 0002 the documents were in the table of the runs.
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
        with suppress(ValueError, AttributeError):  # it is no text, or its result no JSON
            run_id, name, begun_at = (value.decode() for value in row[:3])
            result = None if row[3] is None else row[3].decode()
            if result is not None:
                json.loads(result)
            yield run_id, SavedStep(name, begun_at, result)


def _rows(connection: sqlite3.Connection, table: str, *columns: str) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table that can be read, text as bytes, each once.

    Forwards, jumping over what is damaged, then backwards from the last one found: what a jump
    forwards went too far over is met from the other side.
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
                if (rowid - place) * way > 0:  # damage may bring them out of order
                    place, jump = rowid, 1
        except sqlite3.Error:
            place, jump = place + way * jump, jump * 2
        else:
            return
