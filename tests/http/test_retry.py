"""When a request is repeated, and after what time."""

import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import AuthenticationFailed, BackendUnavailable, RateLimited
from training_backends.http.retry import RetryRule, read_date_ahead, read_retry_after

BUSY = BackendUnavailable("busy")


def test_waits_grow_within_full_jitter() -> None:
    """Each wait is drawn from zero up to a bound that doubles, and is capped."""
    bounds: list[float] = []

    def jitter(low: float, high: float) -> float:
        assert low == 0.0
        bounds.append(high)
        return high

    rule = RetryRule(retry_pause=0.5, repeatable=True, attempts=12, patience=1e6, jitter=jitter)
    waits = [rule.wait for _ in range(11) if rule(BUSY)]
    assert waits == bounds
    assert bounds[:4] == [0.5, 1.0, 2.0, 4.0]
    assert bounds[-1] == 20.0
    assert rule(BUSY) is False


def test_told_pause_is_the_least() -> None:
    """What the server asked for is waited, and the jitter comes on top."""
    rule = RetryRule(
        retry_pause=0.5, repeatable=True, attempts=3, patience=60, jitter=lambda _, high: high
    )
    rule.retry_after = 7.0
    assert rule(RateLimited("slow"))
    assert rule.wait == 7.5


def test_patience_bounds_the_pause() -> None:
    """Pauses that would together outlast the patience end the attempts."""
    rule = RetryRule(retry_pause=0.5, repeatable=True, attempts=9, patience=5, retry_after=6.0)
    assert rule(BUSY) is False
    rule = RetryRule(
        retry_pause=0.5,
        repeatable=True,
        attempts=9,
        patience=5,
        retry_after=2.0,
        jitter=lambda *_: 0.0,
    )
    assert [rule(BUSY) for _ in range(3)] == [True, True, False]


def test_deadline_bounds_the_pause() -> None:
    """An attempt that could only begin when the call must be over is not made."""
    soon = time.monotonic() + 5
    rule = RetryRule(
        retry_pause=0.5, repeatable=True, attempts=9, patience=60, latest=soon, retry_after=6.0
    )
    assert rule(BUSY) is False
    rule.retry_after = 1.0
    assert rule(BUSY) is True


def test_long_attempts_do_not_use_up_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an attempt that hung for longer than all pauses may take, there is another."""
    rule = RetryRule(retry_pause=0.5, repeatable=True, attempts=3, patience=5)
    later = time.monotonic() + 1000
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert rule(BUSY) is True


@pytest.mark.parametrize(
    ("error", "repeatable", "again"),
    [
        (BUSY, True, True),
        (BUSY, False, False),
        (BackendUnavailable("no connection", sent=False), False, True),
        (BackendUnavailable("bad certificate", sent=False, retryable=False), True, False),
        (RateLimited("slow"), False, True),
        (AuthenticationFailed("who?"), True, False),
        (ValueError("ours"), True, False),
    ],
)
def test_only_lawful_requests_are_repeated(error: Exception, repeatable: bool, again: bool) -> None:
    """What may have changed something is repeated only where that does no harm."""
    rule = RetryRule(retry_pause=0.5, repeatable=repeatable, attempts=9, patience=60)
    assert (rule(error) is not False) is again


@given(st.floats(min_value=0, max_value=1e6))
def test_seconds_are_read(seconds: float) -> None:
    """A Retry-After in seconds is read as it is."""
    assert read_retry_after(str(seconds)) == seconds


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    """Whatever a server writes there, the result is a time that can be waited, or None."""
    read = read_retry_after(text)
    assert read is None or 0 <= read < math.inf


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_number_that_is_no_time_is_ignored(text: str) -> None:
    """What Python takes for a number and nobody can wait for is no pause."""
    assert read_retry_after(text) is None


def test_date_is_read() -> None:
    """A date ahead gives the seconds until then; one that is past gives zero."""
    now = datetime.now(UTC)
    ahead = read_retry_after(format_datetime(now + timedelta(seconds=60), usegmt=True))
    assert ahead is not None
    assert 55 < ahead <= 60
    assert read_retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert read_retry_after(None) is None


@given(
    st.text() | st.from_regex(r"Mon, \d\d Jan \d{4} \d\d:\d\d:\d\d [+-]\d{4,20}", fullmatch=True)
)
def test_any_header_gives_a_pause_of_a_year_at_most_or_none(value: str) -> None:
    """A server may write what it likes."""
    pause = read_retry_after(value)
    assert pause is None or 0 <= pause <= 366 * 86400
    read_date_ahead(value)
