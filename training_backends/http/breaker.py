"""A server that does not answer is left alone for a while, then asked by one call."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from random import SystemRandom
from threading import Lock
from typing import Final

__all__ = ["Breaker", "Refusal"]

_FAILURES: Final = 5
"""Calls in a row, each with all its attempts."""
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
_uniform = SystemRandom().uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a call is not made.

    Attributes:
        failures: Calls in a row that failed.
        since: When the first of them did.
        seconds: Until the server is asked again.
        last: What became of the last one.
    """

    failures: int
    since: datetime
    seconds: float
    last: str


class Breaker:
    """Counts the failed calls to one server; may be used from any thread and event loop.

    After several in a row, new calls are refused for a time that is drawn at random and grows
    up to a bound. Then one call is let through: if it is answered, all are.

    Args:
        patience: Seconds after which another call is let through though the one before has
            not come back; it may be an upload.
    """

    def __init__(
        self,
        *,
        patience: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = _uniform,
    ) -> None:
        self._patience = patience
        self._clock = clock
        self._jitter = jitter
        self._lock = Lock()
        self._failures = 0
        self._since = datetime.now(UTC)
        self._last = ""
        self._pauses = 0
        self._ask_at: float | None = None

    def enter(self) -> bool | Refusal:
        """Let a call through, or say why not.

        Returns:
            Whether the call is the one that tries the server; to be given to `leave`.
        """
        with self._lock:
            if self._ask_at is None:
                return False
            now = self._clock()
            if now >= self._ask_at:
                self._ask_at = now + self._patience
                return True
            return Refusal(
                failures=self._failures,
                since=self._since,
                seconds=self._ask_at - now,
                last=self._last,
            )

    def leave(self, *, trying: bool, answered: bool | None, what: str = "") -> None:
        """Take in how a call ended.

        Args:
            trying: What `enter` returned.
            answered: None if the call says nothing of the server, for it was cancelled or
                ended on this side.
            what: What became of one that was not answered.
        """
        with self._lock:
            if answered:
                self._failures = self._pauses = 0
                self._ask_at = None
            elif answered is False:
                self._count(trying=trying, what=what)
            elif trying:
                self._ask_at = self._clock()

    def _count(self, *, trying: bool, what: str) -> None:
        if self._failures == 0:
            self._since = datetime.now(UTC)
        self._failures += 1
        self._last = what
        if trying or (self._ask_at is None and self._failures >= _FAILURES):
            longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._pauses)
            self._pauses = min(self._pauses + 1, 16)
            self._ask_at = self._clock() + self._jitter(longest / 2, longest)
