"""When the next call of an account may go: pauses asked for, calls left in this minute."""

import time
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Final

from training_backends.http.retry import read_retry_after

__all__ = ["Limiter"]

_MINUTE: Final = 60.0
_LITTLE: Final = 0.2
"""Share of a minute's calls from which on those left are spread over the rest of it."""


class Limiter:
    """What a server said of its limits; holds for every call of one account in this process.

    It may be asked from any thread and any event loop: it only says when, the caller sleeps.
    All times are those of `clock`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._told_until = 0.0
        self._held_until = 0.0
        self._is_failing = False
        self._limit = 0
        self._left: int | None = None
        self._told_left = -1
        self._renewed_at = 0.0
        self._next_at = 0.0

    @property
    def paused_until(self) -> float:
        """When the pause ends that the server asked for; in the past if there is none."""
        return self._told_until if self._clock() < self._held_until else 0.0

    @property
    def is_failing(self) -> bool:
        """Whether there is a pause because the server cannot work (503)."""
        return self._is_failing and self.paused_until > 0

    def turn(self, latest: float) -> float:
        """Return when a call may go, and count it unless that is after `latest`."""
        with self._lock:
            now = self._clock()
            at = max(now, self.paused_until)
            if self._left is None or now >= self._renewed_at:
                self._left = None
                return at
            next_at = self._next_at
            if self._left <= 0:
                # Those that wait for the next minute do not all begin with it.
                at = max(at, self._renewed_at) - self._left * _MINUTE / self._limit
            elif self._left <= self._limit * _LITTLE:
                at = max(at, self._next_at)
                next_at = at + max(0.0, self._renewed_at - at) / self._left
            if at <= latest:
                self._left -= 1
                self._next_at = next_at
            return at

    def told(self, status: int, headers: Mapping[str, str], *, longest: float) -> None:
        """Take in what an answer says of pauses and limits.

        Args:
            longest: Seconds after which a longer pause is no longer kept but asked about
                again, so that no server can silence this process for a year.
        """
        said = {name.lower(): value for name, value in headers.items()}
        pause = read_retry_after(said.get("retry-after")) if status in {429, 503} else None
        limit = _count(said.get("x-ratelimit-limit-req-minute"))
        left = _count(said.get("x-ratelimit-remaining-req-minute"))
        with self._lock:
            now = self._clock()
            if pause and now + pause > self.paused_until:
                self._told_until, self._held_until = now + pause, now + min(pause, longest)
                self._is_failing = status == 503
            if limit and left is not None:
                self._count_down(limit, left)
            if pause:
                # More exact than a minute that began who knows when.
                self._renewed_at = min(self._renewed_at, now + pause)

    def _count_down(self, limit: int, left: int) -> None:
        now = self._clock()
        known = self._left is not None and now < self._renewed_at and limit == self._limit
        if known and left <= self._told_left:
            # Calls on their way are counted here and not yet there.
            self._left = min(self._left or 0, left)
        else:
            # A new minute, or the first that is heard of one; when it ends is not said.
            self._left, self._renewed_at = left, now + _MINUTE
        self._limit, self._told_left = limit, left


def _count(text: str | None) -> int | None:
    """Read a number of calls; None for what is none."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    return int(text)
