"""Jobs in the database: rows, status changes and wire format."""

import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from training_backends.core.errors import (
    BackendBroken,
    ConfigError,
    DatasetError,
    Issue,
    TrainingBackendError,
)
from training_backends.core.estimate import Estimate
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.gateway.errors import not_found
from training_backends.gateway.job_events import (
    ORDER,
    STATUS_EVENT,
    JobCheckpoint,
    history,
    job_checkpoints,
    job_events,
    reached,
)
from training_backends.gateway.keys import Principal
from training_backends.protocols.mistral.status import ACTIVE
from training_backends.protocols.mistral.wire import (
    CheckpointOut,
    ClassifierDetailedJobOut,
    ClassifierJobOut,
    CompletionDetailedJobOut,
    CompletionJobOut,
    CompletionTrainingParameters,
    EventOut,
    JobMetadataOut,
    MetricOut,
)
from training_backends.store.gateway_schema import events, jobs, models
from training_backends.store.job_counts import change_counts

__all__ = [
    "CHECKPOINT_MARK",
    "JOB_DIGITS",
    "OWNER",
    "accept_start",
    "add_event",
    "advance_job",
    "base_model",
    "begins_with",
    "change_status",
    "checkpoint_name",
    "detailed_job",
    "effective",
    "error_data",
    "finish_job",
    "issue_data",
    "keep_history",
    "load_job",
    "model_name",
    "quote",
    "require_job",
    "short_job",
    "shown_notes",
]

CHECKPOINT_MARK: Final = ":ckpt-step-"
"""Between the name of a model and the step of one of its checkpoints."""
OWNER: Final = sa.func.coalesce(jobs.c.project, "")
"""Project of a job, in a query that has a better index than those by project. SQLite does not know
how many jobs a project has, and would take one of these."""
JOB_DIGITS: Final = 8
"""Characters of the job's id at the end of a model's name."""
SHOWN_ISSUES = 20
_SHOWN_PARAMETERS = frozenset({*CompletionTrainingParameters.model_fields, "batch_size"})
"""Hyperparameters of either API."""
_RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def quote(estimate: Estimate) -> JobMetadataOut:
    """Convert an estimate to the protocol's format; unknown values are null."""
    per_step = None
    if estimate.train_tokens is not None and estimate.steps:
        per_step = round(estimate.train_tokens / estimate.steps)
    duration = estimate.duration
    # The protocol's cost excludes fees; training is the first item.
    cost = estimate.costs[0].amount if estimate.costs else estimate.cost
    return JobMetadataOut(
        expected_duration_seconds=math.ceil(duration.total_seconds()) if duration else None,
        cost=float(cost.amount) if cost else None,
        cost_currency=cost.currency if cost else None,
        train_tokens_per_step=per_step,
        train_tokens=estimate.train_tokens,
        data_tokens=estimate.data_tokens,
    )


def effective(chosen: Mapping[str, Any], estimate: Estimate) -> dict[str, Any]:
    """Return the effective hyperparameters: the client's, completed with the backend's.

    Steps or epochs, whichever the client did not set, follow from the data, as at the service.
    """
    known = {"epochs": estimate.epochs, "training_steps": estimate.steps}
    known |= {
        name: value for name, value in estimate.hyperparameters.items() if name in _SHOWN_PARAMETERS
    }
    return {**{name: value for name, value in known.items() if value is not None}, **chosen}


def issue_data(issues: Sequence[Issue], names: Mapping[str, str]) -> dict[str, Any]:
    """Return event data that says why a job cannot be trained.

    Args:
        names: File names by local path; paths are not revealed to clients.
    """
    shown = [
        {
            "message": _with_names(issue.message, names),
            **({"file": names.get(issue.path, "a file")} if issue.path else {}),
            **({"line_number": issue.line} if issue.line else {}),
            **({"field": issue.field} if issue.field else {}),
            **({"fix": _with_names(issue.fix, names)} if issue.fix else {}),
        }
        for issue in issues[:SHOWN_ISSUES]
    ]
    sentences = [_sentence(entry) for entry in shown[:3]]
    if len(issues) > len(sentences):
        sentences.append(f"and {len(issues) - len(sentences)} more")
    return {"error": "; ".join(sentences), "errors": shown}


def shown_notes(notes: Sequence[str], names: Mapping[str, str]) -> str:
    """Return an estimate's notes, except those that name a run, perhaps of another project."""
    return " ".join(_with_names(note, names) for note in notes if not _RUN_ID.search(note))


def error_data(error: BaseException, names: Mapping[str, str]) -> dict[str, Any]:
    """Return event data for an error; of unexpected errors, only the type."""
    if isinstance(error, ConfigError | DatasetError) and error.issues:
        return issue_data([i for i in error.issues if i.severity == "error"], names)
    if isinstance(error, BackendBroken):
        kind = type(error.__cause__ or error).__name__
        return {"error": f"Internal error of the backend ({kind}); see the gateway's log."}
    if isinstance(error, TrainingBackendError):
        hint = f" {error.hint}" if error.hint else ""
        return {"error": _with_names(error.message + hint, names)}
    return {"error": f"Internal error of the gateway ({type(error).__name__}); see its log."}


def finish_job(
    connection: sa.Connection,
    job: Any,
    run: TrainingRun,
    organization_id: str,
    *,
    names: Mapping[str, str],
    results: Sequence[str],
) -> None:
    """Finish a job with the result of its run, and list the model of a completed one.

    Args:
        names: File names by local path.
        results: Ids of its result files.
    """
    values: dict[str, Any] = {"trained_tokens": _trained_tokens(run), "result_files": [*results]}
    data: dict[str, Any] = {}
    if run.status is TrainingStatus.COMPLETED:
        status = "SUCCESS"
        values["fine_tuned_model"] = model_name(job, organization_id, time.time())
    elif run.status is TrainingStatus.CANCELLED:
        status = "CANCELLED"
    else:
        failure = run.failure
        status = "FAILED_VALIDATION" if failure and failure.kind == "validation" else "FAILED"
        reason = failure.message if failure else "The backend gave no reason."
        data["error"] = _with_names(reason, names)
        data["kind"] = failure.kind if failure else "provider"
    ended = change_status(connection, job.id, status, only_from=ACTIVE, data=data, **values)
    if ended and status == "SUCCESS":
        _list_model(connection, job, values["fine_tuned_model"])


def model_name(job: Any, organization_id: str, finished: float) -> str:
    """Return `ft:[classifier:]<base>:<org>:<yyyymmdd>[:<suffix>]:<first 8 of the job id>`.

    Args:
        finished: In seconds since the epoch.
    """
    parts = ["ft"]
    if job.job_type == "classifier":
        parts.append("classifier")
    date = datetime.fromtimestamp(finished, UTC)
    parts += [base_model(job.model), organization_id, f"{date:%Y%m%d}"]
    if job.suffix:
        parts.append(job.suffix)
    return ":".join([*parts, job.id[:JOB_DIGITS]])


def checkpoint_name(model: str, step: int) -> str:
    """Return the name of a checkpoint of a model."""
    return f"{model}{CHECKPOINT_MARK}{step}"


def base_model(name: str) -> str:
    """Return the base model in the name of a fine-tuned model or a checkpoint, or the name."""
    kind, *parts = name.split(":")
    if kind != "ft" or not parts:
        return name
    return parts[1] if parts[0] == "classifier" and len(parts) > 1 else parts[0]


def _list_model(connection: sa.Connection, job: Any, name: str) -> None:
    connection.execute(
        models.insert().values(
            id=name,
            job_id=job.id,
            project=job.project,
            root=base_model(job.model),
            model_type=job.job_type,
            context_length=job.context_length,
            classifier_targets=job.classifier_targets,
            created_at=time.time(),
        )
    )


def _trained_tokens(run: TrainingRun) -> int | None:
    found = run.metrics.get("tokens")
    return int(found) if found is not None and math.isfinite(found) else None


def _with_names(text: str, names: Mapping[str, str]) -> str:
    for path, name in names.items():
        text = text.replace(path, name)
    return text


def _sentence(entry: Mapping[str, Any]) -> str:
    place = entry.get("file", "")
    if "line_number" in entry:
        place += f" line {entry['line_number']}"
    head = ": ".join(part for part in (place, entry.get("field")) if part)
    text = f"{entry['message']} ({entry['fix']})" if "fix" in entry else str(entry["message"])
    return f"{head}: {text}" if head else text


_UNKNOWN = {"weight_decay": None, "warmup_fraction": None, "fim_ratio": None}
"""Hyperparameters before the backend has reported its defaults. The learning rate is absent: it
must not be null on the wire, so the protocol's default is shown until then."""

DetailedJobOut = CompletionDetailedJobOut | ClassifierDetailedJobOut
JobOut = CompletionJobOut | ClassifierJobOut


def load_job(connection: sa.Connection, job_id: str) -> Any:
    """Return the row of a job, or None."""
    return connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).first()


def begins_with(digits: str) -> sa.ColumnElement[bool]:
    """Return the condition on jobs that their ids begin with some digits.

    The limits make it a range of the index, in any collation; LIKE alone reads all jobs.
    """
    first, last = (digits + str(UUID(int=end))[len(digits) :] for end in (0, 2**128 - 1))
    return jobs.c.id.between(first, last) & jobs.c.id.startswith(digits, autoescape=True)


def require_job(connection: sa.Connection, job_id: str, caller: Principal) -> Any:
    """Return the row of a job that the caller may see.

    Raises:
        HTTPProblem: There is no such job for this client.
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
    silent: bool = False,
    data: dict[str, Any] | None = None,
    **values: Any,
) -> bool:
    """Change a job's status and record an event; False if its status is not in `only_from`.

    Args:
        silent: Record no event.
        data: Event data in addition to the status.
        values: Other columns to set.
    """
    counted = (jobs.c.project, jobs.c.created_by, jobs.c.model, jobs.c.created_at, jobs.c.status)
    job = connection.execute(sa.select(*counted).where(jobs.c.id == job_id)).first()
    if job is None or job.status not in only_from:
        return False
    connection.execute(
        jobs.update()
        .where(jobs.c.id == job_id)
        .values(status=status, modified_at=time.time(), **values)
    )
    change_counts(connection, job, before=job.status, after=status)
    if not silent:
        add_event(connection, job_id, STATUS_EVENT, {"status": status, **(data or {})})
    return True


def accept_start(connection: sa.Connection, job_id: str) -> bool:
    """Queue a validated job for training, without an event, like the service."""
    return change_status(
        connection,
        job_id,
        "QUEUED",
        only_from=("VALIDATED",),
        silent=True,
        started_at=time.time(),
    )


def add_event(connection: sa.Connection, job_id: str, name: str, data: dict[str, Any]) -> None:
    """Append an event to a job, after all those that it shows."""
    shown = job_events(connection, load_job(connection, job_id))
    # A clock of the provider may be ahead.
    at = max([time.time(), *(event.at for event in shown[-1:])])
    connection.execute(events.insert().values(job_id=job_id, name=name, data=data, created_at=at))


def advance_job(connection: sa.Connection, job: Any) -> None:
    """Give a started job the status that the log of its run has reached; it never goes back."""
    status = reached(connection, job)
    before = ORDER[: ORDER.index(status)]
    change_status(connection, job.id, status, only_from=before, silent=True)


def keep_history(connection: sa.Connection, job_id: str) -> None:
    """Store what a job shows of its run, before the run is deleted."""
    kept = history(connection, load_job(connection, job_id))
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(history=kept))


def short_job(row: Any) -> JobOut:
    """Return a job in the format of list and create responses."""
    kind = ClassifierJobOut if row.job_type == "classifier" else CompletionJobOut
    return kind(**_fields(row))


def detailed_job(connection: sa.Connection, job_id: str, caller: Principal) -> DetailedJobOut:
    """Return a job with its events, oldest first, and its checkpoints, newest first.

    Raises:
        HTTPProblem: There is no such job for this client.
    """
    row = require_job(connection, job_id, caller)
    fields = {
        **_fields(row),
        "events": [
            EventOut(name=event.name, data=event.data, created_at=int(event.at))
            for event in job_events(connection, row)
        ],
        "checkpoints": [*map(_checkpoint_out, reversed(job_checkpoints(connection, row)))],
    }
    if row.job_type == "classifier":
        return ClassifierDetailedJobOut(**fields, classifier_targets=row.classifier_targets)
    return CompletionDetailedJobOut(**fields)


def _checkpoint_out(point: JobCheckpoint) -> CheckpointOut:
    return CheckpointOut(
        metrics=MetricOut(**point.metrics), step_number=point.step, created_at=int(point.at)
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
