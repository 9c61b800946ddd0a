"""Retries of temporary errors, and the journal steps of a launch."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio

from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.errors import (
    BackendUnavailable,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
)

__all__ = [
    "TRIES",
    "Do",
    "PollInterval",
    "Steps",
    "ask_patiently",
    "asked_pause",
    "may_have_happened",
    "may_pass",
    "persist",
]

TRIES: Final = 5
"""Maximum attempts of a launch step."""

_T = TypeVar("_T")
_SLOWER = 1.4


class PollInterval:
    """Polling interval that is short after a change and grows without one."""

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = max(shortest, longest)
        self._next = shortest

    def quicken(self) -> None:
        """Reset the interval after a change."""
        self._next = self._shortest

    async def rest(self, at_least: float = 0.0) -> float:
        """Sleep, lengthen the interval, and return the seconds slept."""
        pause = max(self._next, at_least)
        await anyio.sleep(pause)
        self._next = min(self._longest, self._next * _SLOWER)
        return pause


def may_pass(error: TrainingBackendError) -> bool:
    """Return whether the same call may succeed later.

    A malformed response is usually an error page of a proxy, or truncated.
    """
    passing = isinstance(error, BackendUnavailable | RateLimited) and error.retryable
    return passing or isinstance(error, ProtocolError)


def may_have_happened(error: TrainingBackendError) -> bool:
    """Return whether the request may have been processed: the response was lost or malformed."""
    if isinstance(error, BackendUnavailable):
        return error.sent
    return isinstance(error, ProtocolError)


async def persist(
    act: Callable[[], Awaitable[_T]], pace: PollInterval, *, patience: float, tries: int = TRIES
) -> _T:
    """Repeat a safe operation after temporary errors.

    Args:
        patience: Seconds after which no further attempt starts.

    Raises:
        TrainingBackendError: The last temporary error, or a permanent one.
    """
    began = time.monotonic()
    while True:
        tries -= 1
        try:
            return await act()
        except TrainingBackendError as error:
            pause = asked_pause(error)
            too_late = time.monotonic() + pause - began > patience
            if tries <= 0 or too_late or not may_pass(error):
                raise
            await pace.rest(pause)


def asked_pause(error: TrainingBackendError) -> float:
    """Return the pause that a server requested, in seconds."""
    return error.retry_after or 0.0 if isinstance(error, RateLimited) else 0.0


async def ask_patiently(
    ask: Callable[[], Awaitable[_T]], pace: PollInterval, patience: float
) -> _T:
    """Repeat a request until it gets a response.

    Args:
        patience: Seconds after which the error is raised.

    Raises:
        BackendUnavailable: The server stayed unavailable.
        RateLimited: The server kept limiting the rate.
    """
    began = time.monotonic()
    while True:
        try:
            return await ask()
        except (BackendUnavailable, RateLimited) as error:
            pause = asked_pause(error)
            if not error.retryable or time.monotonic() + pause - began > patience:
                raise
            await pace.rest(pause)


Do = Callable[[], Awaitable[JSONValue]]
"""An operation of a journal step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Executes journal steps; looks for the effect of a lost response before repeating a step."""

    journal: Journal
    settings: MistralSettings

    def pace(self) -> PollInterval:
        """Return the polling interval."""
        return PollInterval(self.settings.poll_min, self.settings.longest_poll)

    async def surely(self, name: str, do: Do, find: Do) -> JSONValue:
        """Execute a step with side effects; look for its effect before repeating it."""
        return await self.ask(lambda: self.journal.step(name, do, find))

    async def remember(self, name: str, do: Do) -> JSONValue:
        """Execute a step that is safe to repeat, and record its result."""
        return await self.ask(lambda: self.journal.step(name, do, repeatable=True))

    async def ask(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a safe operation until it succeeds, within limits."""
        return await persist(act, self.pace(), patience=self.settings.call_timeout)
