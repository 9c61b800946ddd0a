"""A job's state and log, from its events, metrics and checkpoints."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, Literal

from training_backends.backends.together.status import to_status
from training_backends.backends.together.wire import (
    NANODOLLAR,
    FineTune,
    FineTuneCheckpoint,
    FineTuneEvent,
)
from training_backends.core.errors import ConfigError
from training_backends.core.estimate import Money
from training_backends.core.run import Checkpoint, Failure, LogRecord, RunState
from training_backends.core.status import TrainingStatus

__all__ = ["FineTuneLog", "FineTunePosition", "state_of"]

_CURSOR: Final = re.compile(r"e(\d{1,9})m(\d{1,9})")
_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "train/loss": "train_loss",
        "eval/loss": "valid_loss",
        "train/learning_rate": "learning_rate",
        "train/grad_norm": "grad_norm",
    }
)
"""Metrics with a name of ours; all keys are free, and others are only changed in form."""
_STEP_KEYS: Final = ("train/global_step", "global_step", "step")
_PLACES: Final = frozenset({"global_step", "step", "epoch", "timestamp"})
"""Last part of keys that say where a row belongs."""
_LEVELS: Final[Mapping[str, Literal["warning", "error"]]] = MappingProxyType(
    {"warning": "warning", "error": "error"}
)


@dataclass(frozen=True, slots=True)
class FineTunePosition:
    """A position in a log: how many events and rows of metrics precede it."""

    events: int = 0
    metrics: int = 0

    @classmethod
    def read(cls, cursor: str | None) -> "FineTunePosition":
        """Read a cursor.

        Raises:
            ConfigError: It is not one of this backend.
        """
        if cursor is None:
            return cls()
        found = _CURSOR.fullmatch(cursor)
        if found is None:
            raise ConfigError(f"Invalid log cursor {cursor[:80]!r}.", backend="together")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"e{self.events}m{self.metrics}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneLog:
    """What is known of a job beside itself, oldest first."""

    events: Sequence[FineTuneEvent] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    checkpoints: Sequence[FineTuneCheckpoint] = field(default=())

    @property
    def end(self) -> FineTunePosition:
        """The position after all records."""
        return FineTunePosition(len(self.events), len(self.metrics))

    def records(self, after: FineTunePosition) -> Iterator[LogRecord]:
        """Yield the records after a position.

        Events and metrics only grow at their ends, so two counts are a position. They are merged
        by time; metrics without one precede the next event.
        """
        here = after
        while here.events < len(self.events) or here.metrics < len(self.metrics):
            if self._event_is_next(here):
                event = self.events[here.events]
                here = FineTunePosition(here.events + 1, here.metrics)
                yield _event_record(event, str(here))
            else:
                row = self.metrics[here.metrics]
                here = FineTunePosition(here.events, here.metrics + 1)
                yield _metrics_record(row, str(here))

    def _event_is_next(self, here: FineTunePosition) -> bool:
        if here.events >= len(self.events) or here.metrics >= len(self.metrics):
            return here.events < len(self.events)
        logged = _time_of(self.metrics[here.metrics])
        return logged is not None and self.events[here.events].created_at <= logged


def _event_record(event: FineTuneEvent, cursor: str) -> LogRecord:
    fields: dict[str, Any] = {"type": event.kind}
    if event.total_steps is not None:
        fields["total_steps"] = event.total_steps
    return LogRecord(
        at=event.created_at,
        level=_LEVELS.get((event.level or "").lower(), "info"),
        message=event.message or event.kind,
        source="checkpoint" if event.kind == "checkpoint_save" else "event",
        step=event.step,
        fields=fields,
        cursor=cursor,
    )


def _metrics_record(row: Mapping[str, Any], cursor: str) -> LogRecord:
    values = _values(row)
    return LogRecord(
        at=_time_of(row),
        message=", ".join(f"{name} {value:.4g}" for name, value in values.items()),
        source="metrics",
        step=_step_of(row),
        fields=values,
        cursor=cursor,
    )


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        _NAMES.get(key, key.replace("/", "_")): float(value)
        for key, value in row.items()
        if _is_finite(value) and key.rpartition("/")[2] not in _PLACES
    }


def _step_of(row: Mapping[str, Any]) -> int | None:
    found = next((row[key] for key in _STEP_KEYS if _is_finite(row.get(key))), None)
    return None if found is None else int(found)


def _time_of(row: Mapping[str, Any]) -> datetime | None:
    """Return when a row was logged; a timestamp in seconds is all that is known of the key."""
    found = row.get("timestamp")
    if not _is_finite(found):
        return None
    try:
        return datetime.fromtimestamp(float(found or 0), UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def state_of(job: FineTune, log: FineTuneLog | None = None) -> RunState:
    """Return the state of a job; without its log, only what the job itself has."""
    status = to_status(job.status)
    log = log or FineTuneLog()
    steps = [step for row in log.metrics if (step := _step_of(row)) is not None]
    steps += [event.step for event in log.events if event.step is not None]
    metrics: dict[str, float] = {}
    for row in log.metrics:
        metrics |= _values(row)
    return RunState(
        status=status,
        raw_status=job.status,
        remote_id=job.id,
        failure=_failure(job, log.events) if status is TrainingStatus.FAILED else None,
        started_at=job.started_at,
        finished_at=job.updated_at if status.is_terminal else None,
        step=max(steps, default=None),
        total_steps=next((e.total_steps for e in reversed(log.events) if e.total_steps), None),
        metrics=metrics or None,
        checkpoints=tuple(
            Checkpoint(step=each.step, at=each.created_at, metrics=_metrics_at(log, each.step))
            for each in log.checkpoints
        )
        or None,
        result_model=job.model_output_name if status is TrainingStatus.COMPLETED else None,
        cost=_cost(job) if status is TrainingStatus.COMPLETED else None,
        usage=None if job.token_count is None else {"token_count": Decimal(job.token_count)},
        changed_at=job.updated_at,
    )


def _metrics_at(log: FineTuneLog, step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in log.metrics:
        if _step_of(row) == step:
            found |= _values(row)
    return found


def _failure(job: FineTune, events: Sequence[FineTuneEvent]) -> Failure:
    """Return why a job failed: its last error, or at least its status."""
    errors = [event for event in events if _LEVELS.get((event.level or "").lower()) == "error"]
    errors = errors or [event for event in events if event.kind in {"job_error", "job_user_error"}]
    message = errors[-1].message if errors else f"Together reports {job.status}."
    if any(event.kind == "billing_limit" for event in events):
        return Failure(kind="quota", message=message)
    is_users = job.status.lower() == "user_error"
    return Failure(kind="validation" if is_users else "provider", message=message)


def _cost(job: FineTune) -> Money | None:
    if job.total_price is None or job.total_price < 0:
        return None
    return Money(amount=Decimal(job.total_price) / NANODOLLAR, currency="USD")
