"""Execute the steps of a launch, and repeat them after temporary errors."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.persist import persist

__all__ = ["Do", "Steps"]

_T = TypeVar("_T")

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
        """Repeat a safe operation after temporary errors, within `call_timeout`.

        Raises:
            TrainingBackendError: The last temporary error, or a permanent one.
        """
        return await persist(act, within=self.settings.call_timeout, pauses=self.polls())
