"""Polling the live runs of one backend when they are due."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Final, Protocol
from zlib import crc32

import anyio
from anyio import to_thread

from training_backends.client.boundary import has_lists, is_about_server
from training_backends.client.leases import Leases
from training_backends.client.observe import Observer, expected_end, last_change
from training_backends.core.backend import TrainingBackend
from training_backends.core.backoff import Backoff
from training_backends.core.concurrency import run_all
from training_backends.core.errors import BackendUnavailable, StoreError, TrainingBackendError
from training_backends.core.logging import bound, get_logger
from training_backends.core.run import RunState, TrainingRun, utc_now
from training_backends.core.tracing import poll_span
from training_backends.store import RunStore

__all__ = ["PollResult", "Poller", "PollerFactory", "due_at", "interval"]

log = get_logger()

_TENTH: Final = 10
"""The polling interval is a tenth of the time since the last change."""
_JITTER: Final = 0.2
"""Fraction of the interval by which polls are spread."""
_LISTED: Final = 100
"""Runs per request, for providers that list many."""
_AT_ONCE: Final = 5
"""Concurrent requests; more would slow each of them down (see `HttpPolicy`)."""
_FIRST_TROUBLE, _LONGEST_TROUBLE = 1.0, 300.0
"""Seconds of backoff after a failed observation of a run."""
PATIENCE: Final = 30.0
"""Seconds to wait for one run while other runs of the sweep are waiting."""
_SHORTEST_PAUSE: Final = 0.05
_REST: Final = 4.0
"""The pause after a sweep is at least this many times its duration."""


def interval(run: TrainingRun, now: datetime, bounds: tuple[timedelta, timedelta]) -> timedelta:
    """Return the polling interval of a run.

    Args:
        bounds: Shortest and longest interval, before jitter.
    """
    shortest, longest = bounds
    wanted = max(now - last_change(run), timedelta(0)) / _TENTH
    end = expected_end(run)
    if end is not None:
        # Poll as often just after the expected end as just before it.
        wanted = min(wanted, abs(end - now) / _TENTH)
    return min(max(wanted, shortest), longest)


def due_at(run: TrainingRun, now: datetime, bounds: tuple[timedelta, timedelta]) -> datetime:
    """Return when a run is due to be observed again.

    Depends only on the record, so that several watchers agree without coordination.
    """
    if run.last_seen_at is None:
        return now
    mark = f"{run.id} {run.last_seen_at.isoformat()}"
    spread = 1 + _JITTER * (2 * crc32(mark.encode()) / 0xFFFFFFFF - 1)
    return run.last_seen_at + interval(run, run.last_seen_at, bounds) * spread


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trouble:
    """An error and when to retry."""

    error: TrainingBackendError
    backoff: Backoff
    until: datetime

    @classmethod
    def after(cls, error: TrainingBackendError, before: "_Trouble | None") -> "_Trouble":
        """Return the trouble that follows `before`, with a longer pause."""
        backoff = before.backoff if before else Backoff(_FIRST_TROUBLE, _LONGEST_TROUBLE)
        until = utc_now() + timedelta(seconds=backoff.next())
        return cls(error=error, backoff=backoff, until=until)


@dataclass(frozen=True, slots=True, kw_only=True)
class PollResult:
    """The result of a sweep.

    Attributes:
        asked: Number of runs observed.
        details: Number of those observed by a request of their own.
    """

    asked: int = 0
    details: int = 0


class PollerFactory(Protocol):
    """Creates the `Poller` of a backend."""

    def __call__(self, backend: str, *, only: Collection[str] | None = None) -> "Poller":
        """Return the poller of all live runs, or of those in `only`."""
        ...


class Poller:
    """Polls live runs: lists first, then details of the runs that have changed.

    An error for one run affects only that run, which is polled with increasing backoff. Errors of
    the server (no connection, 401, 429) apply to all runs, and so does a server that fails for
    each of the first few runs.

    Args:
        only: Ids of the runs to poll; None: all runs of the backend.
    """

    def __init__(
        self,
        name: str,
        store: RunStore,
        leases: Leases,
        observer: Observer,
        *,
        only: Collection[str] | None = None,
    ) -> None:
        self._name = name
        self._store = store
        self._leases = leases
        self._observer = observer
        self._only = only
        self._versions: dict[str, int] = {}
        self._took = 0.0
        self._troubles: dict[str, _Trouble] = {}
        self._no_lists: _Trouble | None = None
        self.runs: dict[str, TrainingRun] = {}
        """The live runs, as last loaded."""

    @property
    def lease(self) -> str:
        """Name of the lease held while the backend's runs are polled."""
        return f"watch:{self._name}"

    async def load(self) -> None:
        """Update `runs` from the store, reading only records that have changed."""
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
        """Return the error of the last observation of a run, or None."""
        found = self._troubles.get(run_id)
        return None if found is None else found.error

    async def poll(self) -> PollResult:
        """Observe the runs that are due, unless another watcher is doing so.

        Raises:
            TrainingBackendError: The provider cannot be reached, which is now recorded.
        """
        await self.load()
        await self._require_backend()
        try:
            return await self._go()
        except StoreError:
            raise
        except TrainingBackendError as error:
            await self._observer.unreachable(list(self.runs.values()), error)
            raise

    async def _go(self) -> PollResult:
        now = utc_now()
        if not any(due <= now for due in (await self._due(now)).values()):
            return PollResult()
        async with self._leases.try_hold(self.lease) as lease:
            if lease is None:
                return PollResult()
            await self.load()  # another watcher may have just finished a sweep
            return await self._sweep()

    async def pause(self, longest: float) -> float:
        """Return the seconds until the next run is due, `longest` if none is."""
        await self.load()
        now = utc_now()
        due = min((await self._due(now)).values(), default=None)
        wanted = longest if due is None else min((due - now).total_seconds(), longest)
        return max(wanted, self._took * _REST, _SHORTEST_PAUSE)

    async def _due(self, now: datetime) -> dict[str, datetime]:
        """Return when each run that can be observed from here is due."""
        if not self.runs:
            return {}
        bounds = (await self._observer.backend_of(self._name)).poll_interval
        return {
            run_id: max(due_at(run, now, bounds), self._retry_at(run_id) or now)
            for run_id, run in self.runs.items()
            if await self._observer.sees(run)
        }

    def _retry_at(self, run_id: str) -> datetime | None:
        found = self._troubles.get(run_id)
        return None if found is None else found.until

    async def _require_backend(self) -> None:
        """Create the backend; a failure here says nothing about its runs."""
        if self.runs:
            await self._observer.backend_of(self._name)

    async def refresh(self) -> None:
        """Observe all runs that can be observed from here, whether or not they are due.

        Raises:
            TrainingBackendError: The provider cannot be reached, which is now recorded.
        """
        await self.load()
        await self._require_backend()
        try:
            await self._sweep(due_only=False)
        except StoreError:
            raise
        except TrainingBackendError as error:
            await self._observer.unreachable(list(self.runs.values()), error)
            raise

    async def _sweep(self, *, due_only: bool = True) -> PollResult:
        now = utc_now()
        due = await self._due(now)
        if not due_only:
            due = dict.fromkeys(due, now)
        runs = [self.runs[run_id] for run_id in due]
        ready = [run for run in runs if due[run.id] <= now]
        if not ready:
            return PollResult()
        backend = await self._observer.backend_of(self._name)
        # Count runs that are due soon as well: one list now saves their requests.
        soon = [run for run in runs if due[run.id] <= now + (now - _seen_at(run)) / 2]
        lists = has_lists(backend) and not (self._no_lists and self._no_lists.until > now)
        if lists and len(soon) > 1 + len(runs) / _LISTED:
            changed = await self._by_lists(backend, runs)
            if changed is not None:
                await self._one_by_one(changed, answered=True)
                return PollResult(asked=len(runs), details=len(changed))
        await self._one_by_one(ready)
        return PollResult(asked=len(ready), details=len(ready))

    async def _by_lists(
        self, backend: TrainingBackend, runs: Sequence[TrainingRun]
    ) -> Sequence[TrainingRun] | None:
        """Observe all runs by lists and return those that need a request of their own.

        Returns None if listing failed for a reason that may not apply to single runs.
        """
        began = anyio.current_time()
        try:
            name = self._name
            with bound(backend=name), poll_span("training_backends.statuses", backend=name):
                listed = await backend.statuses(runs)
        except TrainingBackendError as error:
            if is_about_server(error):
                raise
            log.warning("runs cannot be listed", backend=self._name, reason=error.message)
            self._no_lists = _Trouble.after(error, self._no_lists)
            return None
        self._no_lists = None
        unchanged = [run for run in runs if _is_unchanged(run, listed.get(run.id))]
        await self._observer.mark_unchanged(unchanged)
        self._took = anyio.current_time() - began
        unchanged_ids = {run.id for run in unchanged}
        now = utc_now()
        retriable = [run for run in runs if (self._retry_at(run.id) or now) <= now]
        for run in retriable:
            if run.id in unchanged_ids:
                await self._alone(run, self._observer.within_budget)
        return [run for run in retriable if run.id not in unchanged_ids]

    async def _one_by_one(self, runs: Sequence[TrainingRun], *, answered: bool = False) -> None:
        """Observe each run by a request of its own.

        Args:
            answered: Whether the server has just answered.

        Raises:
            TrainingBackendError: The error applies to all runs of the backend.
        """
        began = anyio.current_time()
        if not answered:
            self._took = 0.0
        earlier = self._took
        watch = partial(self._observer.watch, patience=PATIENCE if len(self.runs) > 1 else None)
        unavailable = 0

        async def observe(run: TrainingRun) -> None:
            nonlocal answered, unavailable
            # Reload the record even at the same version: after a delete, its id may belong to a
            # new run.
            self._versions.pop(run.id, None)
            error = await self._alone(run, watch)
            if isinstance(error, BackendUnavailable):
                unavailable += 1
                if not answered and unavailable >= min(_AT_ONCE, len(self.runs)):
                    raise error
                return
            answered = True
            if error is None:
                # Not counting failed runs: a run that hangs must not slow down the others.
                self._took = earlier + anyio.current_time() - began

        await run_all((partial(observe, run) for run in runs), at_once=_AT_ONCE)

    async def _alone(
        self, run: TrainingRun, work: Callable[[TrainingRun], Awaitable[object]]
    ) -> TrainingBackendError | None:
        """Do `work` for one run; return an error that applies only to that run.

        Raises:
            TrainingBackendError: The error applies to all runs of the backend.
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


def _is_unchanged(run: TrainingRun, listed: RunState | None) -> bool:
    """Return whether a list entry adds nothing to the record."""
    return (
        listed is not None
        and listed.status is run.status
        and listed.raw_status in {None, run.raw_status}
        and listed.changed_at in {None, run.changed_at}
    )
