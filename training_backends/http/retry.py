"""When to try again and how long to wait before: full jitter, Retry-After, a bound on both."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from random import SystemRandom

from training_backends.core.errors import BackendUnavailable, RateLimited

__all__ = ["Backoff", "read_date_ahead", "read_retry_after"]

_FIRST_WAIT = 0.25
_LONGEST_WAIT = 20.0
_LONGEST_TOLD = 365 * 86400.0
"""Seconds; a longer pause is as good as for ever, and too long for a date."""


def read_retry_after(value: str | None) -> float | None:
    """Read a Retry-After header: seconds, or an HTTP date. Returns seconds from 0 to a year."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        ahead = read_date_ahead(value)
        seconds = math.nan if ahead is None else ahead.total_seconds()
    return min(max(0.0, seconds), _LONGEST_TOLD) if math.isfinite(seconds) else None


def read_date_ahead(date: str | None) -> timedelta | None:
    """Return how far an HTTP date is ahead of our clock; None if it is not a date."""
    try:
        at = parsedate_to_datetime(date or "")
        return (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
    except (ValueError, OverflowError):  # a time zone may lead out of the calendar
        return None


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Decides, for one call, whether another attempt is lawful and when.

    Attributes:
        repeatable: Whether doing the request twice does no harm.
        attempts: How often the request is sent at most.
        patience: Seconds that all pauses together may take. The attempts themselves do not
            count: one that hung for long leaves the others their chance.
        latest: When the call must be over, in the time of `time.monotonic`.
        retry_after: What the latest answer asked for, in seconds.
        wait: Seconds until the next attempt.
    """

    repeatable: bool
    attempts: int
    patience: float
    latest: float = math.inf
    jitter: Callable[[float, float], float] = field(default=SystemRandom().uniform)
    retry_after: float | None = None
    wait: float = 0.0
    _tried: int = 0
    _waited: float = 0.0

    def __call__(self, error: BaseException) -> bool:
        """Tell whether to try again after a failed attempt; `wait` is then set."""
        self._tried += 1
        if self._tried >= self.attempts or not self._is_lawful(error):
            return False
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._tried)
        self.wait = (self.retry_after or 0.0) + self.jitter(0.0, longest)
        if self._waited + self.wait >= self.patience or time.monotonic() + self.wait >= self.latest:
            return False
        self._waited += self.wait
        return True

    def _is_lawful(self, error: BaseException) -> bool:
        # A refusal for the rate, and a request that never left, changed nothing.
        if isinstance(error, RateLimited):
            return True
        if isinstance(error, BackendUnavailable) and error.retryable:
            return self.repeatable or not error.sent
        return False
