"""An in-memory journal that can be interrupted at any point, as by a killed process."""

import json
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager, nullcontext

from training_backends.client.journal import JournalSteps, LaunchWatch
from training_backends.core.backend import JSONValue
from training_backends.core.estimate import Estimate
from training_backends.core.run import RunState, TrainingRun
from training_backends.store.journal import JournalEntry

__all__ = ["Killed", "MemoryJournal"]


class Killed(BaseException):
    """Simulates the death of the process: no code under test may catch it."""


class MemoryJournal(JournalSteps):
    """Implements `core.backend.Journal` in memory, by the rule of the client's own journal.

    Attributes:
        run: The record, as a store would have it.
        quotes: Every quote submitted for approval.
        kill_at: Raise `Killed` at this point, counted from 0 (before, within and after each step,
            and at each record); None never does. Reset for every launch.
        points: Number of points passed since then.
        uploads: Provider ids of uploads, by scope and SHA-256.
        others: Provider ids that belong to other runs.
    """

    def __init__(self, run: TrainingRun, *, kill_at: int | None = None) -> None:
        self.run: TrainingRun = run
        self.quotes: list[Estimate] = []
        self.states: list[RunState] = []
        self.sent: list[tuple[str, int, int]] = []
        self.kill_at = kill_at
        self.points: int = 0
        self.rows: dict[str, str | None] = {}
        self.uploads: dict[tuple[str, str], str] = {}
        self.others: frozenset[str] = frozenset()

    def _point(self) -> None:
        here, self.points = self.points, self.points + 1
        if here == self.kill_at:
            raise Killed

    async def _entry(self, name: str) -> JournalEntry | None:
        if name not in self.rows:
            return None
        known = self.rows[name]
        return JournalEntry(known is not None, None if known is None else json.loads(known))

    async def _begin(self, name: str) -> None:
        self.rows[name] = None
        self._point()

    async def _finish(self, name: str, result: JSONValue) -> None:
        self._point()
        self.rows[name] = json.dumps(result)
        self._point()

    async def _forget(self, name: str) -> None:
        del self.rows[name]

    async def _known_upload(self, scope: str, sha256: str) -> str | None:
        return self.uploads.get((scope, sha256))

    async def _uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        self._point()
        self.uploads[scope, sha256] = remote_id

    def _alone(self, name: str) -> AbstractAsyncContextManager[object]:
        del name
        return nullcontext()

    async def record(self, state: RunState) -> None:
        """See `Journal.record`."""
        self._point()
        self.run = self.run.updated(state)
        self.states.append(state)

    async def quote(self, estimate: Estimate) -> None:
        """See `Journal.quote`."""
        self._point()
        self.quotes.append(estimate)
        await LaunchWatch().decide(estimate, self.run.config.budget)

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """See `Journal.claimed`."""
        return self.others.intersection(remote_ids)

    def progress(self, name: str, done: int, total: int) -> None:
        """See `Journal.progress`."""
        self.sent.append((name, done, total))
