"""An in-memory journal that can be interrupted at any point, as by a killed process."""

import json
from collections.abc import Awaitable, Callable, Collection

from training_backends.client.journal import LaunchWatch
from training_backends.core.backend import JSONValue
from training_backends.core.errors import AmbiguousLaunch
from training_backends.core.estimate import Estimate
from training_backends.core.run import RunState, TrainingRun

__all__ = ["Killed", "MemoryJournal"]


class Killed(BaseException):
    """Simulates the death of the process: no code under test may catch it."""


class MemoryJournal:
    """Implements `core.backend.Journal` in memory.

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

    async def step(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]] | None = None,
        *,
        repeatable: bool = False,
    ) -> JSONValue:
        """See `Journal.step`."""
        if name in self.rows:
            known = self.rows[name]
            if known is not None:
                remembered: JSONValue = json.loads(known)
                return remembered
            if find is None and not repeatable:
                raise AmbiguousLaunch(f"{name!r} was started, and its outcome cannot be looked up.")
            found = await find() if find is not None else None
            if found is not None:
                return self._finish(name, found)
        self.rows[name] = None
        self._point()
        result = await do()
        self._point()
        self._finish(name, result)
        self._point()
        return result

    def _finish(self, name: str, result: JSONValue) -> JSONValue:
        self.rows[name] = json.dumps(result)
        return result

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

    async def known_upload(self, scope: str, sha256: str) -> str | None:
        """See `Journal.known_upload`."""
        return self.uploads.get((scope, sha256))

    async def uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        """See `Journal.uploaded`."""
        self._point()
        self.uploads[scope, sha256] = remote_id

    async def claimed(self, remote_ids: Collection[str]) -> frozenset[str]:
        """See `Journal.claimed`."""
        return self.others.intersection(remote_ids)

    def progress(self, name: str, done: int, total: int) -> None:
        """See `Journal.progress`."""
        self.sent.append((name, done, total))
