"""Rate limits, shared by all clients of an account."""

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from threading import Lock
from typing import Final

from pydantic import SecretStr

from training_backends.http.retry import read_retry_after

__all__ = ["Limiter", "forget_limits", "limiter_of"]

_MINUTE: Final = 60.0
_LITTLE: Final = 0.2
"""Used share of a minute's calls above which the remaining calls are spread over the minute."""


class Limiter:
    """Rate limits reported by a server, for all calls of one account in this process.

    Safe across threads and event loops: it only returns times, and the caller sleeps. All times
    are those of `clock`.
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
        """When the pause requested by the server ends; in the past if there is none."""
        return self._told_until if self._clock() < self._held_until else 0.0

    @property
    def is_failing(self) -> bool:
        """Whether the current pause is due to a 503."""
        return self._is_failing and self.paused_until > 0

    def turn(self, latest: float) -> float:
        """Return when a call may start, and count it unless that is after `latest`."""
        with self._lock:
            now = self._clock()
            at = max(now, self.paused_until)
            if self._left is None or now >= self._renewed_at:
                self._left = None
                return at
            next_at = self._next_at
            if self._left <= 0:
                # Spread the calls that wait for the next minute.
                at = max(at, self._renewed_at) - self._left * _MINUTE / self._limit
            elif self._left <= self._limit * _LITTLE:
                at = max(at, self._next_at)
                next_at = at + max(0.0, self._renewed_at - at) / self._left
            if at <= latest:
                self._left -= 1
                self._next_at = next_at
            return at

    def told(self, status: int, headers: Mapping[str, str], *, longest: float) -> None:
        """Update pauses and limits from a response.

        Args:
            longest: Maximum pause in seconds; after it, the server is asked again, so that no
                response can block this process for a year.
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
                # More exact than a minute with an unknown start.
                self._renewed_at = min(self._renewed_at, now + pause)

    def _count_down(self, limit: int, left: int) -> None:
        now = self._clock()
        known = self._left is not None and now < self._renewed_at and limit == self._limit
        if known and left <= self._told_left:
            # Calls in flight are counted here but not yet by the server.
            self._left = min(self._left or 0, left)
        else:
            # A new minute, or the first response; its end is unknown.
            self._left, self._renewed_at = left, now + _MINUTE
        self._limit, self._told_left = limit, left


def _count(text: str | None) -> int | None:
    """Parse a number of calls; None if invalid."""
    if text is None or not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    return int(text)


def limiter_of(base_url: str, key: SecretStr | None) -> Limiter:
    """Return this process's limiter for a key and server, shared by all callers."""
    digest = "" if key is None else hashlib.sha256(key.get_secret_value().encode()).hexdigest()
    with _making:
        return _limiter(base_url, digest)


def forget_limits() -> None:
    """Give the clients that are made from now on new limiters."""
    with _making:
        _limiter.cache_clear()


# Module state, because limits belong to the server, not to a client: clients with the same key
# share them, even one after the other. A client keeps its limiter after it leaves the cache.
_making = Lock()


@lru_cache(maxsize=64)
def _limiter(base_url: str, digest: str) -> Limiter:
    del base_url, digest
    return Limiter()
