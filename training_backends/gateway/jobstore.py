"""Jobs in the database: rows, lawful changes of status, events, checkpoints, wire form."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from training_backends.core.run import LogRecord
from training_backends.gateway.errors import not_found
from training_backends.gateway.keys import Principal
from training_backends.gateway.store import checkpoints, events, jobs
from training_backends.protocols.mistral.wire import (
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
    "require_job",
    "short_job",
]

STATUS_EVENT = "status-updated"
_METRICS = ("train_loss", "valid_loss", "valid_mean_token_accuracy")
_FEWEST_BETWEEN = 10
"""Steps between two checkpoints, as the hosted service has it."""

_UNKNOWN = {"weight_decay": None, "warmup_fraction": None, "fim_ratio": None}
"""Hyperparameters until the backend has said what it takes. A learning rate must not be null on
the wire: the protocol's default is shown until then."""

DetailedJobOut = CompletionDetailedJobOut | ClassifierDetailedJobOut
JobOut = CompletionJobOut | ClassifierJobOut


def load_job(connection: sa.Connection, job_id: str) -> Any:
    """Return the row of a job that is known to exist."""
    return connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()


def require_job(connection: sa.Connection, job_id: str, caller: Principal) -> Any:
    """Return the row of a job that a client asks for.

    Raises:
        Refusal: There is no such job for this client.
    """
    visible = jobs.c.id == job_id, caller.sees(jobs.c.project)
    row = connection.execute(sa.select(jobs).where(*visible)).first()
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
    """Turn metrics into checkpoints at the protocol's cadence, however often they come."""
    known = sa.select(checkpoints.c.step).where(checkpoints.c.job_id == job_id)
    steps = set(connection.execute(known).scalars())
    rows = []
    for record in records:
        row = _checkpoint(job_id, record)
        if row and (row["step"] in steps or _is_due(row, _total_steps(record), max(steps or {0}))):
            steps.add(row["step"])
            rows.append(row)
    if not rows:
        return
    merge = insert(checkpoints)
    merge = merge.on_conflict_do_update(
        index_elements=["job_id", "step"],
        set_={
            name: sa.func.coalesce(merge.excluded[name], checkpoints.c[name]) for name in _METRICS
        },
    )
    connection.execute(merge, rows)
    modified = jobs.update().where(jobs.c.id == job_id).values(modified_at=time.time())
    connection.execute(modified)


def _is_due(row: Mapping[str, Any], total: int, before: int) -> bool:
    """Tell whether a point is told of: every tenth of the run, and the last step.

    A point once told of stays and none turns up later between two others, so that a client
    which reads again and again sees the same course as one that reads at the end.

    Args:
        total: Steps of the run; 0 while that is not known.
        before: The step told of last.
    """
    if total and row["step"] == total:
        return True
    # A backend may validate more often than every tenth: what it finds is not lost.
    parts = 10 if row["valid_loss"] is None else 100
    return bool(row["step"] - before >= max(_FEWEST_BETWEEN, math.ceil(total / parts)))


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


def short_job(row: Any) -> JobOut:
    """Return a job as lists and creates show it."""
    kind = ClassifierJobOut if row.job_type == "classifier" else CompletionJobOut
    return kind(**_fields(row))


def detailed_job(connection: sa.Connection, job_id: str, caller: Principal) -> DetailedJobOut:
    """Return a job with its events, oldest first, and its checkpoints, newest first.

    Raises:
        Refusal: There is no such job for this client.
    """
    row = require_job(connection, job_id, caller)
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
        "hyperparameters": {**_UNKNOWN, **row.hyperparameters},
    }
