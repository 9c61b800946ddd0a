"""Build a run's log from a job's events, checkpoints and status."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Final, Literal

import msgspec

from training_backends.backends.mistral.job_state import (
    event_reason,
    event_word,
    metrics_of,
    moment,
    plain,
    second,
    sorted_events,
)
from training_backends.core.errors import ConfigError
from training_backends.core.run import LogRecord
from training_backends.protocols.mistral.status import to_status
from training_backends.protocols.mistral.wire import CheckpointOut, DetailedJob, EventOut

__all__ = ["LogReader"]

_KEPT: Final = 24
"""Events kept in a cursor to recognize late ones; a job has about six."""

_Level = Literal["debug", "info", "warning", "error"]


class _Position(msgspec.Struct, array_like=True):
    """A position in a log, as encoded in a cursor.

    Attributes:
        newest: Second of the newest record returned.
        events: Marks of the last events returned, in order.
        floor: Events of this second and earlier were returned, whatever their marks.
        point: Second and step of the newest checkpoint returned.
        top: Highest step returned.
        word: Last status in the log.
        unconfirmed: Statuses taken from the job itself, whose events have not arrived yet.
        status_at: Second of the job's last change when it had the last of them.
    """

    newest: int = 0
    events: list[str] = msgspec.field(default_factory=list)
    floor: int = -1
    point: tuple[int, int] = (-1, -1)
    top: int = -1
    word: str | None = None
    unconfirmed: list[str] = msgspec.field(default_factory=list)
    status_at: int = -1


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(_Position)


class LogReader:
    """Yields the records of a job that were not returned before.

    All state is in the cursor, so repeated polling yields the same records as one read at the
    end: events and checkpoints that are listed late follow with the next poll. Times are whole
    seconds, so a time alone is not a position in the log.
    """

    def __init__(self, place: _Position | None = None) -> None:
        self._at = place or _Position()

    @classmethod
    def after(cls, cursor: str | None) -> "LogReader":
        """Continue after the record with this cursor.

        Raises:
            ConfigError: The cursor is invalid.
        """
        if cursor is None:
            return cls()
        try:
            padded = cursor + "=" * (-len(cursor) % 4)
            return cls(_DECODER.decode(base64.b64decode(padded, b"-_", validate=True)))
        except (ValueError, msgspec.MsgspecError):
            raise ConfigError(
                f"Invalid log cursor {cursor!r}.",
                hint="Use the cursor of a record from the same backend.",
            ) from None

    @property
    def cursor(self) -> str:
        """The position after everything returned."""
        return base64.urlsafe_b64encode(_ENCODER.encode(self._at)).decode().rstrip("=")

    def read(self, job: DetailedJob) -> Iterator[LogRecord]:
        """Yield new records, oldest first, and advance the cursor."""
        entries = _entries(job)
        times = {mark: at for at, mark, _ in entries}
        for at, mark, entry in entries:
            if isinstance(entry, CheckpointOut):
                if self._is_new_checkpoint(at, entry.step_number):
                    yield self._checkpoint(entry, job)
            elif self._is_new_event(at, mark, times) and not self._is_repeat(entry):
                yield self._event(entry)
        status = str(plain(job.status))
        if self._at.unconfirmed[-1:] == [status]:
            return  # already reported; its event may still arrive
        if status == self._at.word:
            self._at.unconfirmed = []
        else:
            yield self._status(status, job)

    def _is_new_event(self, at: int, mark: str, times: Mapping[str, int]) -> bool:
        """Return whether an event is new, and record it."""
        place = self._at
        if at <= place.floor or mark in place.events:
            return False
        place.newest = max(place.newest, at)
        place.events.append(mark)
        latest = max(times.get(known, 0) for known in place.events)
        while len(place.events) > _KEPT and times.get(place.events[0], 0) < latest:
            place.floor = max(place.floor, times.get(place.events.pop(0), 0))
        return True

    def _is_new_checkpoint(self, at: int, step: int) -> bool:
        """Return whether a checkpoint is new, and record it.

        An earlier one that was skipped does not count: a server may list a changing selection of
        its checkpoints.
        """
        place = self._at
        if step <= place.top and (at, step) <= place.point:
            return False
        place.newest = max(place.newest, at)
        place.point = max(place.point, (at, step))
        place.top = max(place.top, step)
        return True

    def _is_repeat(self, event: EventOut) -> bool:
        """Return whether an event only repeats a status already taken from the job."""
        word = event_word(event)
        if word is None or word not in self._at.unconfirmed:
            if event.created_at > self._at.status_at:
                self._at.unconfirmed = []  # the job has changed since
            return False
        del self._at.unconfirmed[: self._at.unconfirmed.index(word) + 1]
        self._at.word = word
        return event.data == {"status": word}

    def _event(self, event: EventOut) -> LogRecord:
        word = event_word(event)
        reason = event_reason(event)
        if word is not None:
            self._at.word = word
        name = str(plain(event.name))
        return LogRecord(
            at=moment(event.created_at),
            level=_level(word),
            message=": ".join(part for part in (word or name, reason) if part),
            source="status" if word else "event",
            fields={**plain(event.data or {}), **_status_fields(word)},
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

    def _status(self, word: str, job: DetailedJob) -> LogRecord:
        """Return a record for a status without an event, which has no exact time."""
        place = self._at
        place.word = word
        place.status_at = second(job.modified_at)
        place.newest = max(place.newest, place.status_at)
        place.unconfirmed = [*place.unconfirmed[-_KEPT:], word]
        return LogRecord(
            at=moment(place.newest),
            level=_level(word),
            message=word,
            source="status",
            fields=_status_fields(word),
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
    """Return events and checkpoints, oldest first, each event with a unique mark."""
    found: list[tuple[int, str, EventOut | CheckpointOut]] = []
    copies: dict[str, int] = {}
    for event in sorted_events(job.events):
        text = json.dumps([event.created_at, event.name, event.data], sort_keys=True, default=str)
        copies[text] = copies.get(text, 0) + 1
        found.append((second(event.created_at), _mark(f"{text}{copies[text]}"), event))
    found += [
        (second(point.created_at), "", point)
        for point in sorted(job.checkpoints, key=lambda entry: entry.step_number)
    ]
    return sorted(found, key=_order)


def _order(entry: tuple[int, str, EventOut | CheckpointOut]) -> tuple[int, int]:
    """Order within a second: the start, then checkpoints, then the end."""
    at, _, what = entry
    if isinstance(what, CheckpointOut):
        return at, 1
    word = event_word(what)
    return at, 2 if word is not None and to_status(word).is_terminal else 0


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
