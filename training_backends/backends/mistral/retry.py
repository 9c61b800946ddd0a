"""The journal of one launch, taken through troubles that pass."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from training_backends.backends.mistral.polling import Pace, persist
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import Journal, JSONValue

__all__ = ["Do", "Steps"]

_T = TypeVar("_T")
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
