"""Jobs in the database: rows, lawful changes of status, events, checkpoints, wire form."""

import math
import time
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from training_backends.core.run import LogRecord
from training_backends.gateway.errors import not_found
from training_backends.gateway.store import checkpoints, events, jobs
from training_backends.mistral.wire import (
    CheckpointOut,
    ClassifierDetailedJobOut,
    ClassifierJobOut,
    CompletionDetailedJobOut,
    CompletionJobOut,
    EventOut,
    MetricOut,
)

__all__ = [
    "STATUS_EVENT",
    "add_event",
    "add_metrics",
    "change_status",
    "detailed_job",
    "load_job",
    "short_job",
]

STATUS_EVENT = "status-updated"
_METRICS = ("train_loss", "valid_loss", "valid_mean_token_accuracy")
_KEPT = 100
"""Checkpoints without validation that are stored; beyond, every second one goes."""

DetailedJobOut = CompletionDetailedJobOut | ClassifierDetailedJobOut
JobOut = CompletionJobOut | ClassifierJobOut


def load_job(connection: sa.Connection, job_id: str) -> Any:
    """Return a job's row.

    Raises:
        Refusal: There is no such job.
    """
    row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).first()
    if row is None:
        raise not_found("fine tuning job")
    return row


def change_status(
    connection: sa.Connection,
    job_id: str,
    status: str,
    *,
    only_from: Collection[str],
    at: float | None = None,
    silent: bool = False,
    data: dict[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Move a job on and say so in an event; False when it is not where it was thought to be.

    Args:
        at: When it happened; default now.
        silent: Write no event.
        data: Goes into the event beside the status.
        values: Other columns to set with it.
    """
    now = time.time()
    changed = connection.execute(
        jobs.update()
        .where(jobs.c.id == job_id, jobs.c.status.in_(only_from))
        .values(status=status, modified_at=now, **values)
    )
    if not changed.rowcount:
        return False
    if not silent:
        # Another machine's clock must not put events out of order.
        latest = sa.select(sa.func.max(events.c.created_at)).where(events.c.job_id == job_id)
        earliest = connection.execute(latest).scalar() or 0.0
        when = max(min(at or now, now), earliest)
        add_event(connection, job_id, STATUS_EVENT, {"status": status, **(data or {})}, when)
    return True


def add_event(
    connection: sa.Connection, job_id: str, name: str, data: dict[str, Any], at: float
) -> None:
    """Append to a job's events."""
    connection.execute(events.insert().values(job_id=job_id, name=name, data=data, created_at=at))


def add_metrics(connection: sa.Connection, job_id: str, records: Sequence[LogRecord]) -> None:
    """Turn metrics into checkpoints, thinned so that a long job keeps a bounded number."""
    merge = insert(checkpoints)
    merge = merge.on_conflict_do_update(
        index_elements=["job_id", "step"],
        set_={
            name: sa.func.coalesce(merge.excluded[name], checkpoints.c[name]) for name in _METRICS
        },
    )
    rows = [row for record in records if (row := _checkpoint(job_id, record))]
    if rows:
        connection.execute(merge, rows)
        _thin(connection, job_id, max(map(_total_steps, records), default=0))


def _checkpoint(job_id: str, record: LogRecord) -> dict[str, Any] | None:
    if record.source != "metrics" or record.step is None:
        return None
    values = {name: _finite(record.fields.get(name)) for name in _METRICS}
    if all(value is None for value in values.values()):
        return None
    at = record.at.timestamp()
    return {"job_id": job_id, "step": record.step, "created_at": at, **values}


def _total_steps(record: LogRecord) -> int:
    total = record.fields.get("total_steps")
    return total if isinstance(total, int) else 0


def _finite(value: Any) -> float | None:
    # JSON has no word for NaN, and a client's parser would refuse the whole job.
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _thin(connection: sa.Connection, job_id: str, total: int) -> None:
    """Drop what lies between strides; validation metrics and the last step always stay.

    A point once dropped never comes back and none turns up late, so that a client which
    reads again and again sees the same course as one that reads at the end.
    """
    mine = (checkpoints.c.job_id == job_id) & checkpoints.c.valid_loss.is_(None)
    known = sa.select(jobs.c.checkpoint_stride).where(jobs.c.id == job_id)
    stride = max(connection.execute(known).scalar_one(), math.ceil(total / _KEPT))
    counting = sa.select(sa.func.count()).select_from(checkpoints).where(mine)
    while True:
        between = (checkpoints.c.step % stride != 0) & (checkpoints.c.step != total)
        connection.execute(checkpoints.delete().where(mine, between))
        if connection.execute(counting).scalar_one() <= _KEPT + 1:
            break
        stride *= 2
    connection.execute(
        jobs.update()
        .where(jobs.c.id == job_id)
        .values(checkpoint_stride=stride, modified_at=time.time())
    )


def short_job(row: Any) -> JobOut:
    """Return a job as lists and creates show it."""
    kind = ClassifierJobOut if row.job_type == "classifier" else CompletionJobOut
    return kind(**_fields(row))


def detailed_job(connection: sa.Connection, job_id: str) -> DetailedJobOut:
    """Return a job with its events, oldest first, and its checkpoints, newest first.

    Raises:
        Refusal: There is no such job.
    """
    row = load_job(connection, job_id)
    happened = connection.execute(
        sa.select(events)
        .where(events.c.job_id == job_id)
        .order_by(events.c.created_at, events.c.id)
    ).all()
    reached = connection.execute(
        sa.select(checkpoints).where(checkpoints.c.job_id == job_id).order_by(checkpoints.c.step)
    ).all()
    fields = {
        **_fields(row),
        "events": [
            EventOut(name=event.name, data=event.data, created_at=int(event.created_at))
            for event in happened
        ],
        "checkpoints": [_checkpoint_out(point) for point in reversed(reached)],
    }
    if row.job_type == "classifier":
        return ClassifierDetailedJobOut(**fields, classifier_targets=row.classifier_targets)
    return CompletionDetailedJobOut(**fields)


def _checkpoint_out(row: Any) -> CheckpointOut:
    return CheckpointOut(
        metrics=MetricOut(**{name: getattr(row, name) for name in _METRICS}),
        step_number=row.step,
        created_at=int(row.created_at),
    )


def _fields(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "auto_start": row.auto_start,
        "model": row.model,
        "status": row.status,
        "created_at": int(row.created_at),
        "modified_at": int(row.modified_at),
        "training_files": [file["file_id"] for file in row.training_files],
        "validation_files": row.validation_files,
        "fine_tuned_model": row.fine_tuned_model,
        "suffix": row.suffix,
        "integrations": row.integrations or None,
        "trained_tokens": row.trained_tokens,
        "metadata": row.quote,
        "job_type": row.job_type,
        "hyperparameters": row.hyperparameters,
    }
