"""The run store: every run and what its launch has done so far, in one SQL database."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError

from training_backends.client.sqlite import create_file, sqlite_engine
from training_backends.core.backend import JSONValue
from training_backends.core.errors import ConfigError, DuplicateRun, RunNotFound, StoreError
from training_backends.core.run import TrainingRun, utc_now
from training_backends.core.status import TrainingStatus

__all__ = ["SCHEMA_VERSION", "JournalEntry", "RunStore"]

SCHEMA_VERSION = 1

_metadata = sa.MetaData()
_schema = sa.Table("schema_version", _metadata, sa.Column("version", sa.Integer, nullable=False))
_runs = sa.Table(
    "runs",
    _metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("backend", sa.String(128), nullable=False),
    sa.Column("status", sa.String(32), nullable=False),
    sa.Column("created_at", sa.String(40), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)
_journal = sa.Table(
    "journal",
    _metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("begun_at", sa.String(40), nullable=False),
    sa.Column("result", sa.Text),
)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A step that was begun; `finished` when its result is known."""

    finished: bool
    result: JSONValue


class RunStore:
    """Runs and journals. Every method is one durable transaction, safe across processes."""

    def __init__(self, url: str) -> None:
        """Open the store at a SQLAlchemy URL; nothing is read or written yet.

        Raises:
            ConfigError: The URL cannot be read, or its driver is not installed.
        """
        try:
            self._url = sa.make_url(url)
            is_sqlite = self._url.get_backend_name() == "sqlite"
            engine = sqlite_engine(self._url) if is_sqlite else sa.create_engine(self._url)
        except (ArgumentError, ImportError) as error:
            # The URL may hold a password, so only what was wrong with it is repeated.
            reason = type(error).__name__ if isinstance(error, ArgumentError) else str(error)
            raise ConfigError(
                f"The run store's URL cannot be used ({reason}).",
                hint="TRAINING_BACKENDS_STORE_URL is a SQLAlchemy URL such as "
                "sqlite:///runs.db; another database needs its driver installed.",
            ) from None
        self._engine = engine.execution_options(writes=True)
        self._ready = False

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def insert(self, run: TrainingRun) -> None:
        """Record a new run.

        Raises:
            DuplicateRun: There is a run with this id.
        """
        with self._transaction() as connection:
            try:
                connection.execute(_runs.insert().values(**_row(run)))
            except IntegrityError:
                raise DuplicateRun(
                    f"There is a run {run.id!r} already.", other=run.id, run_id=run.id
                ) from None

    def get(self, run_id: str) -> TrainingRun:
        """Return the run with this id, or the only one whose id begins with it.

        Raises:
            RunNotFound: There is none, or there are several.
        """
        with self._transaction() as connection:
            return _load(self._find(connection, run_id))

    def update(self, run_id: str, change: Callable[[TrainingRun], TrainingRun]) -> TrainingRun:
        """Replace a run by what `change` makes of it, in one transaction."""
        with self._transaction() as connection:
            before = self._find(connection, run_id)
            run = change(_load(before))
            row = _row(run)
            if row["document"] != before.document:
                connection.execute(_runs.update().where(_runs.c.id == run.id).values(**row))
            return run

    def list(
        self, *, backend: str | None = None, status: TrainingStatus | None = None
    ) -> Sequence[TrainingRun]:
        """Return runs, newest first."""
        query = sa.select(_runs.c.document).order_by(_runs.c.created_at.desc(), _runs.c.id.desc())
        if backend is not None:
            query = query.where(_runs.c.backend == backend)
        if status is not None:
            query = query.where(_runs.c.status == status.value)
        with self._transaction() as connection:
            return [_load(row) for row in connection.execute(query)]

    def delete(self, run_id: str) -> None:
        """Forget a run and its journal."""
        with self._transaction() as connection:
            connection.execute(_journal.delete().where(_journal.c.run_id == run_id))
            connection.execute(_runs.delete().where(_runs.c.id == run_id))

    def entry(self, run_id: str, name: str) -> JournalEntry | None:
        """Return what is known of a step, or None if it was never begun."""
        with self._transaction() as connection:
            row = connection.execute(
                sa.select(_journal.c.result).where(_step(run_id, name))
            ).first()
        if row is None:
            return None
        finished = row.result is not None
        return JournalEntry(finished, json.loads(row.result) if finished else None)

    def begin(self, run_id: str, name: str) -> None:
        """Remember that a step is about to be done."""
        with self._transaction() as connection:
            connection.execute(
                _journal.insert().values(run_id=run_id, name=name, begun_at=utc_now().isoformat())
            )

    def finish(self, run_id: str, name: str, result: JSONValue) -> None:
        """Remember a step's result."""
        with self._transaction() as connection:
            connection.execute(
                _journal.update().where(_step(run_id, name)).values(result=json.dumps(result))
            )

    def forget(self, run_id: str, name: str) -> None:
        """Remember that a begun step certainly did not happen."""
        with self._transaction() as connection:
            connection.execute(_journal.delete().where(_step(run_id, name)))

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            self._prepare()
            with self._engine.begin() as connection:
                yield connection
        except (DatabaseError, OSError) as error:
            place = self._url.render_as_string(hide_password=True)
            cause = getattr(error, "orig", None) or error
            raise StoreError(
                f"The run store {place} cannot be used: {cause}",
                hint="Check the disk and the file's permissions, or set TRAINING_BACKENDS_HOME.",
            ) from error

    def _prepare(self) -> None:
        if self._ready:
            return
        database = self._url.database
        if self._url.get_backend_name() == "sqlite" and database and database != ":memory:":
            create_file(Path(database))
        with self._engine.begin() as connection:
            _metadata.create_all(connection)
            found = connection.execute(sa.select(_schema.c.version)).scalar()
            if found is None:
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            elif found > SCHEMA_VERSION:
                raise StoreError(
                    f"The run store was written by a newer version (schema {found}, "
                    f"this one knows {SCHEMA_VERSION}).",
                    hint="Upgrade training-backends.",
                )
        self._ready = True

    def _find(self, connection: sa.Connection, run_id: str) -> Any:
        exact = connection.execute(sa.select(_runs).where(_runs.c.id == run_id)).first()
        if exact is not None:
            return exact
        begins = _runs.c.id.startswith(run_id, autoescape=True)
        rows = connection.execute(sa.select(_runs).where(begins).limit(6)).all() if run_id else []
        if len(rows) == 1:
            return rows[0]
        if rows:
            names = ", ".join(row.id for row in rows[:5])
            raise RunNotFound(
                f"{run_id!r} is the beginning of several run ids: {names}.",
                hint="Type more of the id.",
                run_id=run_id,
            )
        raise RunNotFound(
            f"There is no run {run_id!r}.",
            hint="`training-backends list` shows the runs of this store.",
            run_id=run_id,
        )


def _step(run_id: str, name: str) -> sa.ColumnElement[bool]:
    return (_journal.c.run_id == run_id) & (_journal.c.name == name)


def _row(run: TrainingRun) -> dict[str, str]:
    return {
        "id": run.id,
        "backend": run.backend,
        "status": run.status.value,
        "created_at": run.created_at.isoformat(timespec="microseconds"),
        "document": run.model_dump_json(),
    }


def _load(row: Any) -> TrainingRun:
    return TrainingRun.model_validate_json(row.document)
