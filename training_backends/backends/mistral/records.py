"""A run's log made from what the protocol tells: events, checkpoints and status words."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from training_backends.backends.mistral.states import (
    event_reason,
    event_word,
    metrics_of,
    moment,
    sorted_events,
)
from training_backends.core.errors import ConfigError
from training_backends.core.run import LogRecord
from training_backends.mistral.status import to_status
from training_backends.mistral.wire import CheckpointOut, DetailedJob, EventOut

__all__ = ["LogReader"]

_Level = Literal["debug", "info", "warning", "error"]


@dataclass(slots=True, kw_only=True)
class LogReader:
    """Knows which records were given out, and yields the others.

    Times are whole seconds, so a time alone is no place in the log: a cursor holds the
    second, what was given out of it and the last status told.

    Attributes:
        second: Of the newest record given out.
        told: Marks of the records of that second.
        word: Status word that was told last.
        by_job: Whether that word came from the job itself, no event having told it.
    """

    second: int = 0
    told: set[str] = field(default_factory=set)
    word: str | None = None
    by_job: bool = False
    _seen: set[str] | None = None
    _step: int = 0

    @classmethod
    def after(cls, cursor: str | None) -> "LogReader":
        """Go on behind the record with this cursor.

        Raises:
            ConfigError: It is no cursor of this backend.
        """
        if cursor is None:
            return cls()
        try:
            second, told, word = cursor.split(".", 2)
            return cls(
                second=int(second),
                told=set(filter(None, told.split("-"))),
                word=word.removeprefix("~") or None,
                by_job=word.startswith("~"),
            )
        except ValueError:
            raise ConfigError(
                f"{cursor!r} is not a cursor of this log.",
                hint="Take the cursor of a record that the same backend gave out.",
            ) from None

    @property
    def cursor(self) -> str:
        """The place behind the newest record given out."""
        word = f"{'~' if self.by_job else ''}{self.word or ''}"
        return f"{self.second}.{'-'.join(sorted(self.told))}.{word}"

    def read(self, job: DetailedJob) -> Iterator[LogRecord]:
        """Yield what is new, oldest first, and remember it."""
        entries = _entries(job)
        if self._seen is None:
            self._seen = {
                mark
                for at, mark, _ in entries
                if at < self.second or (at == self.second and mark in self.told)
            }
        for at, mark, entry in entries:
            if mark in self._seen:
                continue
            self._seen.add(mark)
            if isinstance(entry, CheckpointOut):
                if at < self.second and entry.step_number < self._step:
                    continue  # a server that shows a choice of its checkpoints chose anew
                self._step = max(self._step, entry.step_number)
                self._advance(at, mark)
                yield self._checkpoint(entry, job)
                continue
            self._advance(at, mark)
            if not self._is_repeat(entry):
                yield self._event(entry)
        if job.status != self.word:
            self.word, self.by_job = job.status, True
            yield self._status(job)

    def _is_repeat(self, event: EventOut) -> bool:
        """Tell whether an event says only what the job's own status said before it."""
        return self.by_job and event.data == {"status": self.word}

    def _advance(self, at: int, mark: str) -> None:
        if at > self.second:
            self.second, self.told = at, set()
        if at == self.second:
            self.told.add(mark)

    def _event(self, event: EventOut) -> LogRecord:
        word = event_word(event)
        reason = event_reason(event)
        if word is not None:
            self.word, self.by_job = word, False
        return LogRecord(
            at=moment(event.created_at),
            level=_level(word),
            message=": ".join(part for part in (word or event.name, reason) if part),
            source="status" if word else "event",
            fields={**(event.data or {}), **_status_fields(word)},
            cursor=self.cursor,
        )

    def _checkpoint(self, point: CheckpointOut, job: DetailedJob) -> LogRecord:
        metrics = metrics_of(point, job)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        return LogRecord(
            at=moment(point.created_at),
            message=f"checkpoint at step {point.step_number}" + (f": {values}" if values else ""),
            source="checkpoint",
            step=point.step_number,
            fields=dict(metrics),
            cursor=self.cursor,
        )

    def _status(self, job: DetailedJob) -> LogRecord:
        """Tell of a status that no event told of; it has no place of its own in time."""
        return LogRecord(
            at=moment(max(job.modified_at, self.second)),
            level=_level(job.status),
            message=job.status,
            source="status",
            fields=_status_fields(job.status),
            cursor=self.cursor,
        )


def _status_fields(word: str | None) -> dict[str, str]:
    return {} if word is None else {"status": to_status(word).value, "raw_status": word}


def _level(word: str | None) -> _Level:
    if word in {"FAILED", "FAILED_VALIDATION"}:
        return "error"
    if word is not None and to_status(word).value in {"cancelled", "unknown"}:
        return "warning"
    return "info"


def _entries(job: DetailedJob) -> list[tuple[int, str, EventOut | CheckpointOut]]:
    """Return everything that has a time, oldest first, each with a mark of its own."""
    found: list[tuple[int, str, EventOut | CheckpointOut]] = []
    copies: dict[str, int] = {}
    for event in sorted_events(job.events):
        text = json.dumps([event.created_at, event.name, event.data], sort_keys=True, default=str)
        copies[text] = copies.get(text, 0) + 1
        found.append((event.created_at, _mark(f"{text}{copies[text]}"), event))
    found += [
        (point.created_at, _mark(f"checkpoint {point.step_number}"), point)
        for point in sorted(job.checkpoints, key=lambda entry: entry.step_number)
    ]
    return sorted(found, key=_place)


def _place(entry: tuple[int, str, EventOut | CheckpointOut]) -> tuple[int, int]:
    """Order within a second: a start, then its checkpoints, then the end."""
    at, _, what = entry
    if isinstance(what, CheckpointOut):
        return at, 1
    word = event_word(what)
    return at, 2 if word is not None and to_status(word).is_terminal else 0


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
