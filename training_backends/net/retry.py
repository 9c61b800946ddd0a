"""When to try again and how long to wait before: full jitter, Retry-After, a bound on both."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import SystemRandom

from training_backends.core.errors import BackendUnavailable, RateLimited

__all__ = ["Backoff", "read_retry_after"]

_FIRST_WAIT = 0.25
_LONGEST_WAIT = 20.0


def read_retry_after(value: str | None) -> float | None:
    """Read a Retry-After header: seconds, or an HTTP date. Returns seconds, never negative."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Decides, for one call, whether another attempt is lawful and when; a stamina hook.

    Attributes:
        repeatable: Whether doing the request twice does no harm.
        attempts: How often the request is sent at most.
        patience: Seconds within which the last attempt must begin.
        retry_after: What the latest answer asked for, in seconds.
    """

    repeatable: bool
    attempts: int
    patience: float
    retry_after: float | None = None
    jitter: Callable[[float, float], float] = field(default=SystemRandom().uniform)
    _tried: int = 0
    _began: float = field(default_factory=time.monotonic)

    def __call__(self, error: Exception) -> bool | float:
        """Return the seconds to wait, or False to give up."""
        self._tried += 1
        if self._tried >= self.attempts or not self._is_lawful(error):
            return False
        longest = min(_LONGEST_WAIT, _FIRST_WAIT * 2**self._tried)
        wait = (self.retry_after or 0.0) + self.jitter(0.0, longest)
        remaining = self.patience - (time.monotonic() - self._began)
        return wait if wait < remaining else False

    def _is_lawful(self, error: Exception) -> bool:
        # A refusal for the rate, and a request that never left, changed nothing.
        if isinstance(error, RateLimited):
            return True
        if isinstance(error, BackendUnavailable) and error.retryable:
            return self.repeatable or not error.sent
        return False
