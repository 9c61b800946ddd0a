"""The journal of one launch, taken through troubles that pass."""

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
    "Pace",
    "Steps",
    "ask_patiently",
    "asked_pause",
    "may_have_happened",
    "may_pass",
    "persist",
]

TRIES: Final = 5
"""How often a step of a launch is tried before its trouble is reported."""

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

    async def rest(self, at_least: float = 0.0) -> float:
        """Wait, and longer the next time; return the seconds."""
        pause = max(self._next, at_least)
        await anyio.sleep(pause)
        self._next = min(self._longest, self._next * _SLOWER)
        return pause


def may_pass(error: TrainingBackendError) -> bool:
    """Tell whether the same call may well succeed a moment later.

    An answer that cannot be read is most often a proxy's page, or was cut off on its way.
    """
    passing = isinstance(error, BackendUnavailable | RateLimited) and error.retryable
    return passing or isinstance(error, ProtocolError)


def may_have_happened(error: TrainingBackendError) -> bool:
    """Tell an answer that was lost or cannot be read from a clear refusal."""
    if isinstance(error, BackendUnavailable):
        return error.sent
    return isinstance(error, ProtocolError)


async def persist(
    act: Callable[[], Awaitable[_T]], pace: Pace, *, patience: float, tries: int = TRIES
) -> _T:
    """Do something that may be done again, through a run of troubles that may pass.

    Args:
        patience: Seconds after which no other try begins.

    Raises:
        TrainingBackendError: The trouble of the last try, or one that will not pass.
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
    """Return the seconds for which a server asked to be left alone."""
    return error.retry_after or 0.0 if isinstance(error, RateLimited) else 0.0


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
            pause = asked_pause(error)
            if not error.retryable or time.monotonic() + pause - began > patience:
                raise
            await pace.rest(pause)


Do = Callable[[], Awaitable[JSONValue]]
"""A part of a journal's step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Takes steps; one whose answer is lost is looked for, and taken again if need be."""

    journal: Journal
    settings: MistralSettings

    def pace(self) -> Pace:
        """Return the pauses between two looks."""
        return Pace(self.settings.poll_min, self.settings.longest_poll)

    async def surely(self, name: str, do: Do, find: Do) -> JSONValue:
        """Take a step that changes something; look for its effect before it is taken again."""
        return await self.ask(lambda: self.journal.step(name, do, find))

    async def remember(self, name: str, do: Do) -> JSONValue:
        """Take a step that does no harm twice, and remember its result."""
        return await self.ask(lambda: self.journal.step(name, do, repeatable=True))

    async def ask(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Do what does no harm twice until it works, within reason."""
        return await persist(act, self.pace(), patience=self.settings.call_timeout)
