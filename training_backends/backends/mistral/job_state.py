"""Translate jobs of the protocol: state, quote, failure and checkpoints."""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final

from training_backends.backends.mistral.prices import with_fees
from training_backends.core.estimate import CostItem, Estimate, Money, PriceSource
from training_backends.core.run import Checkpoint, Failure, FailureKind, RunState, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.protocols.mistral.status import to_status
from training_backends.protocols.mistral.wire import CheckpointOut, DetailedJob, EventOut, Job

__all__ = [
    "event_reason",
    "event_word",
    "failure_of",
    "has_started",
    "is_ending",
    "is_over",
    "metrics_of",
    "moment",
    "passes",
    "plain",
    "quote_of",
    "second",
    "short_state_of",
    "sorted_events",
    "state_of",
]

_STARTED: Final = frozenset({"STARTED", "RUNNING", "SUCCESS"})
_CHECKED: Final = frozenset({"VALIDATED", *_STARTED})
_RANK: Mapping[str, int] = MappingProxyType(
    {
        "QUEUED": 0,
        "VALIDATING": 1,
        "VALIDATED": 2,
        "FAILED_VALIDATION": 2,
        "STARTED": 3,
        "RUNNING": 4,
        "CANCELLATION_REQUESTED": 5,
        "CANCELLED": 6,
        "FAILED": 6,
        "SUCCESS": 6,
    }
)  # order of a job's life; QUEUED has an event only the first time
_LATEST: Final = 253_402_300_799
"""The last second of a datetime: the end of the year 9999."""
_HIGHEST: Final = 1e12
"""Larger amounts are not plausible prices."""
_REASON_KEYS: Final = ("error", "message", "reason", "detail", "details", "errors", "description")

_KIND_OF: Mapping[str, FailureKind] = MappingProxyType(
    {
        "out of memory": "out_of_memory",
        "quota": "quota",
        "insufficient": "quota",
        "timed out": "timeout",
        "timeout": "timeout",
        "preempt": "preempted",
    }
)  # substrings of a reason, in order of precedence


def second(time: float) -> int:
    """Convert a wire time to seconds within the range of datetime."""
    return int(min(max(time, 0), _LATEST))


def moment(time: float) -> datetime:
    """Convert a wire time to a datetime."""
    return datetime.fromtimestamp(second(time), UTC)


def plain(value: Any) -> Any:
    """Return a value without lone surrogates, which JSON allows and UTF-8 does not."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, Mapping):
        return {plain(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def sorted_events(events: Iterable[EventOut]) -> list[EventOut]:
    """Return events oldest first, whatever the order of the list.

    The service listed them newest first in 2024 and oldest first in 2025. Times are whole
    seconds; ties are broken by the order of a job's life, then by the list.
    """
    listed = list(events)
    if len(listed) > 1 and listed[0].created_at > listed[-1].created_at:
        listed.reverse()
    rank = 0
    places: list[tuple[int, int, EventOut]] = []
    for event in listed:
        rank = _RANK.get(event_word(event) or "", rank)
        places.append((event.created_at, rank, event))
    return [event for _, _, event in sorted(places, key=lambda place: place[:2])]


def event_word(event: EventOut) -> str | None:
    """Return the status that an event reports, or None."""
    word = (event.data or {}).get("status")
    return str(plain(word)) if isinstance(word, str) else None


def event_reason(event: EventOut) -> str | None:
    """Return an event's data apart from its status, as text."""
    said = [_as_text((event.data or {}).get(key)) for key in _REASON_KEYS]
    return "; ".join(text for text in said if text) or None


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return str(plain(value)).strip()
    if isinstance(value, Mapping):
        return _as_text(value.get("message") or value.get("msg") or "")
    if isinstance(value, list):
        return "; ".join(text for text in map(_as_text, value) if text)
    return ""


def has_started(job: Job) -> bool:
    """Return whether the job was started, as far as the response shows.

    QUEUED is used both before validation and after the start. The events tell them apart, or the
    quote, which does not exist before validation.
    """
    if job.status in _STARTED:
        return True
    if job.status != "QUEUED":
        return False
    events = job.events if isinstance(job, DetailedJob) else []
    words = {event_word(event) for event in events}
    quoted = job.metadata is not None and job.metadata.train_tokens is not None
    return bool(words & _CHECKED) or quoted


def is_over(job: Job) -> bool:
    """Return whether a job has finished."""
    return to_status(job.status).is_terminal


def is_ending(job: Job) -> bool:
    """Return whether a job has finished or is being cancelled."""
    return is_over(job) or to_status(job.status) is TrainingStatus.STOPPING


def short_state_of(word: str, modified_at: float) -> RunState:
    """Translate a status from a sweep over many jobs."""
    return RunState(
        status=to_status(word), raw_status=str(plain(word)), changed_at=moment(modified_at)
    )


def state_of(job: Job, *, hosted: bool = False) -> RunState:
    """Translate a job; fields that a list omits are None.

    Args:
        hosted: Whether it is a job of the provider's own service, with its fees.
    """
    status = to_status(job.status)
    detailed = job if isinstance(job, DetailedJob) else None
    events = sorted_events(detailed.events) if detailed else []
    checkpoints = _checkpoints(detailed) if detailed else None
    quote = quote_of(job, hosted=hosted)
    completed = status is TrainingStatus.COMPLETED
    return RunState(
        status=status,
        raw_status=str(plain(job.status)),
        remote_id=job.id,
        failure=failure_of(job) if status is TrainingStatus.FAILED else None,
        started_at=_first(events, _STARTED),
        finished_at=_finished_at(job, events) if status.is_terminal else None,
        step=checkpoints[-1].step if checkpoints else None,
        total_steps=_total_steps(job),
        metrics=_latest(checkpoints) if checkpoints else None,
        checkpoints=checkpoints or None,
        result_model=plain(job.fine_tuned_model),
        estimate=quote,
        cost=(quote.cost or _money(job)) if quote and completed else None,
        changed_at=moment(job.modified_at),
    )


def _first(events: list[EventOut], words: frozenset[str]) -> datetime | None:
    return next((moment(e.created_at) for e in events if event_word(e) in words), None)


def _finished_at(job: Job, events: list[EventOut]) -> datetime:
    told = [event.created_at for event in events if event_word(event) == job.status]
    return moment(told[-1] if told else job.modified_at)


def _checkpoints(job: DetailedJob) -> tuple[Checkpoint, ...]:
    newest = {entry.step_number: entry for entry in job.checkpoints}
    return tuple(
        Checkpoint(step=step, at=moment(entry.created_at), metrics=metrics_of(entry, job))
        for step, entry in sorted(newest.items())
    )


def metrics_of(checkpoint: CheckpointOut, job: Job) -> dict[str, float]:
    """Return the metrics; the service writes 0.0 for missing ones."""
    told = checkpoint.metrics.model_dump(exclude_none=True)
    # Drop NaN and infinity of a diverged loss, which JSON cannot represent.
    measured = {name: value for name, value in told.items() if math.isfinite(value)}
    if not job.validation_files or not any(
        value for name, value in measured.items() if name.startswith("valid_")
    ):
        return {name: value for name, value in measured.items() if not name.startswith("valid_")}
    return measured


def _latest(checkpoints: Iterable[Checkpoint]) -> dict[str, float]:
    return {name: value for point in checkpoints for name, value in point.metrics.items()}


def _total_steps(job: Job) -> int | None:
    if job.hyperparameters.training_steps:
        return job.hyperparameters.training_steps
    meta = job.metadata
    if meta is None or not meta.train_tokens or not meta.train_tokens_per_step:
        return None
    per_step = meta.train_tokens_per_step
    return max(1, (meta.train_tokens + per_step // 2) // per_step)


def _money(job: Job) -> Money | None:
    meta = job.metadata
    if meta is None or meta.cost is None or not meta.cost_currency:
        return None
    if not 0 <= meta.cost <= _HIGHEST:
        return None
    currency = meta.cost_currency.upper()
    if len(currency) != 3 or not (currency.isalpha() and currency.isascii()):
        return None
    return Money(amount=Decimal(str(meta.cost)), currency=currency)


def quote_of(job: Job, *, hosted: bool = False) -> Estimate | None:
    """Return the server's quote; None until it has checked the data.

    The service's quote excludes its fees, which are added as items for a `hosted` job.
    """
    meta = job.metadata
    if meta is None or (meta.train_tokens is None and not meta.cost):
        return None  # before that the service wrote null, or a cost of zero
    cost = _money(job)
    notes = ["Expected durations of the hosted service were inaccurate."] if hosted else []
    costs: tuple[CostItem, ...] = ()
    if cost is None:
        notes.append("The server quoted no price.")
    else:
        source = PriceSource(name="server quote", as_of=utc_now().date())
        costs = (CostItem(name="training", amount=cost, source=source),)
        if hosted:
            costs, note = with_fees(cost, source)
            notes.append(note)
    seconds = meta.expected_duration_seconds
    if seconds is not None and not 0 <= seconds <= _LATEST:
        seconds = None
    return Estimate(
        train_tokens=meta.train_tokens,
        data_tokens=meta.data_tokens,
        steps=_total_steps(job),
        epochs=passes(meta.train_tokens, meta.data_tokens),
        hyperparameters={
            name: value
            for name, value in plain(job.hyperparameters.model_dump(exclude_unset=True)).items()
            if value is not None
        },
        costs=costs,
        duration=None if seconds is None else timedelta(seconds=seconds),
        basis="quote",
        notes=tuple(notes),
    )


def passes(train_tokens: int | None, data_tokens: int | None) -> float | None:
    """Return the number of passes over the data; None if unknown."""
    if train_tokens is None or not data_tokens:
        return None
    try:
        return round(train_tokens / data_tokens, 4)
    except OverflowError:  # JSON integers may have thousands of digits
        return None


def failure_of(job: Job) -> Failure:
    """Return why a job failed, from its events if they contain a reason."""
    events = sorted_events(job.events) if isinstance(job, DetailedJob) else []
    reasons = [reason for event in events if (reason := event_reason(event))]
    message = "; ".join(dict.fromkeys(reasons)) or "the server gave no reason"
    if job.status == "FAILED_VALIDATION":
        return Failure(kind="validation", message=message)
    heard = message.lower()
    kind = next((kind for words, kind in _KIND_OF.items() if words in heard), "provider")
    return Failure(
        kind=kind, message=message, retryable=kind in {"provider", "timeout", "preempted"}
    )
