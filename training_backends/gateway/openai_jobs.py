"""What the OpenAI API shows of a job: the job itself, its events and checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa

from training_backends.core.status import TrainingStatus
from training_backends.gateway.errors import invalid
from training_backends.gateway.job_events import (
    STATUS_EVENT,
    JobEvent,
    job_checkpoints,
    job_events,
    kept_checkpoints,
    run_document,
)
from training_backends.gateway.jobstore import checkpoint_name, model_name, require_job
from training_backends.gateway.keys import Principal
from training_backends.gateway.openai_ids import FILE, JOB, wire_id
from training_backends.gateway.store import page_of
from training_backends.protocols.mistral import status as mistral
from training_backends.protocols.openai import events
from training_backends.protocols.openai.status import to_method_type, to_wire
from training_backends.protocols.openai.wire import (
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobError,
    FineTuningJobEvent,
    StepMetrics,
)
from training_backends.store.gateway_schema import jobs
from training_backends.store.schema import metrics, runs

__all__ = ["list_openai_jobs", "openai_checkpoints", "openai_events", "openai_job"]

_MEASURED: Final = tuple(set(StepMetrics.model_fields) - {"step", "total_steps"})
_UNQUERYABLE: Final = frozenset('"\\')
"""Characters of a metadata key that the databases cannot address in a JSON path."""


# -- jobs ------------------------------------------------------------------------------


def openai_job(
    connection: sa.Connection, job_id: str, caller: Principal, organization_id: str
) -> FineTuningJob:
    """Return a job.

    Raises:
        HTTPProblem: There is no such job for this client.
    """
    row = require_job(connection, job_id, caller)
    return _job(connection, row, _run_statuses(connection, [row]), organization_id)


def list_openai_jobs(
    connection: sa.Connection,
    caller: Principal,
    organization_id: str,
    *,
    after: str | None,
    limit: int,
    metadata: Mapping[str, str] | None,
) -> tuple[list[FineTuningJob], bool]:
    """Return the jobs that follow `after`, newest first, and whether there are more.

    Args:
        metadata: Pairs that a job must have; empty: jobs without metadata; None: all jobs.

    Raises:
        HTTPProblem: `after` is no id of a job, or a key cannot be searched for.
    """
    mine = caller.sees(jobs.c.project)
    query = sa.select(jobs).where(mine, *_has_metadata(metadata))
    rows = page_of(connection, query, jobs, visible=mine, after=after, limit=limit)
    statuses = _run_statuses(connection, rows[:limit])
    shown = [_job(connection, row, statuses, organization_id) for row in rows[:limit]]
    return shown, len(rows) > limit


def _has_metadata(metadata: Mapping[str, str] | None) -> Iterator[sa.ColumnElement[bool]]:
    if metadata is None:
        return
    if not metadata:
        yield jobs.c.openai.is_(None) | jobs.c.openai["metadata"].as_string().is_(None)
    for key, value in metadata.items():
        if _UNQUERYABLE & set(key):
            raise invalid(["query", "metadata"], "A key to search for has quotes or backslashes.")
        yield jobs.c.openai["metadata", key].as_string() == value


def _run_statuses(connection: sa.Connection, rows: Sequence[Any]) -> Mapping[str, str]:
    query = sa.select(runs.c.id, runs.c.status).where(runs.c.id.in_([row.id for row in rows]))
    return {row.id: row.status for row in connection.execute(query)}


def _status(row: Any, statuses: Mapping[str, str]) -> str:
    if row.status == "QUEUED" and row.started_at is None:
        found = TrainingStatus.VALIDATING
    elif row.status == "RUNNING" and statuses.get(row.id) == TrainingStatus.PAUSED:
        found = TrainingStatus.PAUSED
    else:
        found = mistral.to_status(row.status)
    return to_wire(found) or "running"


def _job(
    connection: sa.Connection, row: Any, statuses: Mapping[str, str], organization_id: str
) -> FineTuningJob:
    status = _status(row, statuses)
    own = row.openai or {}
    method = _method_type(row)
    ended = row.status in mistral.ENDED
    numbers = _numbers(row, method, decided=status not in {"validating_files", "queued"})
    duration = (row.quote or {}).get("expected_duration_seconds")
    training_file, validation_file = _files(row)
    return FineTuningJob(
        id=wire_id(JOB, row.id),
        model=row.model,
        training_file=training_file,
        validation_file=validation_file,
        created_at=int(row.created_at),
        finished_at=int(row.modified_at) if ended else None,
        status=status,
        organization_id=organization_id,
        hyperparameters=numbers if method == "supervised" else None,
        method={"type": method, method: {"hyperparameters": numbers}},
        seed=row.hyperparameters.get("seed"),
        fine_tuned_model=row.fine_tuned_model,
        trained_tokens=row.trained_tokens,
        result_files=[wire_id(FILE, file_id) for file_id in row.result_files or ()],
        error=_error(connection, row),
        estimated_finish=int(row.started_at + duration)
        if status == "running" and duration
        else None,
        integrations=own.get("integrations") or _integrations(row),
        metadata=own.get("metadata"),
        user_provided_suffix=own.get("suffix") or row.suffix,
    )


def _files(row: Any) -> tuple[str, str | None]:
    """Return the ids of the first training file and of the first validation file."""
    validation_file = next(iter(row.validation_files), None)
    return (
        wire_id(FILE, row.training_files[0]["file_id"]),
        validation_file and wire_id(FILE, validation_file),
    )


def _method_type(row: Any) -> str:
    if row.job_type == "classifier":
        return "classifier"
    return to_method_type((row.openai or {}).get("method", "sft")) or "supervised"


def _numbers(row: Any, method: str, *, decided: bool) -> dict[str, Any]:
    """Return the hyperparameters: what was given, and the rest once the job runs."""
    own = row.openai or {"given": {}}
    known = {
        "n_epochs": _as_int(row.hyperparameters.get("epochs")),
        "batch_size": row.hyperparameters.get("batch_size"),
        "learning_rate_multiplier": 1.0,
        **({"beta": own.get("default_beta")} if method == "dpo" else {}),
    }
    shown = {
        name: value if decided and value is not None else "auto" for name, value in known.items()
    }
    return {**shown, **own["given"]}


def _as_int(epochs: float | None) -> int | float | None:
    return int(epochs) if epochs is not None and epochs == int(epochs) else epochs


def _integrations(row: Any) -> list[dict[str, Any]]:
    return [
        {"type": one["type"], "wandb": {"project": one["project"], "name": one.get("name")}}
        for one in row.integrations
    ]


def _error(connection: sa.Connection, row: Any) -> FineTuningJobError | None:
    if row.status not in {"FAILED", "FAILED_VALIDATION"}:
        return None
    data = job_events(connection, row)[-1].data
    message = data.get("error") or "The job failed."
    if row.status == "FAILED_VALIDATION":
        named = [entry for entry in data.get("errors", ()) if entry.get("file")]
        code, param = "invalid_training_file" if named else "invalid_request", None
        return FineTuningJobError(
            code=code, message=message, param="training_file" if named else param
        )
    return FineTuningJobError(code=data.get("kind", "server_error"), message=message)


# -- events ----------------------------------------------------------------------------


def openai_events(
    connection: sa.Connection, job_id: str, caller: Principal, *, after: str | None, limit: int
) -> tuple[list[FineTuningJobEvent], bool]:
    """Return the events of a job that follow `after`, newest first, and whether there are more.

    Reads only the metrics of the page.

    Raises:
        HTTPProblem: There is no such job for this client, or `after` is none of its events.
    """
    row = require_job(connection, job_id, caller)
    before, later = _messages(connection, row)
    start = _key_of(row, after)
    found: list[FineTuningJobEvent] = []
    passed = start is None
    if start is None or start in later:
        for key in reversed(later):
            if passed:
                found.append(later[key])
            passed = passed or key == start
    step = _step_of(start)
    if step is not None or start is None or start in later:
        found += _metrics(connection, row, step, limit + 1)
        passed = True
    if start is not None and not passed and start not in before:
        raise invalid(["query", "after"], f"{after} is not in this list", "unknown_id")
    for key in reversed(before):
        if passed:
            found.append(before[key])
        passed = passed or key == start
    return found[:limit], len(found) > limit


def _event(row: Any, key: str, at: float, message: str, **more: Any) -> FineTuningJobEvent:
    fields = {"level": "info", "type": "message", "data": {}, **more}
    return FineTuningJobEvent(
        id=f"{_event_prefix(row)}{key}", created_at=int(at), message=message, **fields
    )


def _event_prefix(row: Any) -> str:
    return wire_id("ftevent-", row.id) + "-"


def _key_of(row: Any, event_id: str | None) -> str | None:
    return None if event_id is None else event_id.removeprefix(_event_prefix(row))


def _step_of(key: str | None) -> int | None:
    kind, _, number = (key or "").partition("-")
    usable = kind == "step" and number.isascii() and number.isdigit() and len(number) < 19
    return int(number) if usable else None


def _messages(
    connection: sa.Connection, row: Any
) -> tuple[dict[str, FineTuningJobEvent], dict[str, FineTuningJobEvent]]:
    """Return the messages before the metrics and after them, by key, oldest first."""
    first = (
        ("created", events.created_message(wire_id(JOB, row.id))),
        ("validating", events.validating_message(*_files(row))),
    )
    before = {key: _event(row, key, row.created_at, text) for key, text in first}
    later: dict[str, FineTuningJobEvent] = {}
    into = before
    for number, event in enumerate(job_events(connection, row)):
        for key, text, level in _texts(row, event, number):
            into[key] = _event(row, key, event.at, text, level=level)
            if key == "started":
                into = later
    return before, later


def _texts(row: Any, event: JobEvent, number: int) -> Iterator[tuple[str, str, str]]:
    """Yield key, message and level of what the OpenAI API shows of an event."""
    if event.name != STATUS_EVENT:
        yield f"{event.name}-{number}", str(event.data.get("message", event.name)), "warn"
        return
    word = event.data.get("status")
    if word == "VALIDATED":
        yield "validated", events.VALIDATED, "info"
    elif word == "RUNNING":
        yield "started", events.STARTED, "info"
    elif word == "SUCCESS":
        yield "model", events.model_message(row.fine_tuned_model), "info"
        yield "completed", events.COMPLETED, "info"
    elif word == "CANCELLED":
        yield "cancelled", events.CANCELLED, "info"
    elif word in {"FAILED", "FAILED_VALIDATION"}:
        reason = str(event.data.get("error", "the backend gave no reason"))
        yield "failed", events.failed_message(reason), "error"


def _metrics(
    connection: sa.Connection, row: Any, before: int | None, limit: int
) -> Iterator[FineTuningJobEvent]:
    """Yield the metrics of the last steps before a step, newest first."""
    total = run_document(connection, row).get("total_steps")
    if row.history is not None:  # the run is deleted
        points = [(p.step, p.at, p.metrics) for p in reversed(job_checkpoints(connection, row))]
        found = [point for point in points if before is None or point[0] < before][:limit]
    else:
        found = list(_measured(connection, row.id, before, limit))
    for step, at, values in found:
        point = StepMetrics.model_validate({"step": step, "total_steps": total, **values})
        yield _event(
            row,
            f"step-{step}",
            at,
            events.metrics_message(point),
            type="metrics",
            data=events.metrics_data(point),
        )


def _measured(
    connection: sa.Connection, run_id: str, before: int | None, limit: int
) -> Iterator[tuple[int, float, dict[str, float | None]]]:
    mine = [metrics.c.run_id == run_id, metrics.c.name.in_(_MEASURED)]
    if before is not None:
        mine.append(metrics.c.step < before)
    steps = sa.select(metrics.c.step).where(*mine).distinct().order_by(metrics.c.step.desc())
    chosen = connection.execute(steps.limit(limit)).scalars().all()
    if not chosen:
        return
    mine.append(metrics.c.step.between(chosen[-1], chosen[0]))
    points: dict[int, tuple[int, float, dict[str, float | None]]] = {}
    for row in connection.execute(sa.select(metrics).where(*mine)):
        at = datetime.fromisoformat(row.at).timestamp()
        points.setdefault(row.step, (row.step, at, {}))[2][row.name] = row.value
    for step in chosen:
        yield points[step]


# -- checkpoints -----------------------------------------------------------------------


def openai_checkpoints(
    connection: sa.Connection,
    job_id: str,
    caller: Principal,
    organization_id: str,
    *,
    keeps: Callable[[Any], bool],
    after: str | None,
    limit: int,
) -> tuple[list[FineTuningJobCheckpoint], bool]:
    """Return the checkpoints that follow `after`, newest first, and whether there are more.

    Args:
        keeps: Whether a job's checkpoints can be used as models; then only those are shown that
            are still there.

    Raises:
        HTTPProblem: There is no such job for this client, or `after` is none of its checkpoints.
    """
    row = require_job(connection, job_id, caller)
    of = kept_checkpoints if row.history is None and keeps(row) else job_checkpoints
    points = of(connection, row)[::-1]
    newest = points[0].step if points else None
    prefix = wire_id("ftckpt_", row.id) + "-"
    if after is not None:
        number = after.removeprefix(prefix)
        if not (after.startswith(prefix) and _step_of(f"step-{number}") is not None):
            raise invalid(["query", "after"], f"{after} is not in this list", "unknown_id")
        points = [point for point in points if point.step < int(number)]
    name = row.fine_tuned_model or model_name(row, organization_id, row.created_at)
    shown = [
        FineTuningJobCheckpoint(
            id=f"{prefix}{point.step}",
            created_at=int(point.at),
            # As at the service, the last one has the name of the final model.
            fine_tuned_model_checkpoint=name
            if row.fine_tuned_model and point.step == newest
            else checkpoint_name(name, point.step),
            fine_tuning_job_id=wire_id(JOB, row.id),
            step_number=point.step,
            metrics=StepMetrics.model_validate({**point.metrics, "step": point.step}),
        )
        for point in points[:limit]
    ]
    return shown, len(points) > limit
