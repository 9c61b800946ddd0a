"""Translate jobs, events and checkpoints of the protocol to run states and log records."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from training_backends.core.errors import ConfigError
from training_backends.core.run import Checkpoint, Failure, FailureKind, LogRecord, RunState
from training_backends.core.status import TrainingStatus
from training_backends.protocols.openai.events import (
    STARTED,
    metrics_message,
    read_checkpoint_message,
    read_metrics,
)
from training_backends.protocols.openai.status import to_status
from training_backends.protocols.openai.wire import (
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    StepMetrics,
)

__all__ = ["JobLog", "Position", "moment", "state_of"]

_LATEST: Final = 253_402_300_799
"""The last second of a datetime: the end of the year 9999."""
_LEVELS: Mapping[str, Literal["debug", "info", "warning", "error"]] = MappingProxyType(
    {"debug": "debug", "info": "info", "warn": "warning", "warning": "warning", "error": "error"}
)
_KINDS: Mapping[str, FailureKind] = MappingProxyType(
    {
        "invalid": "validation",
        "jsonl": "validation",
        "quota": "quota",
        "insufficient": "quota",
        "billing": "quota",
        "timeout": "timeout",
    }
)
"""Kinds of failures by a part of the error's code, in order of precedence."""


def moment(seconds: int) -> datetime:
    """Convert a wire time to a datetime."""
    return datetime.fromtimestamp(min(max(seconds, 0), _LATEST), UTC)


def _plain(text: str) -> str:
    """Return a text without lone surrogates, which JSON allows and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()


def state_of(
    job: FineTuningJob, checkpoints: Sequence[FineTuningJobCheckpoint] | None = None
) -> RunState:
    """Translate a job; what only its events show is None."""
    status = to_status(job.status)
    finished = job.finished_at if status.is_terminal else None
    return RunState(
        status=status,
        raw_status=_plain(job.status),
        remote_id=job.id,
        failure=_failure(job) if status is TrainingStatus.FAILED else None,
        finished_at=None if finished is None else moment(finished),
        step=job.trained_steps,
        total_steps=job.total_steps,
        checkpoints=_checkpoints(checkpoints or ()) or None,
        result_model=_result(job, checkpoints or ()),
        usage=_usage(job),
    )


def _usage(job: FineTuningJob) -> dict[str, Decimal] | None:
    tokens = job.trained_tokens
    return None if tokens is None else {"trained_tokens": Decimal(tokens)}


def _result(job: FineTuningJob, checkpoints: Sequence[FineTuningJobCheckpoint]) -> str | None:
    """Return the model's name; Nebius' jobs name none, but their last checkpoint has an id."""
    if job.fine_tuned_model or to_status(job.status) is not TrainingStatus.COMPLETED:
        return job.fine_tuned_model and _plain(job.fine_tuned_model)
    newest = max(checkpoints, key=lambda point: point.step_number, default=None)
    return _plain(newest.fine_tuned_model_checkpoint or newest.id) if newest else None


def _checkpoints(found: Iterable[FineTuningJobCheckpoint]) -> tuple[Checkpoint, ...]:
    points = sorted(found, key=lambda point: point.step_number)
    return tuple(
        Checkpoint(
            step=point.step_number, at=moment(point.created_at), metrics=point.metrics.values()
        )
        for point in points
    )


def _failure(job: FineTuningJob) -> Failure:
    error = job.error
    if error is None:
        return Failure(kind="provider", message="the server gave no reason", retryable=True)
    code = (error.code or "").lower()
    kind = next((kind for part, kind in _KINDS.items() if part in code), "provider")
    message = error.message or error.code or "the server gave no reason"
    if error.code and error.code not in message:
        message = f"{message} ({error.code})"
    return Failure(kind=kind, message=_plain(message), retryable=kind in {"provider", "timeout"})


# -- log -------------------------------------------------------------------------------


class Position(msgspec.Struct, array_like=True, frozen=True):
    """A position in a log, as encoded in a cursor.

    Attributes:
        at: Second of the last event returned.
        event: Its id.
        has_metrics: Whether an event up to here had metrics.
        rows: Rows of the result file returned.
    """

    at: int = -1
    event: str = ""
    has_metrics: bool = False
    rows: int = 0

    @classmethod
    def read(cls, cursor: str | None) -> "Position":
        """Decode a cursor.

        Raises:
            ConfigError: It is invalid.
        """
        if cursor is None:
            return cls()
        try:
            padded = cursor + "=" * (-len(cursor) % 4)
            return msgspec.json.decode(base64.b64decode(padded, b"-_", validate=True), type=cls)
        except (ValueError, msgspec.MsgspecError):
            raise ConfigError(
                f"Invalid log cursor {cursor!r}.",
                hint="Use the cursor of a record from the same backend.",
            ) from None

    def __str__(self) -> str:
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    def is_before(self, event: FineTuningJobEvent) -> bool:
        """Return whether an event of a list, read from its newest, is still new."""
        return event.id != self.event and event.created_at >= self.at


@dataclass(slots=True)
class JobLog:
    """Builds the records after a position, and collects what the state takes from them.

    Attributes:
        position: The position after everything returned.
    """

    position: Position
    started_at: datetime | None = None
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def records(self, events: Iterable[FineTuningJobEvent]) -> Iterator[LogRecord]:
        """Yield the records of new events, given oldest first."""
        for event in events:
            metrics = read_metrics(event)
            point = read_checkpoint_message(event.message)
            if event.message == STARTED:
                self.started_at = self.started_at or moment(event.created_at)
            self.position = Position(
                event.created_at, event.id, self.position.has_metrics or metrics is not None
            )
            if metrics is not None:
                self._measured(metrics)
            elif point is not None:
                self.step = max(self.step or 0, point[0])
            yield LogRecord(
                at=moment(event.created_at),
                level=_LEVELS.get(event.level, "info"),
                message=_plain(event.message),
                source="metrics" if metrics else "checkpoint" if point else "event",
                step=metrics.step if metrics else point[0] if point else None,
                fields=_fields(event, metrics, point),
                cursor=str(self.position),
            )

    def results(self, rows: Sequence[StepMetrics], at: datetime) -> Iterator[LogRecord]:
        """Yield the new rows of the result file, for a job whose events had no metrics."""
        for row in rows[self.position.rows :]:
            self.position = msgspec.structs.replace(self.position, rows=self.position.rows + 1)
            self._measured(row)
            yield LogRecord(
                at=at,
                message=metrics_message(row),
                source="metrics",
                step=row.step,
                fields=dict(row.values()),
                cursor=str(self.position),
            )

    def _measured(self, metrics: StepMetrics) -> None:
        self.step = metrics.step
        self.total_steps = metrics.total_steps or self.total_steps
        self.metrics |= metrics.values()

    def add_to(self, state: RunState) -> RunState:
        """Return the state with what the new events showed."""
        found = {
            "started_at": self.started_at,
            "step": self.step,
            "total_steps": self.total_steps,
            "metrics": self.metrics or None,
        }
        known = {name: value for name, value in found.items() if value is not None}
        return state.model_copy(update=known)


def _fields(
    event: FineTuningJobEvent,
    metrics: StepMetrics | None,
    point: tuple[int, str | None] | None,
) -> dict[str, Any]:
    if metrics is not None:
        return dict(metrics.values())
    if point is not None:
        return {"model": _plain(point[1])} if point[1] else {}
    return {_plain(name): value for name, value in (event.data or {}).items()}
