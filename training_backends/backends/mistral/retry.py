"""Repeat the steps of a launch after temporary errors: the one loop above the HTTP attempts."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio

from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.errors import (
    BackendUnavailable,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
)

__all__ = ["TRIES", "Do", "Steps", "asked_pause", "may_pass"]

TRIES: Final = 5
"""Maximum attempts of a launch step, and unreadable responses in a row while polling."""

_T = TypeVar("_T")


def may_pass(error: TrainingBackendError) -> bool:
    """Return whether the same call may succeed later.

    A malformed response is usually an error page of a proxy, or truncated.
    """
    passing = isinstance(error, BackendUnavailable | RateLimited) and error.retryable
    return passing or isinstance(error, ProtocolError)


def asked_pause(error: TrainingBackendError) -> float:
    """Return the pause that a server requested, in seconds."""
    return error.retry_after or 0.0 if isinstance(error, RateLimited) else 0.0


Do = Callable[[], Awaitable[JSONValue]]
"""An operation of a journal step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Executes journal steps; looks for the effect of a lost response before repeating a step."""

    journal: Journal
    settings: MistralSettings

    def polls(self) -> Backoff:
        """Return the pauses between two requests for the same thing."""
        return Backoff(self.settings.poll_min, self.settings.longest_poll, factor=1.4)

    async def surely(self, name: str, do: Do, find: Do) -> JSONValue:
        """Execute a step with side effects; look for its effect before repeating it."""
        return await self.ask(lambda: self.journal.step(name, do, find))

    async def remember(self, name: str, do: Do) -> JSONValue:
        """Execute a step that is safe to repeat, and record its result."""
        return await self.ask(lambda: self.journal.step(name, do, repeatable=True))

    async def ask(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a safe operation after temporary errors, within `TRIES` and `call_timeout`.

        Raises:
            TrainingBackendError: The last temporary error, or a permanent one.
        """
        latest = time.monotonic() + self.settings.call_timeout
        polls = self.polls()
        for left in reversed(range(TRIES)):
            try:
                return await act()
            except TrainingBackendError as error:
                pause = max(polls.next(), asked_pause(error))
                if not left or time.monotonic() + pause > latest or not may_pass(error):
                    raise
                await anyio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")
