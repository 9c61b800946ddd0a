"""A log from events, checkpoints and status words: no gap, no repeat."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import ConfigError, LogRecord
from training_backends.backends.mistral.job_log import LogReader
from training_backends.protocols.mistral.wire import DetailedJob, read_detailed_job

WORDS = ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]


def job(
    status: str, *entries: dict[str, Any], newest_first: bool = False, modified_at: int = 0
) -> DetailedJob:
    """Make a job with events and checkpoints."""
    order = -1 if newest_first else 1
    latest = max((entry["created_at"] for entry in entries), default=modified_at)
    return read_detailed_job(
        {
            "id": "j",
            "model": "m",
            "status": status,
            "created_at": 0,
            "modified_at": latest,
            "training_files": [],
            "job_type": "completion",
            "hyperparameters": {},
            "events": [entry for entry in entries if "name" in entry][::order],
            "checkpoints": [entry for entry in entries if "metrics" in entry][::order],
        }
    )


def event(word: str, at: int, **data: Any) -> dict[str, Any]:
    """Make an event."""
    return {"name": "status-updated", "data": {"status": word, **data}, "created_at": at}


def point(step: int, at: int) -> dict[str, Any]:
    """Make a checkpoint."""
    return {"step_number": step, "metrics": {"train_loss": 1 / step}, "created_at": at}


def messages(records: list[LogRecord]) -> list[str]:
    """Return what was said."""
    return [record.message for record in records]


@pytest.mark.parametrize("newest_first", [True, False])
def test_whole_life_is_told(newest_first: bool) -> None:
    """Events and checkpoints come out by time, whichever way they are listed."""
    life = [event(word, 10 * n) for n, word in enumerate(WORDS)]
    told = LogReader().read(
        job("SUCCESS", *life, point(1, 31), point(2, 35), newest_first=newest_first)
    )
    assert messages(list(told)) == [
        "QUEUED",
        "VALIDATING",
        "VALIDATED",
        "RUNNING",
        "checkpoint at step 1: train_loss 1",
        "checkpoint at step 2: train_loss 0.5",
        "SUCCESS",
    ]


def test_records_carry_their_values() -> None:
    """A status has our word and the provider's; a checkpoint its step and metrics."""
    failed = event("FAILED_VALIDATION", 1, error="line 3")
    status, final = LogReader().read(job("FAILED_VALIDATION", event("QUEUED", 0), failed))
    assert status.fields == {"status": "pending", "raw_status": "QUEUED"}
    assert (final.level, final.message) == ("error", "FAILED_VALIDATION: line 3")
    assert final.fields["error"] == "line 3"
    told = list(LogReader().read(job("RUNNING", event("RUNNING", 0), point(4, 1))))
    assert (told[1].step, told[1].fields) == (4, {"train_loss": 0.25})


def test_status_without_an_event_is_told_once() -> None:
    """QUEUED after the start, which no event tells, is told once, and so is what follows."""
    reader = LogReader()
    before = [event(word, n) for n, word in enumerate(WORDS[:3])]
    assert messages(list(reader.read(job("VALIDATED", *before)))) == WORDS[:3]
    assert messages(list(reader.read(job("QUEUED", *before)))) == ["QUEUED"]
    assert list(reader.read(job("QUEUED", *before))) == []
    after = [*before, event("RUNNING", 9)]
    assert messages(list(reader.read(job("RUNNING", *after)))) == ["RUNNING"]


def test_event_that_comes_late_is_no_repeat() -> None:
    """An event that only repeats the word told before it came is left out; a reason is not."""
    reader = LogReader()
    assert messages(list(reader.read(job("RUNNING")))) == ["RUNNING"]
    assert list(reader.read(job("RUNNING", event("RUNNING", 5)))) == []
    assert messages(list(reader.read(job("FAILED", event("RUNNING", 5))))) == ["FAILED"]
    late = job("FAILED", event("RUNNING", 5), event("FAILED", 6, error="why"))
    assert messages(list(reader.read(late))) == ["FAILED: why"]


def test_checkpoint_in_the_second_of_the_cursor_is_told() -> None:
    """What appears within the second already told is neither lost nor repeated."""
    first = list(LogReader().read(job("RUNNING", event("RUNNING", 5), point(1, 5))))
    more = job("RUNNING", event("RUNNING", 5), point(1, 5), point(2, 5), point(3, 6))
    told = list(LogReader.after(first[-1].cursor).read(more))
    assert [record.step for record in told] == [2, 3]


def look(cursor: str | None, shown: DetailedJob) -> tuple[list[str], str]:
    """Look once, with nothing known but a cursor; return what was said and the next cursor."""
    reader = LogReader.after(cursor)
    return messages(list(reader.read(shown))), reader.cursor


def test_checkpoint_that_is_listed_late_is_told() -> None:
    """A checkpoint older than the newest event comes with the next look, and only then."""
    told, cursor = look(None, job("CANCELLATION_REQUESTED", event("CANCELLATION_REQUESTED", 20)))
    late = job("CANCELLATION_REQUESTED", event("CANCELLATION_REQUESTED", 20), point(1, 15))
    told, cursor = look(cursor, late)
    assert told == ["checkpoint at step 1: train_loss 1"]
    assert look(cursor, late) == ([], cursor)


def test_event_that_is_listed_late_is_told() -> None:
    """An event older than one already told comes with the next look, and only then."""
    _, cursor = look(None, job("RUNNING", event("QUEUED", 1), event("RUNNING", 20)))
    late = job("RUNNING", event("QUEUED", 1), event("VALIDATED", 5), event("RUNNING", 20))
    told, cursor = look(cursor, late)
    assert told[0] == "VALIDATED"
    assert look(cursor, late) == ([], cursor)


def test_events_behind_the_status_repeat_nothing() -> None:
    """Where events lag behind the job's own word, each word is told once, in order."""
    told, cursor = look(None, job("RUNNING", modified_at=2))
    more, cursor = look(cursor, job("FAILED", modified_at=3))
    told += more
    lagging = [event("VALIDATED", 1), event("RUNNING", 2), event("FAILED", 3)]
    for end in (1, 2, 3):
        more, cursor = look(cursor, job("FAILED", *lagging[:end]))
        told += more
    assert told == ["RUNNING", "FAILED", "VALIDATED"]


def test_word_that_comes_back_is_told_again() -> None:
    """A status without an event is told each time that the job returns to it."""
    told, cursor = look(None, job("QUEUED", event("VALIDATED", 3)))
    more, _ = look(cursor, job("QUEUED", event("VALIDATED", 3), event("RUNNING", 9)))
    assert (told, more) == (["VALIDATED", "QUEUED"], ["RUNNING", "QUEUED"])


def test_steps_that_begin_again_are_told() -> None:
    """After a start anew from an earlier step, its checkpoints are told by their later time."""
    before = [point(1, 10), point(2, 20), point(3, 30)]
    _, cursor = look(None, job("RUNNING", event("RUNNING", 0), *before))
    again = job("RUNNING", event("RUNNING", 0), *before, point(2, 50), point(3, 50))
    told, cursor = look(cursor, again)
    assert told == [
        "checkpoint at step 2: train_loss 0.5",
        "checkpoint at step 3: train_loss 0.3333",
    ]
    assert look(cursor, again) == ([], cursor)


def test_cursor_stays_short() -> None:
    """However many events a job has, a cursor has a bound, and nothing is lost or repeated."""
    life = [event("RUNNING", n // 2, n=n) for n in range(400)]
    told, cursor = look(None, job("RUNNING", *life))
    assert len(told) == 400
    assert len(cursor) < 500
    assert look(cursor, job("RUNNING", *life)) == ([], cursor)
    more = job("RUNNING", *life, event("RUNNING", 199, n=400), event("RUNNING", 300, n=401))
    assert len(look(cursor, more)[0]) == 2


def test_older_checkpoints_do_not_come_after_newer_ones() -> None:
    """Where a server shows a changing choice of checkpoints, those told only go forward."""
    reader = LogReader()
    steps: list[int | None] = []
    for chosen in ([1, 2], [1, 4], [1, 2, 3, 6], [5, 6, 7]):
        shown = job("RUNNING", event("RUNNING", 0), *(point(step, 10 * step) for step in chosen))
        steps += [record.step for record in reader.read(shown) if record.source == "checkpoint"]
    assert steps == [1, 2, 4, 6, 7]


def test_unknown_word_is_a_warning() -> None:
    """A word never heard of is told as it is, as a warning."""
    (record,) = LogReader().read(job("PAUSED"))
    assert (record.level, record.message, record.fields["status"]) == (
        "warning",
        "PAUSED",
        "unknown",
    )


@pytest.mark.parametrize("cursor", ["", "x", "1.2", "a.b.c", "WyJhIl0", "\u20ac"])
def test_foreign_cursor_is_refused(cursor: str) -> None:
    """A cursor that this log did not give out is an error, not the beginning."""
    with pytest.raises(ConfigError, match="cursor"):
        LogReader.after(cursor)


LIVES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 2), st.sampled_from(["RUNNING", "PAUSED", "NEW.WORD"])),
    max_size=12,
)


def entries_of(life: list[tuple[bool, int, str]]) -> list[dict[str, Any]]:
    """Turn kinds, gaps in time and words into events and checkpoints."""
    at, entries = 100, []
    for step, (is_event, gap, word) in enumerate(life, start=1):
        at += gap
        entries.append(event(word, at, n=step) if is_event else point(step, at))
    return entries


@given(LIVES, st.booleans(), st.randoms(use_true_random=False))
def test_looking_often_tells_the_same_as_looking_once(
    life: list[tuple[bool, int, str]], newest_first: bool, chance: random.Random
) -> None:
    """However a log is cut up, and whatever is listed late, each entry is told exactly once."""
    entries = entries_of(life)
    whole = job("SUCCESS", *entries, newest_first=newest_first)
    # When each entry is listed: mostly in order, sometimes far too late; steps never backwards.
    looks = sorted(chance.choices(range(6), k=len(entries)))
    for number, entry in enumerate(entries):
        if "name" in entry and chance.random() < 0.3:
            looks[number] = 5
    cursor: str | None = None
    told: list[LogRecord] = []
    for now in range(6):
        shown = [entry for entry, at in zip(entries, looks, strict=True) if at <= now]
        reader = LogReader.after(cursor)
        told += reader.read(job("SUCCESS" if now == 5 else "RUNNING", *shown))
        cursor = reader.cursor
    once = list(LogReader().read(whole))
    assert sorted(_said(told)) == sorted(_said(once))
    assert len({record.cursor for record in told}) == len(told)
    assert LogReader.after(cursor).cursor == cursor


def _said(records: list[LogRecord]) -> list[tuple[str, int]]:
    """Return which events and checkpoints were told, by their numbers."""
    return [
        (record.source, record.step or record.fields["n"])
        for record in records
        if record.source == "checkpoint" or "n" in record.fields
    ]


@given(LIVES, st.booleans())
def test_every_cursor_gives_the_rest(life: list[tuple[bool, int, str]], newest_first: bool) -> None:
    """Resumed from any record, the log gives exactly the records behind it."""
    whole = job("SUCCESS", *entries_of(life), newest_first=newest_first)
    told = list(LogReader().read(whole))
    for index, record in enumerate(told):
        assert list(LogReader.after(record.cursor).read(whole)) == told[index + 1 :]
