"""What the console shows of runs: rows of the list, the page of one run, metrics and log."""

import json
import math
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from training_backends.core.status import TrainingStatus
from training_backends.gateway.job_events import job_events
from training_backends.gateway.jobstore import require_job
from training_backends.gateway.keys import Principal
from training_backends.gateway.store import page_of
from training_backends.protocols.mistral.status import JOB_STATUSES, to_status
from training_backends.store.gateway_schema import IS_OPEN, jobs
from training_backends.store.job_counts import count_jobs
from training_backends.store.schema import documents, metrics, records, runs

__all__ = [
    "RunQuery",
    "last_records",
    "list_runs",
    "load_run",
    "records_after",
    "records_before",
    "run_metrics",
    "summaries",
]

MOST_POINTS: Final = 2000
"""Points of a metric; longer series are averaged over intervals."""
MOST_SERIES: Final = 40
_LONGEST_MESSAGE: Final = 4000
_POSITION: Final = re.compile(r"position (\d+)")
_HINTS: Final[Mapping[str, str]] = {
    "validation": "Correct the data or the values named above, then launch again.",
    "out_of_memory": "Use a smaller model, a shorter seq_len, a smaller batch or LoRA.",
    "quota": "Wait until capacity is free, or raise the quota at the provider.",
    "auth": "Check the gateway's credentials for this backend.",
    "preempted": "Launch the run again.",
    "lost": "The backend no longer has this run. Launch it again.",
    "timeout": "Raise the limit on the run's duration, or train for fewer steps.",
    "provider": "Check the provider's status page, then launch again.",
    "program": "The last lines of the log show what the training program reported.",
    "internal": "The last lines of the log show the cause.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunQuery:
    """Which runs to list; None does not filter.

    Attributes:
        statuses: Any of these.
        text: Part of the name, the model or the id.
    """

    statuses: Sequence[TrainingStatus] | None = None
    text: str | None = None
    project: str | None = None


_ROWS: Final = sa.select(
    *(
        jobs.c[name]
        for name in (
            *("id", "model", "job_type", "status", "suffix", "created_at", "modified_at"),
            *("started_at", "fine_tuned_model", "trained_tokens", "project", "openai", "backend"),
        )
    ),
    runs.c.status.label("run_status"),
    runs.c.version,
    documents.c.document,
).select_from(
    jobs.outerjoin(runs, runs.c.id == jobs.c.id).outerjoin(
        documents, documents.c.run_id == jobs.c.id
    )
)


def list_runs(
    connection: sa.Connection,
    filters: RunQuery,
    caller: Principal,
    *,
    after: str | None,
    limit: int,
) -> dict[str, Any]:
    """Return the runs that follow `after`, newest first; the first page has the total.

    Raises:
        HTTPProblem: `after` is no id of a run.
    """
    now = time.time()
    mine = caller.sees(jobs.c.project)
    conditions = [mine, *_conditions(filters)]
    rows = page_of(
        connection, _ROWS.where(*conditions), jobs, visible=mine, after=after, limit=limit
    )
    found: dict[str, Any] = {
        "data": [_summary(row) for row in rows[:limit]],
        "has_more": len(rows) > limit,
        "at": now,
    }
    if after is None:
        found["total"] = _total(connection, filters, caller)
    return found


def _total(connection: sa.Connection, filters: RunQuery, caller: Principal) -> int:
    """Return the number of runs; only text, and whether a run is paused, is looked for in rows."""
    conditions = [caller.sees(jobs.c.project), *_conditions(filters)]
    open_only: list[Any] = []
    total = 0
    if not filters.text:
        owners = {filters.project or None, None if caller.admin else caller.project} - {None}
        if len(owners) > 1:
            return 0
        counted = {"project": next(iter(owners), None)}
        if filters.statuses is None:
            return count_jobs(connection, counted)
        words = _words(filters.statuses) - {"RUNNING"}
        total = sum(count_jobs(connection, {**counted, "status": word}) for word in words)
        open_only = [IS_OPEN, jobs.c.status == "RUNNING"]
    joined = jobs.outerjoin(runs, runs.c.id == jobs.c.id)
    counting = sa.select(sa.func.count()).select_from(joined).where(*conditions, *open_only)
    return total + int(connection.execute(counting).scalar_one())


def summaries(connection: sa.Connection, ids: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return project and summary of each of these runs."""
    query = _ROWS.where(jobs.c.id.in_(ids))
    return [(row.project, _summary(row)) for row in connection.execute(query)]


def load_run(connection: sa.Connection, run_id: str, caller: Principal) -> dict[str, Any]:
    """Return what the page of a run shows beside its job.

    Raises:
        HTTPProblem: There is no such run for this client.
    """
    now = time.time()
    job = require_job(connection, run_id, caller)
    row = connection.execute(_ROWS.where(jobs.c.id == run_id)).one()
    found = _summary(row)
    document = json.loads(row.document) if row.document else {}
    found |= {
        "at": now,
        "failure": _failure(connection, job, document),
        "last_seen_at": document.get("last_seen_at"),
        "stale": (document.get("stale") or {}).get("message"),
        "metrics": document.get("metrics") or {},
        "cursor": last_records(connection, [run_id]).get(run_id, 0),
        "input_files": [
            *(entry["file_id"] for entry in job.training_files),
            *job.validation_files,
        ],
    }
    return found


def run_metrics(connection: sa.Connection, run_id: str, caller: Principal) -> dict[str, Any]:
    """Return the metrics of a run by name: steps and values, and the cursor to continue from.

    Raises:
        HTTPProblem: There is no such run for this client.
    """
    require_job(connection, run_id, caller)
    cursor = last_records(connection, [run_id]).get(run_id, 0)
    mine = metrics.c.run_id == run_id
    last = connection.execute(sa.select(sa.func.max(metrics.c.step)).where(mine)).scalar() or 0
    width = max(1, -(-last // MOST_POINTS))
    part = (metrics.c.step // width).label("part")
    query = (
        sa.select(
            metrics.c.name,
            sa.func.max(metrics.c.step).label("step"),
            sa.func.avg(metrics.c.value).label("value"),
        )
        .where(mine)
        .group_by(metrics.c.name, part)
        .order_by(metrics.c.name, part)
        .limit(MOST_SERIES * (MOST_POINTS + 1))
    )
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in connection.execute(query):
        steps, values = series.setdefault(row.name, ([], []))
        steps.append(row.step)
        values.append(row.value)
    return {"series": series, "steps_per_point": width, "cursor": cursor}


def records_before(
    connection: sa.Connection, run_id: str, caller: Principal, *, before: int | None, limit: int
) -> list[dict[str, Any]]:
    """Return the last records of a run's log before a cursor, oldest first.

    Raises:
        HTTPProblem: There is no such run for this client.
    """
    require_job(connection, run_id, caller)
    query = sa.select(records).where(records.c.run_id == run_id)
    if before is not None:
        query = query.where(records.c.seq < before)
    rows = connection.execute(query.order_by(records.c.seq.desc()).limit(limit)).all()
    return [_record(row) for row in reversed(rows)]


def records_after(
    connection: sa.Connection, run_id: str, *, after: int, limit: int
) -> list[dict[str, Any]]:
    """Return the records of a run's log after a cursor, oldest first."""
    query = sa.select(records).where(records.c.run_id == run_id, records.c.seq > after)
    return [_record(row) for row in connection.execute(query.order_by(records.c.seq).limit(limit))]


def last_records(connection: sa.Connection, ids: Iterable[str]) -> dict[str, int]:
    """Return the cursor of the last record of each of these runs that has one."""
    query = sa.select(records.c.run_id, sa.func.max(records.c.seq)).where(
        records.c.run_id.in_(list(ids))
    )
    rows = connection.execute(query.group_by(records.c.run_id))
    return {row[0]: row[1] for row in rows}


def _conditions(filters: RunQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if filters.statuses is not None:
        words = _words(filters.statuses)
        paused = (jobs.c.status == "RUNNING") & (runs.c.status == TrainingStatus.PAUSED)
        running: sa.ColumnElement[bool] = jobs.c.status.in_(words)
        if TrainingStatus.PAUSED in filters.statuses:
            running |= paused
        elif TrainingStatus.RUNNING in filters.statuses:
            running &= sa.not_(sa.func.coalesce(paused, sa.false()))
        conditions.append(running)
    if filters.text:
        parts = (jobs.c.id, jobs.c.model, jobs.c.suffix, jobs.c.fine_tuned_model, _NAME)
        conditions.append(
            sa.or_(*(part.icontains(filters.text, autoescape=True) for part in parts))
        )
    if filters.project:
        conditions.append(jobs.c.project == filters.project)
    return conditions


def _words(statuses: Collection[TrainingStatus]) -> frozenset[str]:
    return frozenset(word for word in JOB_STATUSES if to_status(word) in statuses)


_NAME: Final = jobs.c.openai["suffix"].as_string()


def _summary(row: Any) -> dict[str, Any]:
    run = json.loads(row.document) if row.document else {}
    status = to_status(row.status)
    if row.status == "RUNNING" and row.run_status == TrainingStatus.PAUSED:
        status = TrainingStatus.PAUSED
    values = run.get("metrics") or {}
    position = None
    if status is TrainingStatus.PENDING and row.started_at is not None:
        found = _POSITION.search(run.get("raw_status") or "")
        position = int(found[1]) if found else None
    ended = status.is_terminal
    return {
        "id": row.id,
        "name": (row.openai or {}).get("suffix") or row.suffix,
        "model": row.model,
        "method": (row.openai or {}).get("method")
        or ("classifier" if row.job_type == "classifier" else "sft"),
        "status": status.value,
        "queue_position": position,
        "project": row.project,
        "backend": row.backend,
        "created_at": row.created_at,
        "started_at": _seconds(run.get("started_at")),
        "finished_at": (_seconds(run.get("finished_at")) or row.modified_at) if ended else None,
        "step": run.get("step"),
        "total_steps": run.get("total_steps"),
        "train_loss": values.get("train_loss"),
        "valid_loss": values.get("valid_loss"),
        "fine_tuned_model": row.fine_tuned_model,
        "trained_tokens": row.trained_tokens,
    }


def _failure(
    connection: sa.Connection, job: Any, document: Mapping[str, Any]
) -> dict[str, Any] | None:
    if job.status not in {"FAILED", "FAILED_VALIDATION"}:
        return None
    event = job_events(connection, job)[-1].data
    kind = event.get("kind") or ("validation" if job.status == "FAILED_VALIDATION" else "internal")
    known = document.get("failure") or {}
    return {
        "kind": kind,
        "message": event.get("error") or "The backend gave no reason.",
        "errors": event.get("errors") or [],
        "hint": _HINTS.get(kind),
        "retryable": bool(known.get("retryable")),
    }


def _record(row: Any) -> dict[str, Any]:
    fields = json.loads(row.fields) if row.fields else {}
    numbers = {name: value for name, value in fields.items() if _is_number(value)}
    if isinstance(more := fields.get("metrics"), dict):
        numbers = {name: value for name, value in more.items() if _is_number(value)} | numbers
    return {
        "seq": row.seq,
        "at": _seconds(row.at),
        "level": row.level,
        "source": row.source,
        "step": row.step,
        "message": row.message[:_LONGEST_MESSAGE],
        "metrics": numbers if row.source in {"metrics", "checkpoint"} else {},
    }


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _seconds(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None
