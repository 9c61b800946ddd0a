"""A log from events, checkpoints and status words: no gap, no repeat."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import ConfigError, LogRecord
from training_backends.backends.mistral.records import LogReader
from training_backends.mistral.wire import DetailedJob, read_detailed_job

WORDS = ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]


def job(status: str, *entries: dict[str, Any], newest_first: bool = False) -> DetailedJob:
    """Make a job with events and checkpoints."""
    order = -1 if newest_first else 1
    latest = max((entry["created_at"] for entry in entries), default=0)
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


@pytest.mark.parametrize("cursor", ["", "x", "1.2", "a.b.c"])
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
    """However the growth of a log is cut up, each event and checkpoint is told exactly once."""
    entries = entries_of(life)
    words = ["QUEUED"]
    reader, told = LogReader(), []
    for end in sorted({chance.randrange(len(entries) + 1) for _ in range(4)} | {len(entries)}):
        words = [entry["data"]["status"] for entry in entries[:end] if "name" in entry] or words
        told += list(reader.read(job(words[-1], *entries[:end], newest_first=newest_first)))
    steps = [record.step or 0 for record in told if record.source == "checkpoint"]
    events = [record.fields["n"] for record in told if "n" in record.fields]
    assert sorted(steps) == [n for n, (is_event, *_) in enumerate(life, 1) if not is_event]
    assert sorted(events) == [n for n, (is_event, *_) in enumerate(life, 1) if is_event]
    assert len({record.cursor for record in told}) == len(told)


@given(LIVES, st.booleans())
def test_every_cursor_gives_the_rest(life: list[tuple[bool, int, str]], newest_first: bool) -> None:
    """Resumed from any record, the log gives exactly the records behind it."""
    whole = job("SUCCESS", *entries_of(life), newest_first=newest_first)
    told = list(LogReader().read(whole))
    for index, record in enumerate(told):
        assert list(LogReader.after(record.cursor).read(whole)) == told[index + 1 :]
