"""When to retry and how long to wait: full jitter and Retry-After, both bounded."""

import math
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from random import SystemRandom

from training_backends.core.backoff import Backoff
from training_backends.core.errors import BackendUnavailable, RateLimited

__all__ = ["RetryRule", "read_date_ahead", "read_retry_after"]

_LONGEST_WAIT = 20.0
_LONGEST_TOLD = 365 * 86400.0
"""Seconds; limits a Retry-After, so that it can be added to a date."""


def read_retry_after(value: str | None) -> float | None:
    """Parse a Retry-After header, seconds or an HTTP date, to seconds from 0 to a year."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        ahead = read_date_ahead(value)
        seconds = math.nan if ahead is None else ahead.total_seconds()
    return min(max(0.0, seconds), _LONGEST_TOLD) if math.isfinite(seconds) else None


def read_date_ahead(date: str | None) -> timedelta | None:
    """Return how far an HTTP date is ahead of the local clock; None if it is invalid."""
    try:
        at = parsedate_to_datetime(date or "")
        return (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (ValueError, OverflowError):  # a time zone may overflow the calendar
        return None


@dataclass(slots=True, kw_only=True)
class RetryRule:
    """Decides whether and when to retry one call.

    Attributes:
        repeatable: Whether the request is safe to repeat.
        attempts: Maximum number of attempts.
        retry_pause: Longest pause in seconds before the second attempt; it doubles with each
            further one.
        patience: Maximum sum of all pauses in seconds. Attempts do not count, so that one that
            hung does not prevent a retry.
        latest: Deadline of the call, in the time of `time.monotonic`.
        retry_after: Retry-After of the last response in seconds.
        wait: Seconds until the next attempt.
    """

    repeatable: bool
    attempts: int
    patience: float
    retry_pause: InitVar[float]
    latest: float = math.inf
    jitter: Callable[[float, float], float] = field(default=SystemRandom().uniform)
    retry_after: float | None = None
    wait: float = 0.0
    _backoff: Backoff = field(init=False)
    _tried: int = 0
    _waited: float = 0.0

    def __post_init__(self, retry_pause: float) -> None:
        self._backoff = Backoff(retry_pause, _LONGEST_WAIT)

    def __call__(self, error: BaseException) -> bool:
        """Return whether to retry after a failed attempt, and set `wait`."""
        self._tried += 1
        if self._tried >= self.attempts or not self._is_lawful(error):
            return False
        self.wait = (self.retry_after or 0.0) + self.jitter(0.0, self._backoff.next())
        if self._waited + self.wait >= self.patience or time.monotonic() + self.wait >= self.latest:
            return False
        self._waited += self.wait
        return True

    def begin_again(self) -> None:
        """Forget the failed attempts, because the call has come closer to its end."""
        self._tried, self._waited = 0, 0.0
        self._backoff.reset()

    def _is_lawful(self, error: BaseException) -> bool:
        # Safe: a rate-limited or never sent request changed nothing.
        if isinstance(error, RateLimited):
            return error.retryable
        if isinstance(error, BackendUnavailable) and error.retryable:
            return self.repeatable or not error.sent
        return False
