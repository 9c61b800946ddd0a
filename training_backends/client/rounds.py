"""The live runs of one backend, kept in memory, brought up to date as their time comes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Protocol

import anyio
from anyio import to_thread

from training_backends.client.cadence import due_at
from training_backends.client.leases import Leases
from training_backends.client.looks import Looks
from training_backends.client.store import RunStore
from training_backends.core.backend import TrainingBackend
from training_backends.core.concurrency import run_all
from training_backends.core.errors import ProtocolError, StoreError, TrainingBackendError
from training_backends.core.logs import bound, get_logger
from training_backends.core.run import RunState, TrainingRun, utc_now
from training_backends.core.tracing import span

__all__ = ["Round", "RoundOf", "Sweep"]

log = get_logger()

_LISTED: Final = 100
"""Runs that a list tells of in one request, where a provider has lists."""
_AT_ONCE: Final = 5
"""Runs asked for at the same time; more would cost more each (see `HttpPolicy`)."""
_AFTER_NONSENSE: Final = timedelta(seconds=30)
"""Pause after an answer about a run that could not be read."""
_SHORTEST_PAUSE: Final = 0.05
_REST: Final = 4.0
"""A sweep is followed by a rest of at least so many times its own length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep did.

    Attributes:
        asked: Runs that were looked at.
        details: Those of them that were asked for by themselves.
    """

    asked: int = 0
    details: int = 0


class RoundOf(Protocol):
    """Makes the round of a backend's live runs, or of some of them."""

    def __call__(self, backend: str, *, only: Collection[str] | None = None) -> "Round":
        """Make it."""
        ...


class Round:
    """Looks at live runs again and again: lists first, details only of what has changed.

    Args:
        only: Ids of the runs that it is about; None: all of the backend.
    """

    def __init__(
        self,
        name: str,
        store: RunStore,
        leases: Leases,
        looks: Looks,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        self._name = name
        self._store = store
        self._leases = leases
        self._looks = looks
        self._only = only
        self._versions: dict[str, int] = {}
        self._took = 0.0
        self._not_before: dict[str, datetime] = {}
        self.runs: dict[str, TrainingRun] = {}
        """The live runs, as they were when last loaded."""

    @property
    def lease(self) -> str:
        """Name of the lease under which the backend's runs are looked at."""
        return f"watch:{self._name}"

    async def load(self) -> None:
        """Bring `runs` to what the store says, reading only what has changed."""
        live = await to_thread.run_sync(
            lambda: self._store.live(backend=self._name, known=self._versions, only=self._only)
        )
        self._versions = dict(live.versions)
        self.runs = {run_id: run for run_id, run in self.runs.items() if run_id in live.versions}
        self.runs.update({run.id: run for run in live.changed})
        for run_id, seen_at in live.seen_at.items():
            if seen_at is not None and self.runs[run_id].last_seen_at != seen_at:
                run = self.runs[run_id]
                self.runs[run_id] = run.model_copy(update={"last_seen_at": seen_at})

    async def go(self) -> Sweep:
        """Look at what is due, unless somebody else is at it.

        Raises:
            TrainingBackendError: The provider cannot be asked; the records say so.
        """
        await self.load()
        now = utc_now()
        if not any(due <= now for due in (await self._due(now)).values()):
            return Sweep()
        async with self._leases.try_hold(self.lease) as lease:
            if lease is None:
                return Sweep()
            began = anyio.current_time()
            await self.load()  # another watcher may have been at it until now
            try:
                return await self._sweep()
            finally:
                self._took = anyio.current_time() - began

    async def pause(self, longest: float) -> float:
        """Return the seconds until the next run is due, `longest` if none is."""
        await self.load()
        now = utc_now()
        due = min((await self._due(now)).values(), default=None)
        wanted = longest if due is None else min((due - now).total_seconds(), longest)
        return max(wanted, self._took * _REST, _SHORTEST_PAUSE)

    async def _due(self, now: datetime) -> dict[str, datetime]:
        """Return when each run is to be looked at."""
        if not self.runs:
            return {}
        bounds = (await self._looks.backend_of(self._name)).poll_interval
        return {
            run_id: max(due_at(run, now, bounds), self._not_before.get(run_id, now))
            for run_id, run in self.runs.items()
        }

    async def _sweep(self) -> Sweep:
        now = utc_now()
        due = await self._due(now)
        runs = list(self.runs.values())
        ripe = [run for run in runs if due[run.id] <= now]
        if not ripe:
            return Sweep()
        backend = await self._looks.backend_of(self._name)
        # Those that would be due soon anyway count: one list now spares their requests.
        soon = [run for run in runs if due[run.id] <= now + (now - _seen_at(run)) / 2]
        try:
            if _has_lists(backend) and len(soon) > 1 + len(runs) / _LISTED:
                return Sweep(asked=len(runs), details=await self._by_lists(backend, runs))
            await self._one_by_one(ripe)
        except StoreError:
            raise
        except TrainingBackendError as error:
            await self._looks.unreachable(runs, error)
            raise
        return Sweep(asked=len(ripe), details=len(ripe))

    async def _by_lists(self, backend: TrainingBackend, runs: Sequence[TrainingRun]) -> int:
        """Look at all runs by lists and return how many had to be asked for by themselves."""
        with bound(backend=self._name), span("training_backends.statuses", backend=self._name):
            told = await backend.statuses(runs)
        standing = [run for run in runs if _stands(run, told.get(run.id))]
        await self._looks.stand(standing)
        stood = {run.id for run in standing}
        moved = [run for run in runs if run.id not in stood]
        await self._one_by_one(moved)
        return len(moved)

    async def _one_by_one(self, runs: Sequence[TrainingRun]) -> None:
        async def look(run: TrainingRun) -> None:
            # Read it again next time even at the same version: after a delete, its id may name
            # a new run.
            self._versions.pop(run.id, None)
            try:
                await self._looks.watch(run)
            except ProtocolError as error:
                # One answer that cannot be read says nothing of the others.
                self._not_before[run.id] = utc_now() + _AFTER_NONSENSE
                log.warning("run cannot be read", run_id=run.id, reason=error.message)

        await run_all((partial(look, run) for run in runs), at_once=_AT_ONCE)


def _has_lists(backend: TrainingBackend) -> bool:
    return type(backend).statuses is not TrainingBackend.statuses


def _seen_at(run: TrainingRun) -> datetime:
    return run.last_seen_at or run.created_at


def _stands(run: TrainingRun, told: RunState | None) -> bool:
    """Tell whether a list's entry says nothing that the record does not say."""
    return (
        told is not None
        and told.status is run.status
        and told.raw_status in {None, run.raw_status}
        and told.changed_at in {None, run.changed_at}
    )
