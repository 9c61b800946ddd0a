"""Merge a run directory's events and metrics into one log, resumable from any record."""

import heapq
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from training_backends.backends.local.state import LOST, TRAINER_STATUS, Snapshot
from training_backends.core.run import LogRecord, to_source, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, MetricsRow, RunDir

__all__ = ["Cursor", "read_records"]


class Cursor(NamedTuple):
    """Byte offsets in both files, and whether the log is complete."""

    events: int = 0
    metrics: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"{self.events}-{self.metrics}" + ("-end" if self.ended else "")

    @classmethod
    def parse(cls, text: str | None) -> "Cursor":
        """Parse a cursor; None is the beginning.

        Raises:
            ValueError: It is not a valid cursor.
        """
        if text is None:
            return cls()
        events, metrics, *ended = text.split("-")
        if ended not in ([], ["end"]):
            raise ValueError(f"not a cursor: {text!r}")
        return cls(int(events), int(metrics), bool(ended))


def read_records(run: RunDir, after: Cursor, snapshot: Snapshot) -> list[LogRecord]:
    """Return the records after a cursor, in order."""
    if after.ended:
        return []
    ending, until = snapshot
    records = list(_merged(run, after, until))
    if ending and ending.failure == LOST:
        # The process could not report its end, so the log gets a final record here.
        cursor = Cursor.parse(records[-1].cursor) if records else after
        records.append(_lost(ending.at or utc_now(), cursor))
    return records


def _lost(at: datetime, cursor: Cursor) -> LogRecord:
    return LogRecord(
        at=at,
        level="error",
        message=LOST.message,
        source="status",
        fields={"status": TrainingStatus.FAILED.value, "raw_status": "lost"},
        cursor=str(cursor._replace(ended=True)),
    )


def _merged(run: RunDir, after: Cursor, until: datetime) -> Iterator[LogRecord]:
    rows: Iterator[tuple[Event | MetricsRow, int]] = heapq.merge(
        run.read_events(after.events), run.read_metrics(after.metrics), key=lambda row: row[0].at
    )
    cursor = after
    for row, end in rows:
        if row.at > until:
            return
        if isinstance(row, Event):
            cursor = cursor._replace(events=end)
            yield _from_event(row, cursor)
        else:
            cursor = cursor._replace(metrics=end)
            yield _from_metrics(row, cursor)


def _from_event(event: Event, cursor: Cursor) -> LogRecord:
    fields = dict(event.data)
    if event.name == "status":
        raw = str(fields.get("status"))
        status = TRAINER_STATUS.get(raw, TrainingStatus.UNKNOWN)
        fields |= {"status": status.value, "raw_status": raw}
    # A checkpoint's values stay nested under `metrics`: the step's own row has them too, and a
    # plot of the log would show them twice.
    return LogRecord(
        at=event.at,
        level=event.level,
        message=event.message,
        source="event" if event.name == "message" else to_source(event.name),
        step=event.step,
        fields=fields,
        cursor=str(cursor),
    )


def _from_metrics(row: MetricsRow, cursor: Cursor) -> LogRecord:
    values = f"train_loss {row.train_loss:.4f}"
    if row.valid_loss is not None:
        values += f", valid_loss {row.valid_loss:.4f}"
    return LogRecord(
        at=row.at,
        message=f"step {row.step}/{row.total_steps}: {values}",
        source="metrics",
        step=row.step,
        fields={**row.measures(), "total_steps": row.total_steps},
        cursor=str(cursor),
    )
