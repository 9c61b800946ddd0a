"""When a request is repeated, and after what time."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import AuthenticationFailed, BackendUnavailable, RateLimited
from training_backends.net.retry import Backoff, read_retry_after

BUSY = BackendUnavailable("busy")


def test_waits_grow_within_full_jitter() -> None:
    """Each wait is drawn from zero up to a bound that doubles, and is capped."""
    bounds: list[float] = []

    def jitter(low: float, high: float) -> float:
        assert low == 0.0
        bounds.append(high)
        return high

    backoff = Backoff(repeatable=True, attempts=12, patience=1e6, jitter=jitter)
    waits = [backoff(BUSY) for _ in range(11)]
    assert waits == bounds
    assert bounds[:4] == [0.5, 1.0, 2.0, 4.0]
    assert bounds[-1] == 20.0
    assert backoff(BUSY) is False


def test_told_pause_is_the_least() -> None:
    """What the server asked for is waited, and the jitter comes on top."""
    backoff = Backoff(repeatable=True, attempts=3, patience=60, jitter=lambda _, high: high)
    backoff.retry_after = 7.0
    assert backoff(RateLimited("slow")) == 7.5


def test_patience_bounds_the_pause() -> None:
    """A pause that would outlast the patience ends the attempts."""
    backoff = Backoff(repeatable=True, attempts=9, patience=5, retry_after=6.0)
    assert backoff(BUSY) is False


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
    backoff = Backoff(repeatable=repeatable, attempts=9, patience=60)
    assert (backoff(error) is not False) is again


@given(st.floats(min_value=0, max_value=1e6))
def test_seconds_are_read(seconds: float) -> None:
    """A Retry-After in seconds is read as it is."""
    assert read_retry_after(str(seconds)) == seconds


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    """Whatever a server writes there, the result is a time that is not negative, or None."""
    read = read_retry_after(text)
    assert read is None or read >= 0 or read != read  # noqa: PLR0124  # "nan" is a number too


def test_date_is_read() -> None:
    """A date ahead gives the seconds until then; one that is past gives zero."""
    now = datetime.now(UTC)
    ahead = read_retry_after(format_datetime(now + timedelta(seconds=60), usegmt=True))
    assert ahead is not None
    assert 55 < ahead <= 60
    assert read_retry_after(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert read_retry_after(None) is None
