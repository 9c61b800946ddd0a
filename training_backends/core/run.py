"""Training runs: record, state and log."""

import hashlib
import secrets
import string
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypedDict, Unpack, cast, get_args

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field

from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import ConfigError, ErrorContext, Issue, TrainingBackendError
from training_backends.core.estimate import Estimate, Money
from training_backends.core.redaction import redact
from training_backends.core.status import ON_THE_WAY, TrainingStatus, may_follow

__all__ = [
    "RUN_ID_PATTERN",
    "ChatMessage",
    "Checkpoint",
    "CleanText",
    "Failure",
    "FailureKind",
    "LogRecord",
    "LogSource",
    "Observation",
    "Place",
    "Prompt",
    "Reply",
    "RunFailed",
    "RunState",
    "Staleness",
    "TrainingRun",
    "UtcDatetime",
    "ValidationReport",
    "new_run_id",
    "provider_name",
    "run_id_from",
    "to_source",
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
    "program",
    "internal",
]
"""Why a run failed; `program` is the user's own program, `internal` a bug or this machine."""


def utc_now() -> datetime:
    """Return the current time as an aware datetime in UTC."""
    return datetime.now(UTC)


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


UtcDatetime = Annotated[AwareDatetime, AfterValidator(_to_utc)]
"""An aware datetime, converted to UTC."""


def new_run_id() -> str:
    """Return a short id that sorts by creation time: `YYMMDD-HHMMSS-xxxxxx`."""
    return f"{utc_now():%y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def run_id_from(text: str) -> str:
    """Return the run id for any text, such as the id of an orchestrator's task.

    The same for every call. A text that is a valid run id is returned unchanged; any other gets a
    suffix computed from all of it, so that different texts keep different ids.
    """
    return provider_name(text, longest=_LONGEST_ID, allowed=_ID_ALPHABET)


def provider_name(run_id: str, *, longest: int, allowed: str) -> str:
    """Return a name for a run at a provider whose names have narrower rules than run ids.

    The same for every call. An id that has to be changed gets a suffix of eight characters computed
    from the complete id, so that different ids keep different names.

    Args:
        longest: Maximum characters, at least 10.
        allowed: All characters allowed; at least ten of them letters or digits.
    """
    if run_id[:1].isalnum() and len(run_id) <= longest and all(char in allowed for char in run_id):
        return run_id
    alphabet = "".join(sorted({char for char in allowed if char.isalnum()}))
    joint = next((char for char in "-_." if char in allowed), "")
    if longest < _HASHED + 2 or len(alphabet) < _FEWEST:
        raise ValueError("a name needs at least 10 characters, of at least 10 letters or digits")
    number = int.from_bytes(hashlib.sha256(run_id.encode()).digest())
    mark = ""
    for _ in range(_HASHED):
        number, digit = divmod(number, len(alphabet))
        mark += alphabet[digit]
    kept = (char if char in allowed else char.lower() for char in run_id)
    text = "".join(char if char in allowed else joint for char in kept).lstrip("-_.")
    text = text[: longest - _HASHED - len(joint)].rstrip("-_.")
    return f"{text}{joint}{mark}" if text else mark


_LONGEST_ID: Final = 128
_ID_ALPHABET: Final = string.ascii_letters + string.digits + "._-"
_HASHED: Final = 8
"""Characters of the suffix of a changed name."""
_FEWEST: Final = 10
"""Letters and digits that a name may consist of, so that the suffix has 26 bits or more."""


CleanText = Annotated[str, AfterValidator(redact)]
"""Text from a provider or plugin, with secrets redacted."""


class Failure(BaseModel, frozen=True):
    """Why a run failed."""

    kind: FailureKind
    message: CleanText
    retryable: bool = False


class Checkpoint(BaseModel, frozen=True):
    """A checkpoint of a run with its metrics.

    Attributes:
        metrics: For example `train_loss` of that step, `mean_train_loss` since the previous
            checkpoint, `valid_loss` (nats per token) and `valid_mean_token_accuracy` (0 to 1).
        path: Directory of its files, if they are on this machine.
    """

    step: int
    at: UtcDatetime
    metrics: dict[str, float] = Field(default_factory=dict)
    path: Path | None = None


class ChatMessage(TypedDict):
    """A message of a conversation with a model."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | Sequence[ChatMessage]
"""What a model is asked: a user's message, or a conversation that ends with one."""


class Reply(BaseModel, frozen=True):
    """A trained model's response to a prompt.

    Attributes:
        answer: Generated text; None for a classifier.
        labels: For a classifier, the probability of each label by target.
    """

    answer: str | None = None
    labels: dict[str, dict[str, float]] | None = None


_FORMER_KINDS: Final = {"vanished": "not_found", "still": "stalled"}
"""Kinds as stored by earlier versions, and their names today."""


def _current_kind(kind: Any) -> Any:
    return _FORMER_KINDS.get(kind, kind) if isinstance(kind, str) else kind


class Staleness(BaseModel, frozen=True):
    """Why the record of a run may be out of date.

    Attributes:
        kind: `unreachable`: the provider cannot be reached; `not_found`: the provider does not
            have the run; `stalled`: no progress for unusually long; `elsewhere`: the run can only
            be observed from another machine or home (never stored).
        since: When this state began.
    """

    kind: Annotated[
        Literal["unreachable", "not_found", "stalled", "elsewhere"], BeforeValidator(_current_kind)
    ]
    since: UtcDatetime
    message: CleanText


class Place(BaseModel, frozen=True):
    """The only location from which a run can be observed, for backends tied to a machine.

    Attributes:
        id: Random id of the home directory; it is kept if the directory moves.
        host: Host name.
        path: Path of the home directory on that host.
    """

    id: str
    host: str
    path: Path

    def __str__(self) -> str:
        return f"{self.host}:{self.path}"


class RunState(BaseModel, frozen=True):
    """The state of a run as observed by its backend. None: unchanged or unknown.

    Attributes:
        changed_at: Time of the provider's last change to the run, by its own clock, if reported.
            If lists report it, unchanged runs need no request of their own.
        result_uri: Where the trained model is stored, for example `s3://bucket/model`.
        usage: What the provider has billed or measured, by its name, for example `gpu_seconds`.
        place: The only location from which the run can be observed; None: anywhere.
    """

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
    result_uri: CleanText | None = None
    usage: Mapping[str, Decimal] | None = None
    estimate: Estimate | None = None
    cost: Money | None = None
    changed_at: UtcDatetime | None = None
    place: Place | None = None


_IN_REPR: Final = 4
"""Most metrics in the repr of a run."""


class TrainingRun(BaseModel, frozen=True):
    """The record of a run.

    Attributes:
        id: Generated sortable id, or the caller's own.
        remote_id: The provider job id, once known.
        raw_status: The provider's own name of `status`.
        step: Optimizer steps completed.
        metrics: The latest value of each metric.
        result_model: Name or path of the trained model.
        result_uri: Where the trained model is stored, for example `s3://bucket/model`.
        usage: What the provider has billed or measured, by its name.
        resumed_from: Id of the run that this one continues.
        changed_at: Time of the provider's last change to the run, if reported.
        place: The only location from which it can be observed; None: anywhere, or unknown yet.
        last_seen_at: Time of the last successful observation.
        stale: Why the record may be out of date; None: it is up to date as of `last_seen_at`.
    """

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
    result_uri: str | None = None
    usage: Mapping[str, Decimal] = Field(default_factory=dict)
    estimate: Estimate | None = None
    cost: Money | None = None
    resumed_from: str | None = None
    changed_at: UtcDatetime | None = None
    place: Place | None = None
    last_seen_at: UtcDatetime | None = None
    stale: Staleness | None = None

    def __repr__(self) -> str:
        words = [self.id, self.backend, self.status.value]
        if self.step is not None:
            words.append(f"step {self.step}" + (f"/{self.total_steps}" if self.total_steps else ""))
        words += [f"{name}={value:.6g}" for name, value in sorted(self.metrics.items())[:_IN_REPR]]
        return f"<TrainingRun {' '.join(words)}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Return the run as a notebook shows it."""
        from training_backends.core.run_html import run_html  # noqa: PLC0415 - only in notebooks

        return run_html(self)

    def has_reached(self, status: TrainingStatus) -> bool:
        """Return whether the run has this status, or is past it by its record.

        Only the statuses up to `running` can be passed; any other has been reached only while the
        run has it.
        """
        if self.status is status or status not in ON_THE_WAY:
            return self.status is status
        if self.status in ON_THE_WAY:
            return ON_THE_WAY.index(self.status) > ON_THE_WAY.index(status)
        if self.status in {TrainingStatus.PAUSED, TrainingStatus.COMPLETED}:
            return True
        # It may have failed, or been stopped, before it was started.
        return status is TrainingStatus.PENDING or bool(self.started_at or self.step)

    def updated(self, state: RunState, *, seen_at: datetime | None = None) -> Self:
        """Return the run updated with `state`.

        A terminal run keeps its status; a contradicting status of the provider is stored in
        `raw_status` for debugging. The updated run is not stale.
        """
        changes: dict[str, Any] = {
            name: getattr(state, name)
            for name in RunState.model_fields
            if getattr(state, name) is not None
        }
        if state.metrics is not None:
            changes["metrics"] = {**self.metrics, **state.metrics}
        if state.usage is not None:
            changes["usage"] = {**self.usage, **state.usage}
        if not may_follow(self.status, state.status):
            changes = {"raw_status": state.raw_status or state.status.value}
        seen = {"last_seen_at": seen_at or utc_now(), "stale": None}
        return self.model_copy(update={**changes, **seen})


class RunFailed(TrainingBackendError):
    """A run that `run` followed has failed or was cancelled; `retryable` is that of the failure.

    Attributes:
        run: The run as it finished.
    """

    def __init__(
        self, message: str, *, run: TrainingRun | None = None, **context: Unpack[ErrorContext]
    ) -> None:
        super().__init__(message, **context)
        self.run = run

    @property
    def failure(self) -> Failure | None:
        """Why the run failed; None if it was cancelled."""
        return self.run.failure if self.run else None


LogSource = Literal["status", "event", "metrics", "checkpoint", "output", "engine", "watch"]
"""The origin of a log record; see `LogRecord`."""
_SOURCES: Final = frozenset(get_args(LogSource))


def to_source(word: str) -> LogSource:
    """Return a source by its name; any other name, as in older logs, is `output`."""
    return cast("LogSource", word) if word in _SOURCES else "output"


class LogRecord(BaseModel, frozen=True):
    """A record of a run's log.

    The source determines what happens to a record beside being shown in the log:

    | source | meaning | delivered by `watch` | numbers in `fields` with a `step` |
    | --- | --- | --- | --- |
    | `status` | the status changed; `fields` has `status` | yes | |
    | `event` | anything else that happened to the run | yes | |
    | `checkpoint` | a checkpoint was saved | yes | metrics, unless the step has its own |
    | `metrics` | measurements of a step | | metrics |
    | `output` | a line printed by the training program | | |
    | `engine` | a message of the training framework | | |
    | `watch` | noticed by the client, such as a stalled run; never from a backend | yes | |

    Attributes:
        at: When it happened; None if the provider does not report it. The store then uses the
            time of the observation, or that of the end of the run if it is earlier.
        source: See above. The client adds `status` records that a backend does not log itself.
        step: Optimizer step it belongs to, if any.
        fields: Values, for example `train_loss`; for `source="status"` at least `status`. A
            backend that logs metrics of each step puts those of a checkpoint into a field
            `metrics`, so that no metric of a step appears twice.
        cursor: Opaque; `logs(after=cursor)` returns the records after this one.
    """

    at: UtcDatetime | None = None
    level: Literal["debug", "info", "warning", "error"] = "info"
    message: str
    source: LogSource
    step: int | None = None
    fields: dict[str, Any] = Field(default_factory=dict)
    cursor: str


@dataclass(frozen=True, slots=True)
class Observation:
    """The state of a run and a part of its log, as of one moment.

    A cursor is a position in the log of one run, in a form of the backend's choice that any
    process can continue from. Observing after it returns every later record once, oldest first.

    An observation need not contain all records: with `more`, it is continued at once. The
    observation of a terminal state without `more` completes the log: `records` ends with the run's
    last record, and there are never any after `cursor`.

    Attributes:
        records: The records after the cursor that was given.
        cursor: Where the next observation continues: at or after the cursor of the last record,
            and the given cursor if nothing is new; None: the beginning.
        more: There are already records after `cursor`, which is not the given one. Use it for logs
            of any length; otherwise all records must be returned.
    """

    state: RunState
    records: tuple[LogRecord, ...] = ()
    cursor: str | None = None
    more: bool = False

    @classmethod
    async def from_newest(
        cls, state: RunState, records: AsyncGenerator[LogRecord, None], after: str | None
    ) -> Self:
        """Return the observation of a log that the provider lists newest first.

        Reads only as far as necessary.

        Raises:
            ConfigError: No record has the cursor `after`.
        """
        found: list[LogRecord] = []
        async with aclosing(records):
            async for record in records:
                if record.cursor == after:
                    break
                found.append(record)
            else:
                if after is not None:
                    raise ConfigError(f"{after[:100]!r} is not a cursor of this run.")
        return cls(state, tuple(reversed(found)), found[0].cursor if found else after)


def _clean_issues(issues: tuple[Issue, ...]) -> tuple[Issue, ...]:
    return tuple(
        replace(issue, message=redact(issue.message), fix=issue.fix and redact(issue.fix))
        for issue in issues
    )


class ValidationReport(BaseModel, frozen=True):
    """The result of validating a configuration and its data.

    Attributes:
        dataset: The inspected data, if the report comes from a client.
    """

    issues: Annotated[tuple[Issue, ...], AfterValidator(_clean_issues)] = ()
    dataset: Dataset | None = None

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that prevent a launch."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether the run can be launched."""
        return not self.errors
