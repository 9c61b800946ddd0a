"""Records of runs: look-up, changes and the set of live runs."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError

from training_backends.core.errors import DuplicateRun, RunNotFound, StoreError, validation_issues
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.store.database import RECOVER, Database, announce
from training_backends.store.job_counts import recount_jobs
from training_backends.store.journal import SavedStep, put_back
from training_backends.store.schema import IS_LIVE, as_text, deliveries, documents, runs

__all__ = ["LiveRuns", "Runs", "among", "change_run", "find_run"]

_CANDIDATES: Final = 6
_BATCH: Final = 500
"""Ids per statement; databases limit the number of values."""
_WITH_DOCUMENT: Final = sa.select(runs, documents.c.document).join(documents)


@dataclass(frozen=True, slots=True)
class LiveRuns:
    """Unfinished runs at a provider.

    Attributes:
        versions: Version of each run's record, by run id; grows with every change.
        changed: Runs whose version differs from the known one.
        seen_at: When each was last observed, by run id.
    """

    versions: Mapping[str, int]
    changed: Sequence[TrainingRun]
    seen_at: Mapping[str, datetime | None]


class Runs(Database):
    """Records of runs in the run store."""

    def insert(self, run: TrainingRun) -> None:
        """Record a new run.

        Raises:
            DuplicateRun: A run with this id exists.
        """
        with self._writing() as connection:
            _insert(connection, run)

    def restore(self, run: TrainingRun, steps: Iterable[SavedStep] = ()) -> None:
        """Record a run recovered from a damaged store, with the rest of its journal.

        Rows of the journal may be missing, so each step that is not in it counts as begun: its
        effect is looked for before it is done again.

        Raises:
            DuplicateRun: A run with this id exists.
        """
        with self._writing() as connection:
            _insert(connection, run)
            put_back(connection, run.id, steps)

    def restore_gateway(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Insert rows recovered from a damaged SQLite store, by table, if they are complete."""
        with self._writing() as connection:
            for name, found in rows.items():
                for row in found:
                    table = sa.table(name, *map(sa.column, row))
                    connection.execute(table.insert().prefix_with("OR IGNORE").values(**row))
            recount_jobs(connection)

    def get(self, run_id: str) -> TrainingRun:
        """Return the run with exactly this id.

        Raises:
            RunNotFound: No run has it; `candidates` are ids that begin with it.
        """
        with self._reading() as connection:
            return _load(find_run(connection, run_id))

    def update(self, run_id: str, change: Callable[[TrainingRun], TrainingRun]) -> TrainingRun:
        """Replace a run by the result of `change`, in one transaction.

        Raises:
            RunNotFound: No run has exactly this id.
        """
        with self._writing() as connection:
            return change_run(connection, find_run(connection, run_id), change)

    def list(
        self,
        *,
        backend: str | None = None,
        status: TrainingStatus | None = None,
        limit: int | None = None,
        after: TrainingRun | None = None,
    ) -> Sequence[TrainingRun]:
        """Return runs, newest first.

        Args:
            limit: Maximum number; None: all.
            after: The last run of the previous page.
        """
        query = _WITH_DOCUMENT.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit)
        if after is not None:
            last = (as_text(after.created_at), after.id)
            query = query.where(sa.tuple_(runs.c.created_at, runs.c.id) < last)
        if backend is not None:
            query = query.where(runs.c.backend == backend)
        if status is not None:
            query = query.where(runs.c.status == status.value)
        with self._reading() as connection:
            rows = connection.execute(query).all()
        return [_load(row) for row in rows]

    def delete(self, run_id: str, *, created_at: datetime | None = None) -> None:
        """Delete the record of a run with its log, metrics and journal; safe to repeat.

        Args:
            created_at: Delete only a run created at this time, not a newer one with the same id.
                None deletes any.
        """
        gone = runs.delete().where(runs.c.id == run_id)
        if created_at is not None:
            gone = gone.where(runs.c.created_at == as_text(created_at))
        with self._writing() as connection:
            connection.execute(gone)

    def live(
        self,
        *,
        backend: str | None = None,
        known: Mapping[str, int] = MappingProxyType({}),
        only: Collection[str] | None = None,
    ) -> LiveRuns:
        """Return the unfinished runs that have a provider job id.

        Args:
            known: Versions already read, by run id.
            only: Restrict to these ids.
        """
        query = sa.select(runs.c.id, runs.c.version, runs.c.seen_at).where(*_is_live())
        if backend is not None:
            query = query.where(runs.c.backend == backend)
        with self._reading() as connection:
            if only is None:
                found = connection.execute(query).all()
            else:
                found = list(among(connection, query, runs.c.id, only))
            changed = [row.id for row in found if known.get(row.id) != row.version]
            rows = list(among(connection, _WITH_DOCUMENT, runs.c.id, changed))
        return LiveRuns(
            versions={row.id: row.version for row in found},
            changed=[_load(row) for row in rows],
            seen_at={row.id: _moment(row.seen_at) for row in found},
        )

    def backends_to_watch(self) -> Sequence[str]:
        """Return the names of backends with live runs or undelivered events."""
        live = sa.select(runs.c.backend).where(*_is_live())
        with self._reading() as connection:
            names = connection.execute(live.union(sa.select(deliveries.c.backend))).scalars()
            return sorted(names)

    def seen(self, run_ids: Collection[str], at: datetime) -> None:
        """Record when unchanged runs were observed; an earlier time has no effect."""
        observed_at = as_text(at)
        earlier = sa.or_(runs.c.seen_at.is_(None), runs.c.seen_at < observed_at)
        with self._writing() as connection:
            for ids in _batches(run_ids):
                connection.execute(
                    runs.update().where(runs.c.id.in_(ids), earlier).values(seen_at=observed_at)
                )

    def update_all(
        self, run_ids: Collection[str], change: Callable[[TrainingRun], TrainingRun]
    ) -> None:
        """Replace each of many runs by the result of `change`, in one transaction.

        Unknown ids are skipped.
        """
        with self._writing() as connection:
            for row in list(among(connection, _WITH_DOCUMENT, runs.c.id, run_ids)):
                change_run(connection, row, change)

    def claimed(self, run_id: str, remote_ids: Collection[str]) -> frozenset[str]:
        """Return the provider job ids that belong to other runs."""
        query = sa.select(runs.c.remote_id).where(runs.c.id != run_id)
        with self._reading() as connection:
            found = among(connection, query, runs.c.remote_id, remote_ids)
            return frozenset(row.remote_id for row in found)


def find_run(connection: sa.Connection, run_id: str) -> Any:
    """Return the row of the run with exactly this id.

    Raises:
        RunNotFound: No run has it; `candidates` are ids that begin with it.
    """
    row = connection.execute(_WITH_DOCUMENT.where(runs.c.id == run_id)).first()
    if row is not None:
        return row
    # Not LIKE: its case sensitivity and index use differ between databases.
    begins = sa.select(runs.c.id).where(runs.c.id > run_id, runs.c.id < f"{run_id}\U0010ffff")
    begins = begins.order_by(runs.c.id).limit(_CANDIDATES)
    candidates = connection.execute(begins).scalars().all() if run_id else []
    hint = "`training-backends list` shows the runs in this store."
    if candidates:
        hint = f"Run ids are matched exactly. Ids with this prefix: {', '.join(candidates)}."
    raise RunNotFound(f"Run {run_id!r} not found.", candidates=candidates, hint=hint, run_id=run_id)


def change_run(
    connection: sa.Connection,
    row: Any,
    change: Callable[[TrainingRun], TrainingRun],
    **columns: str | None,
) -> TrainingRun:
    """Write the result of `change`, and columns that are not part of the record."""
    run = change(_load(row))
    document = _document(run)
    values = {**_columns(run), **columns}
    # Processes may store their observations out of order.
    values["seen_at"] = max(filter(None, (row.seen_at, values["seen_at"])), default=None)
    if document != row.document:
        connection.execute(
            documents.update().where(documents.c.run_id == row.id).values(document=document)
        )
        values["version"] = row.version + 1
    new = {name: value for name, value in values.items() if value != getattr(row, name)}
    if new:
        connection.execute(runs.update().where(runs.c.id == row.id).values(**new))
        announce(connection, row.id)
    return run.model_copy(update={"last_seen_at": _moment(values["seen_at"])})


def _insert(connection: sa.Connection, run: TrainingRun) -> None:
    try:
        connection.execute(runs.insert().values(**_columns(run), version=1, whole=False))
    except IntegrityError:
        raise DuplicateRun(f"Run {run.id!r} already exists.", other=run.id, run_id=run.id) from None
    connection.execute(documents.insert().values(run_id=run.id, document=_document(run)))


def _columns(run: TrainingRun) -> dict[str, Any]:
    return {
        "id": run.id,
        "backend": run.backend,
        "status": run.status.value,
        "created_at": as_text(run.created_at),
        "remote_id": run.remote_id,
        "seen_at": None if run.last_seen_at is None else as_text(run.last_seen_at),
    }


def _document(run: TrainingRun) -> str:
    return run.model_dump_json(exclude={"last_seen_at"})


def _load(row: Any) -> TrainingRun:
    try:
        run = TrainingRun.model_validate_json(row.document)
    except ValidationError as error:
        raise StoreError(
            f"Cannot read the record of run {row.id!r}: {validation_issues(error)[0]}.",
            hint=RECOVER,
            run_id=row.id,
        ) from error
    return run.model_copy(update={"last_seen_at": _moment(row.seen_at)})


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _is_live() -> tuple[sa.ColumnElement[bool] | sa.TextClause, ...]:
    # Not IS NOT NULL, for which SQLite may take the index of all job ids.
    return IS_LIVE, sa.func.coalesce(runs.c.remote_id, "") != ""


def _batches(values: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(values)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def among(
    connection: sa.Connection,
    query: sa.Select[Any],
    column: sa.ColumnElement[Any],
    values: Iterable[str],
) -> Iterator[Any]:
    """Yield the rows of a query whose column has one of many values."""
    for batch in _batches(values):
        yield from connection.execute(query.where(column.in_(batch)))
