"""The live runs of one backend, kept in memory, brought up to date as their time comes."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Protocol

import anyio
from anyio import to_thread

from training_backends.client.boundary import has_lists, is_about_server
from training_backends.client.leases import Leases
from training_backends.client.observe import Looks, due_at
from training_backends.core.backend import TrainingBackend
from training_backends.core.concurrency import run_all
from training_backends.core.errors import BackendUnavailable, StoreError, TrainingBackendError
from training_backends.core.logging import bound, get_logger
from training_backends.core.run import RunState, TrainingRun, utc_now
from training_backends.core.tracing import span
from training_backends.store import RunStore

__all__ = ["Round", "RoundOf", "Sweep"]

log = get_logger()

_LISTED: Final = 100
"""Runs that a list tells of in one request, where a provider has lists."""
_AT_ONCE: Final = 5
"""Runs asked for at the same time; more would cost more each (see `HttpPolicy`)."""
_FIRST_TROUBLE, _LONGEST_TROUBLE = timedelta(seconds=1), timedelta(minutes=5)
"""Pause before a run is asked for again that could not be observed; doubled each time."""
_PATIENCE: Final = 30.0
"""Seconds for one run's answer where other runs of the sweep are waiting."""
_SHORTEST_PAUSE: Final = 0.05
_REST: Final = 4.0
"""A sweep is followed by a rest of at least so many times its own length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """Why something could not be asked for, and when to try it again."""

    error: TrainingBackendError
    pause: timedelta
    until: datetime

    @classmethod
    def after(cls, error: TrainingBackendError, before: "_Trouble | None") -> "_Trouble":
        """Wait twice as long as before."""
        pause = min(before.pause * 2, _LONGEST_TROUBLE) if before else _FIRST_TROUBLE
        return cls(error=error, pause=pause, until=utc_now() + pause)


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

    An error about one run keeps to that run, which is asked for less and less often. Only errors
    about the server (no connection, 401, 429) hold for all runs, and so does a server that
    answers for none of the first few.

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
        self._troubles: dict[str, _Trouble] = {}
        self._no_lists: _Trouble | None = None
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
        self._troubles = {it: found for it, found in self._troubles.items() if it in self.runs}
        for run_id, seen_at in live.seen_at.items():
            if seen_at is not None and self.runs[run_id].last_seen_at != seen_at:
                run = self.runs[run_id]
                self.runs[run_id] = run.model_copy(update={"last_seen_at": seen_at})

    def trouble_of(self, run_id: str) -> TrainingBackendError | None:
        """Return why a run could not be observed the last time, or None."""
        found = self._troubles.get(run_id)
        return None if found is None else found.error

    async def go(self) -> Sweep:
        """Look at what is due, unless somebody else is at it.

        Raises:
            TrainingBackendError: The provider cannot be asked; the records say so.
        """
        await self.load()
        await self._require_backend()
        try:
            return await self._go()
        except StoreError:
            raise
        except TrainingBackendError as error:
            await self._looks.unreachable(list(self.runs.values()), error)
            raise

    async def _go(self) -> Sweep:
        now = utc_now()
        if not any(due <= now for due in (await self._due(now)).values()):
            return Sweep()
        async with self._leases.try_hold(self.lease) as lease:
            if lease is None:
                return Sweep()
            await self.load()  # another watcher may have been at it until now
            return await self._sweep()

    async def pause(self, longest: float) -> float:
        """Return the seconds until the next run is due, `longest` if none is."""
        await self.load()
        now = utc_now()
        due = min((await self._due(now)).values(), default=None)
        wanted = longest if due is None else min((due - now).total_seconds(), longest)
        return max(wanted, self._took * _REST, _SHORTEST_PAUSE)

    async def _due(self, now: datetime) -> dict[str, datetime]:
        """Return when each run is to be looked at, of those that can be observed from here."""
        if not self.runs:
            return {}
        bounds = (await self._looks.backend_of(self._name)).poll_interval
        return {
            run_id: max(due_at(run, now, bounds), self._free_at(run_id) or now)
            for run_id, run in self.runs.items()
            if await self._looks.sees(run)
        }

    def _free_at(self, run_id: str) -> datetime | None:
        found = self._troubles.get(run_id)
        return None if found is None else found.until

    async def _require_backend(self) -> None:
        """Make the backend; that it cannot be made here says nothing of its runs elsewhere."""
        if self.runs:
            await self._looks.backend_of(self._name)

    async def refresh(self) -> None:
        """Look at all runs that can be observed from here, whether or not they are due.

        Raises:
            TrainingBackendError: The provider cannot be asked; the records say so.
        """
        await self.load()
        await self._require_backend()
        try:
            await self._sweep(due_only=False)
        except StoreError:
            raise
        except TrainingBackendError as error:
            await self._looks.unreachable(list(self.runs.values()), error)
            raise

    async def _sweep(self, *, due_only: bool = True) -> Sweep:
        now = utc_now()
        due = await self._due(now)
        if not due_only:
            due = dict.fromkeys(due, now)
        runs = [self.runs[run_id] for run_id in due]
        ripe = [run for run in runs if due[run.id] <= now]
        if not ripe:
            return Sweep()
        backend = await self._looks.backend_of(self._name)
        # Those that would be due soon anyway count: one list now spares their requests.
        soon = [run for run in runs if due[run.id] <= now + (now - _seen_at(run)) / 2]
        lists = has_lists(backend) and not (self._no_lists and self._no_lists.until > now)
        if lists and len(soon) > 1 + len(runs) / _LISTED:
            moved = await self._by_lists(backend, runs)
            if moved is not None:
                await self._one_by_one(moved, answered=True)
                return Sweep(asked=len(runs), details=len(moved))
        await self._one_by_one(ripe)
        return Sweep(asked=len(ripe), details=len(ripe))

    async def _by_lists(
        self, backend: TrainingBackend, runs: Sequence[TrainingRun]
    ) -> Sequence[TrainingRun] | None:
        """Look at all runs by lists and return those that have to be asked for by themselves.

        None if the lists could not be read, for a reason that need not hold for each run.
        """
        began = anyio.current_time()
        try:
            with bound(backend=self._name), span("training_backends.statuses", backend=self._name):
                told = await backend.statuses(runs)
        except TrainingBackendError as error:
            if is_about_server(error):
                raise
            log.warning("runs cannot be listed", backend=self._name, reason=error.message)
            self._no_lists = _Trouble.after(error, self._no_lists)
            return None
        self._no_lists = None
        standing = [run for run in runs if _stands(run, told.get(run.id))]
        await self._looks.stand(standing)
        self._took = anyio.current_time() - began
        stood = {run.id for run in standing}
        now = utc_now()
        free = [run for run in runs if (self._free_at(run.id) or now) <= now]
        for run in free:
            if run.id in stood:
                await self._alone(run, self._looks.within_budget)
        return [run for run in free if run.id not in stood]

    async def _one_by_one(self, runs: Sequence[TrainingRun], *, answered: bool = False) -> None:
        """Look at each run by itself.

        Args:
            answered: Whether the server has just answered.

        Raises:
            TrainingBackendError: It holds for all runs of the backend.
        """
        began = anyio.current_time()
        if not answered:
            self._took = 0.0
        earlier = self._took
        look = partial(self._looks.watch, patience=_PATIENCE if len(self.runs) > 1 else None)
        away = 0

        async def look_at(run: TrainingRun) -> None:
            nonlocal answered, away
            # Read it again next time even at the same version: after a delete, its id may name
            # a new run.
            self._versions.pop(run.id, None)
            error = await self._alone(run, look)
            if isinstance(error, BackendUnavailable):
                away += 1
                if not answered and away >= min(_AT_ONCE, len(self.runs)):
                    raise error
                return
            answered = True
            if error is None:
                # Without what the troubled took: a run that hangs must not slow the others.
                self._took = earlier + anyio.current_time() - began

        await run_all((partial(look_at, run) for run in runs), at_once=_AT_ONCE)

    async def _alone(
        self, run: TrainingRun, work: Callable[[TrainingRun], Awaitable[object]]
    ) -> TrainingBackendError | None:
        """Do something about one run; return an error that holds for that run alone.

        Raises:
            TrainingBackendError: It holds for all runs of the backend.
        """
        try:
            await work(run)
        except StoreError:
            raise
        except TrainingBackendError as error:
            if is_about_server(error):
                raise
            self._troubles[run.id] = _Trouble.after(error, self._troubles.get(run.id))
            log.warning("run cannot be observed", run_id=run.id, reason=error.message)
            return error
        self._troubles.pop(run.id, None)
        return None


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
