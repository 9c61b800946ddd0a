"""What a job's row says of its quote, its failure and its result."""

import math
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

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
from training_backends.gateway.jobstore import change_status
from training_backends.gateway.store import models
from training_backends.protocols.mistral.wire import CompletionTrainingParameters, JobMetadataOut

__all__ = [
    "NOT_ENDED",
    "effective",
    "error_data",
    "finish_job",
    "issue_data",
    "model_name",
    "quote",
    "shown_notes",
]

NOT_ENDED = ("QUEUED", "VALIDATING", "VALIDATED", "STARTED", "RUNNING", "CANCELLATION_REQUESTED")
SHOWN_ISSUES = 20
_RUN_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def quote(estimate: Estimate) -> JobMetadataOut:
    """Put an estimate into the protocol's words; what is not known is null."""
    per_step = None
    if estimate.train_tokens is not None and estimate.steps:
        per_step = round(estimate.train_tokens / estimate.steps)
    duration = estimate.duration
    # The protocol's cost leaves fees out; the training comes first among the parts.
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
    """Return a job's hyperparameters with what the backend takes where the client chose none.

    Of steps and epochs the one that was not chosen follows from the data, as at the service.
    """
    known = {"epochs": estimate.epochs, "training_steps": estimate.steps}
    known |= {
        name: value
        for name, value in estimate.hyperparameters.items()
        if name in CompletionTrainingParameters.model_fields
    }
    return {**{name: value for name, value in known.items() if value is not None}, **chosen}


def issue_data(issues: Sequence[Issue], names: Mapping[str, str]) -> dict[str, Any]:
    """Say in an event why a job cannot be trained.

    Args:
        names: File names by the path at which they lie here, which is nobody's business.
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
    """Return what an estimate notes, without what rests on a run: it may be another project's."""
    return " ".join(_with_names(note, names) for note in notes if not _RUN_ID.search(note))


def error_data(error: BaseException, names: Mapping[str, str]) -> dict[str, Any]:
    """Say in an event what stopped a job; an error that is not ours is only named."""
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
    names: Mapping[str, str],
) -> None:
    """End a job as its run ended; a finished run's model is listed from now on.

    Args:
        names: File names by path on this machine.
    """
    values: dict[str, Any] = {"trained_tokens": _trained_tokens(run)}
    data: dict[str, Any] = {}
    if run.status is TrainingStatus.COMPLETED:
        status = "SUCCESS"
        values["fine_tuned_model"] = model_name(job, organization_id, datetime.now(UTC))
    elif run.status is TrainingStatus.CANCELLED:
        status = "CANCELLED"
    else:
        failure = run.failure
        status = "FAILED_VALIDATION" if failure and failure.kind == "validation" else "FAILED"
        reason = failure.message if failure else "The backend gave no reason."
        data["error"] = _with_names(reason, names)
        data["kind"] = failure.kind if failure else "provider"
    ended = change_status(connection, job.id, status, only_from=NOT_ENDED, data=data, **values)
    if ended and status == "SUCCESS":
        _list_model(connection, job, values["fine_tuned_model"])


def model_name(job: Any, organization_id: str, finished: datetime) -> str:
    """Return `ft:[classifier:]<base>:<org>:<yyyymmdd>[:<suffix>]:<first 8 of the job id>`."""
    parts = ["ft"]
    if job.job_type == "classifier":
        parts.append("classifier")
    parts += [job.model, organization_id, f"{finished:%Y%m%d}"]
    if job.suffix:
        parts.append(job.suffix)
    return ":".join([*parts, job.id[:8]])


def _list_model(connection: sa.Connection, job: Any, name: str) -> None:
    connection.execute(
        models.insert().values(
            id=name,
            job_id=job.id,
            project=job.project,
            root=job.model,
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
