"""The timeline of each run: log records in order of time, metrics and event delivery."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from training_backends.core.errors import ConfigError
from training_backends.core.redaction import redact, redact_value
from training_backends.core.run import LogRecord, TrainingRun, to_source, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.store.database import Database, announce
from training_backends.store.leases import Lease, require
from training_backends.store.runs import change_run, find_run
from training_backends.store.schema import (
    IS_STATUS,
    as_text,
    deliveries,
    destinations,
    metrics,
    records,
    runs,
)

__all__ = ["EVENT_SOURCES", "Delivery", "MetricPoint", "Metrics", "Timeline"]

_STATUS: Final = "status"
EVENT_SOURCES: Final = frozenset({"status", "event", "checkpoint", "watch"})
"""Sources of records that are delivered as events."""
_MEASURED: Final = frozenset({"metrics", "checkpoint"})
_COUNTS: Final = frozenset({"step", "total_steps"})
"""Numeric fields of a record that are not metrics."""
_TRIMMED: Final = 1000
"""Records, or steps, that are deleted in one transaction."""
_TOO_LARGE: Final = 2**63
_LONGEST_NAME: Final = 128
_CURSOR: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One finite value of a metric."""

    step: int
    at: datetime
    name: str
    value: float


class Metrics(list[MetricPoint]):
    """The metrics of a run, by step."""

    def to_frame(self) -> Any:
        """Return a pandas `DataFrame` with a row per step and a column per metric.

        Raises:
            ImportError: pandas is not installed.
        """
        from pandas import DataFrame  # noqa: PLC0415 - optional, and slow to import

        rows: dict[int, dict[str, float]] = {}
        for point in self:
            rows.setdefault(point.step, {})[point.name] = point.value
        return DataFrame.from_dict(rows, orient="index").rename_axis("step").sort_index()


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record that was not delivered yet."""

    id: int
    run_id: str
    record: LogRecord


class Timeline(Database):
    """Log records of all sources in the run store.

    The cursor of a record is its number within the run, starting at 1.
    """

    def observed(
        self,
        run_id: str,
        change: Callable[[TrainingRun], TrainingRun],
        found: Sequence[LogRecord] = (),
        *,
        after: str | None,
        cursor: str | None,
        add_status_record: bool = False,
        more: bool = False,
    ) -> TrainingRun | None:
        """Store one observation of a run: changes, log records after `after`, the new cursor.

        Stores nothing and returns None if the provider's cursor is no longer `after`: another
        observation was stored in the meantime, and this one may be older.

        A record without a time gets that of the observation. A record older than the last stored
        one is appended with the last one's time, and keeps its own time in the field `told_at`. The
        observation that sees the run finished completes its log, unless there is `more`.

        Args:
            add_status_record: Add a record for a status change that no given record reports.
            change: Receives the current run; must not use the store. If it raises, nothing is
                stored.
            more: There are records after `cursor`.

        Raises:
            RunNotFound: No run has exactly this id.
        """
        clean = _prepared(found)
        with self._writing() as connection:
            row = find_run(connection, run_id)
            if row.cursor != after:
                return None
            run = change_run(connection, row, change, cursor=cursor)
            if add_status_record:
                clean = _with_status(connection, row, run, clean)
            _append(connection, row, clean)
            if not more:
                _mark_complete(connection, row, run)
            return run

    def note(
        self,
        run_id: str,
        change: Callable[[TrainingRun], TrainingRun],
        found: Sequence[LogRecord],
    ) -> TrainingRun:
        """Change a run and append records that do not come from its provider.

        If this finishes the run, its log is complete.

        Raises:
            RunNotFound: No run has exactly this id.
        """
        clean = _prepared(found)
        with self._writing() as connection:
            row = find_run(connection, run_id)
            run = change_run(connection, row, change)
            _append(connection, row, clean)
            if not TrainingStatus(row.status).is_terminal:
                _mark_complete(connection, row, run)
            return run

    def launched(
        self,
        run_id: str,
        change: Callable[[TrainingRun], TrainingRun],
        *,
        whole: bool = False,
    ) -> TrainingRun:
        """Change a run after its launch, without its log; only a final status is recorded.

        Other status changes are recorded by the first observation, which reads the provider's
        log from the beginning.

        Args:
            whole: If the run has finished, its log is complete: the provider has none.
        """
        with self._writing() as connection:
            row = find_run(connection, run_id)
            run = change_run(connection, row, change)
            if run.status.is_terminal:
                _append(connection, row, _with_status(connection, row, run, []))
                if whole:
                    _mark_complete(connection, row, run)
            return run

    def is_complete(self, run_id: str) -> bool:
        """Return whether a run has finished and its log is stored completely."""
        with self._reading() as connection:
            query = sa.select(runs.c.whole).where(runs.c.id == run_id)
            return bool(connection.execute(query).scalar())

    def provider_cursor(self, run_id: str) -> str | None:
        """Return the cursor up to which the provider's log is stored; None: the beginning."""
        with self._reading() as connection:
            query = sa.select(runs.c.cursor).where(runs.c.id == run_id)
            found: str | None = connection.execute(query).scalar()
            return found

    def records(
        self, run_id: str, *, after: str | None = None, limit: int = 1000
    ) -> list[LogRecord]:
        """Return the records after a cursor, oldest first.

        Raises:
            ConfigError: The cursor is invalid.
        """
        place = _place(after)
        mine = records.c.run_id == run_id
        query = sa.select(records).where(mine, records.c.seq > place)
        with self._reading() as connection:
            rows = connection.execute(query.order_by(records.c.seq).limit(limit)).all()
            if not rows and place > _last(connection, run_id)[0]:
                raise _bad_cursor(after)
        return [_record(row) for row in rows]

    def cursor_before_last(self, run_id: str, count: int) -> str | None:
        """Return the cursor after which a run has at most `count` records; None: the beginning."""
        query = sa.select(records.c.seq).where(records.c.run_id == run_id)
        with self._reading() as connection:
            # Reads only the index, whatever the size of the log.
            found = connection.execute(
                query.order_by(records.c.seq.desc()).offset(count).limit(1)
            ).scalar()
        return None if found is None else str(found)

    def metrics(
        self, run_id: str, *, after_step: int | None = None, names: Collection[str] | None = None
    ) -> Metrics:
        """Return the metrics by step; a later value of the same step wins.

        A value from a checkpoint counts only if the step has no metrics record: a provider may
        report a mean since the previous checkpoint under the same name.

        Args:
            after_step: Only later steps.
            names: Only these metrics; None: all.
        """
        query = sa.select(metrics).where(metrics.c.run_id == run_id)
        if after_step is not None:
            query = query.where(metrics.c.step > after_step)
        if names is not None:
            names = {names} if isinstance(names, str) else names
            query = query.where(metrics.c.name.in_(names))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(metrics.c.step, metrics.c.name)).all()
        return Metrics(
            MetricPoint(row.step, datetime.fromisoformat(row.at), row.name, row.value)
            for row in rows
        )

    def trim(self, run_id: str, *, keep_steps: Collection[int] = ()) -> int:
        """Delete the log of a finished run except its status changes, and its metrics.

        In several transactions, so that no other writer waits for long; safe to repeat.

        Args:
            keep_steps: Steps whose metrics are kept.

        Returns:
            The size of the deleted records.
        """
        mine = records.c.run_id == run_id
        gone = mine, records.c.source != _STATUS
        of_fields = sa.func.coalesce(sa.func.length(records.c.fields), 0)
        length = sa.func.length(records.c.message) + of_fields
        size = 0
        for start in range(0, self._last_number(run_id), _TRIMMED):
            part = (*gone, records.c.seq > start, records.c.seq <= start + _TRIMMED)
            with self._writing() as connection:
                found = connection.execute(sa.select(sa.func.sum(length)).where(*part)).scalar()
                size += int(found or 0)
                connection.execute(records.delete().where(*part))
        measured = metrics.c.run_id == run_id
        steps = sa.select(metrics.c.step).where(measured, metrics.c.step.not_in(keep_steps))
        steps = steps.distinct().order_by(metrics.c.step).limit(_TRIMMED)
        while True:
            with self._writing() as connection:
                if not (chosen := connection.execute(steps).scalars().all()):
                    return size
                between = metrics.c.step.between(chosen[0], chosen[-1])
                connection.execute(
                    metrics.delete().where(measured, between, metrics.c.step.not_in(keep_steps))
                )

    def _last_number(self, run_id: str) -> int:
        with self._reading() as connection:
            return _last(connection, run_id)[0]

    def undelivered(
        self, *, backend: str, limit: int, sources: Collection[str] | None = None
    ) -> list[Delivery]:
        """Return undelivered events of a backend's runs, oldest first.

        Args:
            sources: Only events of these sources; None: all.
        """
        query = sa.select(records).join(deliveries).where(deliveries.c.backend == backend)
        if sources is not None:
            query = query.where(records.c.source.in_(sources))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(deliveries.c.id).limit(limit)).all()
        return [Delivery(row.id, row.run_id, _record(row)) for row in rows]

    def delivered(self, ids: Collection[int], *, lease: Lease | None = None) -> None:
        """Mark events as delivered.

        Raises:
            LeaseLost: Another process delivers them now.
        """
        gone = deliveries.delete().where(deliveries.c.id == sa.bindparam("gone"))
        with self._writing() as connection:
            require(connection, lease)
            if ids:
                connection.execute(gone, [{"gone": it} for it in ids])


def _mark_complete(connection: sa.Connection, row: Any, run: TrainingRun) -> None:
    if run.status.is_terminal and not row.whole:
        connection.execute(runs.update().where(runs.c.id == row.id).values(whole=True))
        if run.status is TrainingStatus.COMPLETED and run.config.result.destination is not None:
            due = {"run_id": run.id, "due_at": as_text(utc_now()), "attempts": 0}
            connection.execute(destinations.insert().values(due))


def _prepared(found: Sequence[LogRecord]) -> list[LogRecord]:
    """Return records with a time, and without secrets that a provider repeats in its log."""
    now = utc_now()
    return [
        record.model_copy(
            update={
                "at": record.at or now,
                "message": redact(record.message),
                "fields": redact_value(record.fields),
            }
        )
        for record in found
    ]


def _time_of(record: LogRecord) -> datetime:
    return record.at or utc_now()


def _with_status(
    connection: sa.Connection, row: Any, run: TrainingRun, found: Sequence[LogRecord]
) -> list[LogRecord]:
    """Return the records of an observation with each status change reported once.

    A backend may log status changes itself, even ones that no observation saw. A repeated status
    is no change: its other fields are kept as an event.
    """
    in_time = sorted(found, key=_time_of)
    logs_status = any(record.source == _STATUS for record in in_time)
    moved = run.status.value != row.status
    if not (moved or logs_status or row.cursor is None):
        return in_time
    known = _last_status(connection, run.id)
    moved = moved or known is None
    last = known or TrainingStatus.PENDING
    kept = []
    for record in in_time:
        status = _status_of(record)
        if status is not None and status is known:
            if record.message in {status.value, record.fields.get("raw_status")}:
                continue
            record = record.model_copy(update={"source": "event"})  # noqa: PLW2901
        elif status is not None:
            known = last = status
        kept.append(record)
    is_new = run.status is not last and not last.is_terminal
    if is_new and (moved or run.status.is_terminal):
        kept.append(_change_of_status(run))
    return kept


def _change_of_status(run: TrainingRun) -> LogRecord:
    status, word = run.status, run.raw_status or run.status.value
    at = run.finished_at if status.is_terminal else run.changed_at
    if status is TrainingStatus.RUNNING:
        at = run.started_at or at
    level: Literal["info", "warning", "error"] = "info"
    if status is TrainingStatus.FAILED:
        level = "error"
    elif status in {TrainingStatus.CANCELLED, TrainingStatus.UNKNOWN}:
        level = "warning"
    return LogRecord(
        at=at or utc_now(),
        level=level,
        message=f"{word}: {run.failure.message}" if run.failure else word,
        source=_STATUS,
        fields={"status": status.value, "raw_status": word},
        cursor="",
    )


def _last_status(connection: sa.Connection, run_id: str) -> TrainingStatus | None:
    """Return the last status in a run's log, or None."""
    query = sa.select(records).where(records.c.run_id == run_id, IS_STATUS)
    for row in connection.execute(query.order_by(records.c.seq.desc())):
        if (status := _status_of(_record(row))) is not None:
            return status
    return None


def _status_of(record: LogRecord) -> TrainingStatus | None:
    found = record.fields.get("status")
    if record.source != _STATUS or found not in set(TrainingStatus):
        return None
    return TrainingStatus(found)


def _append(connection: sa.Connection, run: Any, found: Sequence[LogRecord]) -> None:
    """Append records, and update metrics and undelivered events."""
    if not found:
        return
    last, latest = _last(connection, run.id)
    in_time = sorted(found, key=_time_of)
    rows = [_row(run.id, seq, record, latest) for seq, record in enumerate(in_time, last + 1)]
    connection.execute(records.insert(), rows)
    waiting = sa.select(records.c.id, sa.literal(run.backend)).where(
        records.c.run_id == run.id, records.c.seq > last, records.c.source.in_(EVENT_SOURCES)
    )
    connection.execute(
        deliveries.insert().from_select([deliveries.c.id, deliveries.c.backend], waiting)
    )
    _measure(connection, run.id, in_time)
    announce(connection, run.id)


def _row(run_id: str, seq: int, record: LogRecord, latest: str) -> dict[str, Any]:
    at = as_text(_time_of(record))
    fields = record.fields if at >= latest else {**record.fields, "told_at": at}
    return {
        "run_id": run_id,
        "seq": seq,
        "at": max(at, latest),
        "level": record.level,
        "source": record.source,
        "step": record.step if _is_count(record.step) else None,
        # PostgreSQL does not support NUL.
        "message": record.message.replace("\0", "\ufffd"),
        "fields": json.dumps(fields, default=str) if fields else None,
    }


def _measure(connection: sa.Connection, run_id: str, found: Sequence[LogRecord]) -> None:
    reached = {it.step for it in found if it.source == "checkpoint" and _is_count(it.step)}
    own = _measured_by_step(connection, run_id, reached) if reached else set()
    points = {
        (step, name): {"run_id": run_id, "step": step, "name": name, "at": at, "value": value}
        for record in found
        for step, name, at, value in _values(record)
        if record.source == "metrics" or (step, name) not in own
    }
    if not points:
        return
    told_before = metrics.delete().where(
        metrics.c.run_id == run_id,
        metrics.c.step == sa.bindparam("the_step"),
        metrics.c.name == sa.bindparam("the_name"),
    )
    connection.execute(told_before, [{"the_step": step, "the_name": name} for step, name in points])
    connection.execute(metrics.insert(), list(points.values()))


def _measured_by_step(
    connection: sa.Connection, run_id: str, steps: Collection[int | None]
) -> set[tuple[int, str]]:
    """Return the metrics that were recorded by the steps themselves, not by checkpoints."""
    query = sa.select(records).where(
        records.c.run_id == run_id, records.c.source == "metrics", records.c.step.in_(steps)
    )
    rows = connection.execute(query)
    return {(step, name) for row in rows for step, name, _, _ in _values(_record(row))}


def _values(record: LogRecord) -> Iterator[tuple[int, str, str, float]]:
    step = record.step
    if record.source not in _MEASURED or step is None or not _is_count(step):
        return
    for name, value in record.fields.items():
        number = isinstance(value, float) or _is_count(value)
        if number and math.isfinite(value) and _is_name(name) and name not in _COUNTS:
            yield step, name, as_text(_time_of(record)), float(value)


def _is_name(name: str) -> bool:
    """Return whether a database can index a name."""
    return len(name) <= _LONGEST_NAME and "\0" not in name


def _is_count(value: Any) -> bool:
    """Return whether a value is an integer within 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE


def _last(connection: sa.Connection, run_id: str) -> tuple[int, str]:
    """Return the number and time of a run's last record; 0 and "" if it has none."""
    query = sa.select(records.c.seq, records.c.at).where(records.c.run_id == run_id)
    row = connection.execute(query.order_by(records.c.seq.desc()).limit(1)).first()
    return (0, "") if row is None else (row.seq, row.at)


def _record(row: Any) -> LogRecord:
    return LogRecord(
        at=datetime.fromisoformat(row.at),
        level=row.level,
        message=row.message,
        source=to_source(row.source),
        step=row.step,
        fields={} if row.fields is None else json.loads(row.fields),
        cursor=str(row.seq),
    )


def _place(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if _CURSOR.fullmatch(cursor) is None:
        raise _bad_cursor(cursor)
    return int(cursor)


def _bad_cursor(cursor: str | None) -> ConfigError:
    return ConfigError(
        f"Invalid log cursor {cursor!r}.",
        hint="Use the cursor of a record from `training-backends logs --json`.",
    )
