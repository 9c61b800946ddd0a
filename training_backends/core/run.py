"""A training run: its record, its states over time, its logs."""

import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue
from training_backends.core.estimate import Estimate, Money
from training_backends.core.redaction import redact
from training_backends.core.status import TrainingStatus, may_follow

__all__ = [
    "RUN_ID_PATTERN",
    "Checkpoint",
    "CleanText",
    "Failure",
    "FailureKind",
    "LogRecord",
    "Observation",
    "Place",
    "Reply",
    "RunState",
    "Staleness",
    "TrainingRun",
    "UtcDatetime",
    "ValidationReport",
    "new_run_id",
    "utc_now",
]

RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

FailureKind = Literal[
    "validation",
    "out_of_memory",
    "quota",
    "auth",
    "preempted",
    "lost",
    "timeout",
    "provider",
    "internal",
]


def utc_now() -> datetime:
    """Return the current time, aware, in UTC."""
    return datetime.now(UTC)


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
"""An aware time, kept in UTC."""


def new_run_id() -> str:
    """Make an id that sorts by creation time and can be typed: `YYMMDD-HHMMSS-xxxxxx`."""
    return f"{utc_now():%y%m%d-%H%M%S}-{secrets.token_hex(3)}"


CleanText = Annotated[str, AfterValidator(redact)]
"""Text from a provider or plugin, kept without the secrets that it may repeat."""


class Failure(BaseModel):
    """Why a run failed."""

    model_config = ConfigDict(frozen=True)

    kind: FailureKind
    message: CleanText
    retryable: bool = False


class Checkpoint(BaseModel):
    """A point that a run reached, with what was measured there.

    Attributes:
        metrics: For example `train_loss` of that step, `mean_train_loss` since the checkpoint
            before, `valid_loss` (nats a token) and `valid_mean_token_accuracy` (0 to 1).
        path: Where its files lie, when they lie on this machine.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    at: UtcDatetime
    metrics: dict[str, float] = Field(default_factory=dict)
    path: Path | None = None


class Reply(BaseModel):
    """What a trained model says to a prompt.

    Attributes:
        answer: Its text; None of a classifier.
        labels: Of a classifier, by target the probability of each label.
    """

    model_config = ConfigDict(frozen=True)

    answer: str | None = None
    labels: dict[str, dict[str, float]] | None = None


class Staleness(BaseModel):
    """Why what is known of a run may no longer be true.

    Attributes:
        kind: `unreachable`: its provider cannot be asked; `vanished`: the provider answers
            and does not know it; `still`: nothing of it has changed for unusually long;
            `elsewhere`: it can only be observed from another machine or home (never stored).
        since: When it began to be so.
    """

    model_config = ConfigDict(frozen=True)

    kind: Literal["unreachable", "vanished", "still", "elsewhere"]
    since: UtcDatetime
    message: CleanText


class Place(BaseModel):
    """Where alone a run can be observed, of a backend that keeps runs on a machine.

    Attributes:
        id: Of the home that holds the run; random, and it moves with the home.
        host: Name of the machine.
        path: Of the home, on that machine.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    host: str
    path: Path

    def __str__(self) -> str:
        return f"{self.host}:{self.path}"


class RunState(BaseModel):
    """What a backend knows of a run at one moment. None means: nothing new to say.

    Attributes:
        changed_at: When the provider last changed anything of the run, by its own clock,
            where it tells. A list that tells it spares asking for runs that stand as before.
        place: Where alone the run can be observed; None: from everywhere.
    """

    model_config = ConfigDict(frozen=True)

    status: TrainingStatus
    raw_status: CleanText | None = None
    remote_id: str | None = None
    failure: Failure | None = None
    started_at: UtcDatetime | None = None
    finished_at: UtcDatetime | None = None
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] | None = None
    checkpoints: tuple[Checkpoint, ...] | None = None
    result_model: str | None = None
    estimate: Estimate | None = None
    cost: Money | None = None
    changed_at: UtcDatetime | None = None
    place: Place | None = None


class TrainingRun(BaseModel):
    """The record of one run.

    Attributes:
        id: Ours, sortable, or the caller's own.
        remote_id: The provider's id, once there is one.
        raw_status: The provider's own word for `status`.
        step: Optimizer steps done so far.
        metrics: The latest value of each metric.
        result_model: Name or path of the finished model.
        resumed_from: Id of the run that this one continues.
        changed_at: When the provider last changed anything of it, where it tells.
        place: Where alone it can be observed; None: from everywhere, or not known yet.
        last_seen_at: When the provider was last asked and answered.
        stale: Why the record may no longer be true; None: it was seen to be.
    """

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=RUN_ID_PATTERN)
    backend: str
    config: TrainingConfig
    remote_id: str | None = None
    status: TrainingStatus = TrainingStatus.PENDING
    raw_status: str | None = None
    failure: Failure | None = None
    created_at: UtcDatetime = Field(default_factory=utc_now)
    started_at: UtcDatetime | None = None
    finished_at: UtcDatetime | None = None
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    checkpoints: tuple[Checkpoint, ...] = ()
    result_model: str | None = None
    estimate: Estimate | None = None
    cost: Money | None = None
    resumed_from: str | None = None
    changed_at: UtcDatetime | None = None
    place: Place | None = None
    last_seen_at: UtcDatetime | None = None
    stale: Staleness | None = None

    def updated(self, state: RunState, *, seen_at: datetime | None = None) -> Self:
        """Return this run with what `state` adds.

        A terminal run keeps its status; the provider's differing word is kept in
        `raw_status` so that it can be looked into. A run that was seen is not stale.
        """
        changes: dict[str, Any] = {
            name: getattr(state, name)
            for name in RunState.model_fields
            if getattr(state, name) is not None
        }
        if state.metrics is not None:
            changes["metrics"] = {**self.metrics, **state.metrics}
        if not may_follow(self.status, state.status):
            changes = {"raw_status": state.raw_status or state.status.value}
        seen = {"last_seen_at": seen_at or utc_now(), "stale": None}
        return self.model_copy(update={**changes, **seen})


class LogRecord(BaseModel):
    """One line of a run's log.

    Attributes:
        source: Who said it: `status`, `event`, `metrics`, `checkpoint`, `engine`, … The client
            adds the `status` records that a backend does not log itself.
        step: Optimizer step it belongs to, if any.
        fields: Values, for example `train_loss`; for `source="status"` at least `status`. A
            backend that tells of single steps keeps what a checkpoint is known by together,
            in a field `metrics`, so that no measure of a step comes twice.
        cursor: Opaque; `logs(after=cursor)` goes on behind this record.
    """

    model_config = ConfigDict(frozen=True)

    at: UtcDatetime
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str
    source: str
    step: int | None = None
    fields: dict[str, Any] = Field(default_factory=dict)
    cursor: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What one look at a run told.

    Attributes:
        records: The log behind the cursor that was given, oldest first.
        cursor: The place behind them, for the next look; None is the beginning.
    """

    state: RunState
    records: tuple[LogRecord, ...] = ()
    cursor: str | None = None


def _clean_issues(issues: tuple[Issue, ...]) -> tuple[Issue, ...]:
    return tuple(
        replace(issue, message=redact(issue.message), fix=issue.fix and redact(issue.fix))
        for issue in issues
    )


class ValidationReport(BaseModel):
    """What speaks against a configuration and its data, before anything is spent.

    Attributes:
        dataset: What was found in the data, where the report comes from a client.
    """

    model_config = ConfigDict(frozen=True)

    issues: Annotated[tuple[Issue, ...], AfterValidator(_clean_issues)] = ()
    dataset: Dataset | None = None

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that stop a launch."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether the run may be launched."""
        return not self.errors
