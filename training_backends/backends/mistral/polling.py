"""How often to look, and how long to bear with a server that is away."""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from training_backends.core.errors import BackendUnavailable, RateLimited

__all__ = ["Pace", "ask_patiently"]

_T = TypeVar("_T")
_SLOWER = 1.4


class Pace:
    """Rests between two looks: short after something changed, longer the longer nothing does."""

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = max(shortest, longest)
        self._next = shortest

    def quicken(self) -> None:
        """Something changed: look again soon."""
        self._next = self._shortest

    async def rest(self, at_least: float = 0.0) -> None:
        """Wait, and longer the next time."""
        await anyio.sleep(max(self._next, at_least))
        self._next = min(self._longest, self._next * _SLOWER)


async def ask_patiently(ask: Callable[[], Awaitable[_T]], pace: Pace, patience: float) -> _T:
    """Ask until an answer comes.

    Args:
        patience: Seconds after which the trouble is reported.

    Raises:
        BackendUnavailable: The server stayed away.
        RateLimited: It asked for pauses all the time.
    """
    began = time.monotonic()
    while True:
        try:
            return await ask()
        except (BackendUnavailable, RateLimited) as error:
            pause = error.retry_after or 0.0 if isinstance(error, RateLimited) else 0.0
            if not error.retryable or time.monotonic() + pause - began > patience:
                raise
            await pace.rest(pause)
