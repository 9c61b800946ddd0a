"""What a job shows of its run: events and checkpoints, computed from the stored log."""

import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from training_backends.core.status import TrainingStatus
from training_backends.protocols.mistral.status import ENDED, UNSTARTED, to_wire
from training_backends.store.gateway_schema import events
from training_backends.store.schema import IS_STATUS, documents, metrics, records

__all__ = [
    "ORDER",
    "STATUS_EVENT",
    "JobCheckpoint",
    "JobEvent",
    "history",
    "job_checkpoints",
    "job_events",
    "kept_checkpoints",
    "reached",
    "run_document",
]

STATUS_EVENT: Final = "status-updated"
ORDER: Final = ("QUEUED", "STARTED", "RUNNING", "CANCELLATION_REQUESTED")
"""Statuses of a started job that has not finished, each of which only earlier ones precede."""
_STARTED: Final = frozenset({"running", "stopping", "completed", "failed", "cancelled"})
"""Statuses of a run whose start, if known, was that of its training."""
_STATUSES: Final = {status.value: status for status in TrainingStatus}
_METRICS: Final = ("train_loss", "valid_loss", "valid_mean_token_accuracy")
_FEWEST_BETWEEN: Final = 10
"""Minimum steps between two checkpoints, as at the hosted service."""
_BATCH: Final = 500
"""Steps per statement; databases limit the number of values."""


class JobEvent(NamedTuple):
    """An event of a job; `at` in seconds since the epoch."""

    name: str
    data: dict[str, Any]
    at: float


class JobCheckpoint(NamedTuple):
    """What was measured at one step; `at` in seconds since the epoch, a metric may be None."""

    step: int
    at: float
    metrics: dict[str, float | None]


def job_events(connection: sa.Connection, job: Any) -> list[JobEvent]:
    """Return the events of a job, oldest first.

    Those of its run are the status changes in the run's log, each a step forward and none beyond
    the job's own status, so that status and events agree. A clock of the provider that differs
    does not change the order.
    """
    if job.history is not None:
        return [JobEvent(**event) for event in job.history["events"]]
    query = sa.select(events).where(events.c.job_id == job.id).order_by(events.c.id)
    own = [JobEvent(row.name, row.data, row.created_at) for row in connection.execute(query)]
    if job.started_at is None:
        return own
    before = (n for n, event in enumerate(own, 1) if event.data.get("status") in UNSTARTED)
    split = max(before, default=0)
    first, later = own[:split], own[split:]
    kept = []
    best = 0
    limit = len(ORDER) if job.status in ENDED else ORDER.index(job.status)
    for event, is_own in sorted(
        [
            *((event, False) for event in _of_run(connection, job)),
            *((event, True) for event in later),
        ],
        key=lambda found: found[0].at,
    ):
        word = event.data.get("status")
        level = len(ORDER) if word in ENDED else ORDER.index(word) if word in ORDER else 0
        if is_own or best < level <= limit:
            kept.append(event)
            best = max(best, level)
    return [*first, *kept]


def reached(connection: sa.Connection, job: Any) -> str:
    """Return how far a started job is by its own status and the log of its run."""
    words = {job.status, *(event.data["status"] for event in _of_run(connection, job))}
    return [word for word in ORDER if word in words][-1]


def _of_run(connection: sa.Connection, job: Any) -> list[JobEvent]:
    """Return the status changes of a run in order, as far as the protocol knows them.

    The last one, and the start where the log has none, are from the run's record: a launch, or a
    list of many runs, may report a status that no log does.
    """
    query = sa.select(records.c.at, records.c.fields).where(records.c.run_id == job.id, IS_STATUS)
    changes: list[JobEvent] = []

    def add(status: str | None, at: float, place: int) -> None:
        earliest = changes[place - 1].at if place else job.started_at
        latest = changes[place].at if place < len(changes) else math.inf
        changes[place:place] = _event(status, min(max(at, earliest), latest))

    for row in connection.execute(query.order_by(records.c.seq)):
        add(json.loads(row.fields or "{}").get("status"), _seconds(row.at), len(changes))
    run = run_document(connection, job)
    status, started, changed = (run.get(name) for name in ("status", "started_at", "changed_at"))
    words = [change.data["status"] for change in changes]
    if started and status in _STARTED and "RUNNING" not in words:
        before = [ORDER.index(word) < ORDER.index("RUNNING") for word in words]
        add(TrainingStatus.RUNNING, _seconds(started), [*before, False].index(False))
    add(status, _seconds(changed) if changed else -math.inf, len(changes))
    return changes


def _event(status: str | None, at: float) -> Iterator[JobEvent]:
    known = _STATUSES.get(status or "")
    word = to_wire(known) if known else None
    if word in ORDER:
        yield JobEvent(STATUS_EVENT, {"status": word}, at)


def run_document(connection: sa.Connection, job: Any) -> dict[str, Any]:
    """Return the record of a job's run; empty if there is none."""
    query = sa.select(documents.c.document).where(documents.c.run_id == job.id)
    found = connection.execute(query).scalar()
    record: dict[str, Any] = json.loads(found) if found else {}
    return record


def job_checkpoints(connection: sa.Connection, job: Any) -> list[JobCheckpoint]:
    """Return the checkpoints of a job, by step: every tenth of its run, and the last step.

    Metrics are only appended, so a client that polls sees the same list as one that reads it at
    the end. Reads an index, however many steps there are between two checkpoints.
    """
    if job.history is not None:
        return [JobCheckpoint(**point) for point in job.history["checkpoints"]]
    points: dict[int, JobCheckpoint] = {}
    steps = list(_due_steps(connection, job))
    for start in range(0, len(steps), _BATCH):
        mine = metrics.c.run_id == job.id, metrics.c.step.in_(steps[start : start + _BATCH])
        query = sa.select(metrics).where(*mine, metrics.c.name.in_(_METRICS))
        for row in connection.execute(query.order_by(metrics.c.step)):
            at, values = _seconds(row.at), dict.fromkeys(_METRICS)
            point = points.setdefault(row.step, JobCheckpoint(row.step, at, values))
            point.metrics[row.name] = row.value
    return list(points.values())


def kept_checkpoints(connection: sa.Connection, job: Any) -> list[JobCheckpoint]:
    """Return the checkpoints whose files are on this machine, by step."""
    return [
        JobCheckpoint(point["step"], _seconds(point["at"]), point["metrics"])
        for point in run_document(connection, job).get("checkpoints", ())
        if point.get("path") and Path(point["path"]).is_dir()
    ]


def _due_steps(connection: sa.Connection, job: Any) -> Iterator[int]:
    planned = job.hyperparameters.get("training_steps")
    total = int(run_document(connection, job).get("total_steps") or planned or 0)
    tenth = max(_FEWEST_BETWEEN, math.ceil(total / 10))
    # Keep validation losses of a backend that evaluates more often.
    hundredth = max(_FEWEST_BETWEEN, math.ceil(total / 100))
    end = _first(connection, job, total, total + 1, _METRICS)
    last = 0
    while True:
        # Separate ranges, each of which an index finds: with OR, SQLite would read all steps.
        found = (
            _first(connection, job, last + tenth, None, _METRICS),
            _first(connection, job, last + hundredth, last + tenth, ["valid_loss"]),
            end,
        )
        due = [step for step in found if step is not None and step > last]
        if not due:
            return
        last = min(due)
        yield last


def _first(
    connection: sa.Connection, job: Any, start: int, end: int | None, names: Sequence[str]
) -> int | None:
    """Return the first step in a range at which one of the metrics was measured."""
    query = sa.select(metrics.c.step).where(
        metrics.c.run_id == job.id, metrics.c.step >= start, metrics.c.name.in_(names)
    )
    if end is not None:
        query = query.where(metrics.c.step < end)
    found: int | None = connection.execute(query.order_by(metrics.c.step).limit(1)).scalar()
    return found


def history(connection: sa.Connection, job: Any) -> dict[str, Any]:
    """Return the events and checkpoints of a job for its row, before its run is deleted."""
    return {
        "events": [event._asdict() for event in job_events(connection, job)],
        "checkpoints": [point._asdict() for point in job_checkpoints(connection, job)],
    }


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
