"""Waiting for runs and reading their logs from the store while it is kept up to date."""

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

from training_backends.client.launch import RunRecords
from training_backends.client.leases import Leases
from training_backends.client.observe import Observer
from training_backends.client.poller import PollerFactory, due_at
from training_backends.core.backoff import Backoff
from training_backends.core.concurrency import run_all
from training_backends.core.errors import (
    ProtocolError,
    RunNotFound,
    StoreError,
    TrainingBackendError,
)
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, TrainingRun, utc_now
from training_backends.core.status import FINISHED, ON_THE_WAY, TrainingStatus
from training_backends.store import RunStore
from training_backends.store.changes import Changes, RunChange

__all__ = ["Following", "is_reached"]

log = get_logger()

_PAGE: Final = 1000
_SHORTEST: Final = 0.05
_STORE_INTERVAL: Final = 0.5
"""Seconds between reads of the store, which other processes may update."""
_ABANDONED_INTERVAL: Final = 5.0
_FARTHEST: Final = 30.0
"""Seconds between reads of a store that tells changes itself."""
_FOLLOWED: Final = 4
"""A followed run is polled at least every this many shortest intervals."""
_LONGEST_TROUBLE: Final = 30.0


class Following:
    """Streams logs and waits for runs to finish."""

    def __init__(
        self,
        store: RunStore,
        leases: Leases,
        records: RunRecords,
        observer: Observer,
        new_poller: PollerFactory,
        *,
        changes: Changes,
    ) -> None:
        self._store = store
        self._leases = leases
        self._records = records
        self._observer = observer
        self._new_poller = new_poller
        self._changes = changes

    async def logs(
        self, run: TrainingRun, *, after: str | None, tail: int | None, follow: bool
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield the stored records of a run's log, then new ones."""
        async with self._changes.of([run.id] if follow else []) as change:
            found = self._logs(run, change, after=after, tail=tail, follow=follow)
            async with aclosing(found) as records:
                async for record in records:
                    yield record

    async def _logs(
        self,
        run: TrainingRun,
        change: RunChange,
        *,
        after: str | None,
        tail: int | None,
        follow: bool,
    ) -> AsyncGenerator[LogRecord, None]:
        if tail is not None:
            error = await self._brought_up_to_date(run)
            after = await to_thread.run_sync(self._store.cursor_before_last, run.id, tail)
            if not follow:
                async with aclosing(self._stored(run.id, after)) as records:
                    async for record in records:
                        yield record
                if error is not None:
                    raise error
                return
        asked = False
        backoff = Backoff(_SHORTEST, _LONGEST_TROUBLE)
        while True:
            complete = await to_thread.run_sync(self._store.is_complete, run.id)
            async with aclosing(self._stored(run.id, after)) as records:
                async for record in records:
                    after = record.cursor
                    yield record
            if complete or (asked and not follow):
                return
            run = await to_thread.run_sync(self._store.get, run.id)
            if follow:
                await self._follow(run, backoff, change)
            else:
                await self._require_job(run)
                await self._observer.observe(run)
                asked = True

    async def _brought_up_to_date(self, run: TrainingRun) -> TrainingBackendError | None:
        """Observe a run unless its log is complete; return the error instead of raising it."""
        if await to_thread.run_sync(self._store.is_complete, run.id):
            return None
        try:
            await self._require_job(run)
            await self._observer.observe(run)
        except StoreError:
            raise
        except TrainingBackendError as error:
            return error
        return None

    async def wait(
        self,
        runs: Collection[TrainingRun],
        until: Collection[TrainingStatus],
        reached: dict[str, TrainingRun],
    ) -> None:
        """Return once all of the runs have one of the statuses, are past it, or have finished.

        Args:
            reached: Receives each run as it was then.
        """
        by_backend: dict[str, set[str]] = {}
        for run in runs:
            if is_reached(run, until, fresh=False):
                self._note_reached(run, until, reached)
            else:
                by_backend.setdefault(run.backend, set()).add(run.id)
        waiting = [run_id for ids in by_backend.values() for run_id in ids]
        await run_all(partial(self._watched_launch, run_id) for run_id in waiting)
        await run_all(
            partial(self._reached, name, ids, until, reached) for name, ids in by_backend.items()
        )

    async def _watched_launch(self, run_id: str) -> None:
        async with self._changes.of([run_id]) as change:
            await self._launched(run_id, change)

    async def _stored(self, run_id: str, after: str | None) -> AsyncGenerator[LogRecord, None]:
        while True:
            page = await to_thread.run_sync(
                partial(self._store.records, run_id, after=after, limit=_PAGE)
            )
            for record in page:
                yield record
            if len(page) < _PAGE:
                return
            after = page[-1].cursor

    async def _follow(self, run: TrainingRun, backoff: Backoff, change: RunChange) -> None:
        """Observe a run if it is due and not being observed, else wait a moment."""
        await self._require_launch(run)
        if not await self._records.may_be_at_provider(run):
            await self._launched(run.id, change)
            return
        if not await self._observer.sees(run):
            await change.wait(_STORE_INTERVAL)  # the machine that can observe it updates the store
            return
        shortest, longest = (await self._observer.backend_of(run.backend)).poll_interval
        now = utc_now()
        due = due_at(run, now, (shortest, min(longest, shortest * _FOLLOWED)))
        if due > now:
            rest = max((due - now).total_seconds(), _SHORTEST)
            await change.wait(min(rest, _STORE_INTERVAL), longest=rest)
            return
        async with self._leases.try_hold(f"observe:{run.id}") as lease:
            if lease is not None:
                try:
                    await self._observer.watch(run)
                except TrainingBackendError as error:
                    await self._tolerate(run, error)
                else:
                    backoff.reset()
                    return
        await anyio.sleep(backoff.next())

    async def _reached(
        self,
        name: str,
        run_ids: set[str],
        until: Collection[TrainingStatus],
        reached: dict[str, TrainingRun],
    ) -> None:
        """Poll runs of one backend until none of `run_ids`, which shrinks, is waited for."""
        async with self._changes.of(run_ids) as change:
            await self._polled(name, run_ids, until, reached, change)

    async def _polled(
        self,
        name: str,
        run_ids: set[str],
        until: Collection[TrainingStatus],
        reached: dict[str, TrainingRun],
        change: RunChange,
    ) -> None:
        poller = self._new_poller(name, only=run_ids)
        backoff = Backoff(_SHORTEST, _LONGEST_TROUBLE)
        fresh = FINISHED.issuperset(until)
        await poller.load()
        paused: set[str] = set()
        while True:
            for run_id in [*run_ids]:
                run = poller.runs.get(run_id)
                if run is None:
                    run = await to_thread.run_sync(self._store.get, run_id)
                if is_reached(run, until, fresh=fresh):
                    self._note_reached(run, until, reached)
                    run_ids.remove(run_id)
            if not run_ids:
                return
            waiting = [run for run in poller.runs.values() if run.id in run_ids]
            for run in waiting:
                await self._require_launch(run)
            paused = self._report_paused(waiting, paused)
            try:
                await (poller.poll() if fresh else poller.refresh())
                fresh = True
                for run in poller.runs.values():
                    error = poller.trouble_of(run.id)
                    # An unreadable response may be a proxy's error page, which is temporary.
                    if error is not None and not isinstance(error, ProtocolError):
                        await self._tolerate(run, error)
                pause = await poller.pause(_FARTHEST if change.can_tell else _STORE_INTERVAL)
                backoff.reset()
            except TrainingBackendError as error:
                for run in poller.runs.values():
                    await self._tolerate(run, error)
                pause = backoff.next()
            await change.wait(pause, longest=pause)
            await poller.load()

    def _note_reached(
        self,
        run: TrainingRun,
        until: Collection[TrainingStatus],
        reached: dict[str, TrainingRun],
    ) -> None:
        reached[run.id] = run
        if not any(map(run.has_reached, until)):
            words = ", ".join(sorted(until))
            log.warning("run finished before it was in this status", run_id=run.id, status=words)

    def _report_paused(self, runs: Collection[TrainingRun], reported: set[str]) -> set[str]:
        """Report newly paused runs, which finish only if they are unpaused; return all of them."""
        paused = {run.id for run in runs if run.status is TrainingStatus.PAUSED}
        for run_id in sorted(paused - reported):
            log.warning("run is paused; it continues when it is unpaused", run_id=run_id)
        return paused

    async def _tolerate(self, run: TrainingRun, error: TrainingBackendError) -> None:
        """Tolerate an unreachable provider for `give_up_after`; re-raise other errors."""
        if isinstance(error, StoreError) or not error.retryable:
            raise error
        now = await to_thread.run_sync(self._store.get, run.id)
        since = now.stale.since if now.stale else utc_now()
        if utc_now() - since > self._observer.settings.give_up_after:
            raise error
        log.warning("run cannot be observed", run_id=run.id, reason=error.message)

    async def _launched(self, run_id: str, change: RunChange) -> None:
        """Return once a run has a job or has finished."""
        while True:
            run = await to_thread.run_sync(self._store.get, run_id)
            await self._require_launch(run)
            if run.status.is_terminal or await self._records.may_be_at_provider(run):
                return
            # A launch that is abandoned changes nothing, so look now and then.
            await change.wait(_STORE_INTERVAL, longest=_ABANDONED_INTERVAL)

    async def _require_launch(self, run: TrainingRun) -> None:
        """Require that a run's launch was not interrupted: waiting would never end."""
        if await self._records.is_abandoned(run):
            backend = await self._observer.backend_of(run.backend)
            what = f"wait for run {run.id}, whose launch was interrupted"
            raise backend.unsupported(what, _again(run))

    async def _require_job(self, run: TrainingRun) -> None:
        if not await self._records.may_be_at_provider(run):
            raise RunNotFound(
                f"Run {run.id} has no log because it has no job at its provider yet.",
                hint=_again(run),
                backend=run.backend,
                run_id=run.id,
            )


def is_reached(run: TrainingRun, until: Collection[TrainingStatus], *, fresh: bool = True) -> bool:
    """Return whether a run has one of the statuses, is past it, or has finished.

    Args:
        fresh: The record is up to date; otherwise a status that a run may leave again, such as
            `paused`, does not count.
    """
    known = (status for status in until if fresh or status in ON_THE_WAY)
    return run.status.is_terminal or any(map(run.has_reached, known))


def _again(run: TrainingRun) -> str:
    if run.resumed_from:
        return f"Continue it with `training-backends resume {run.id}`."
    return f"Continue it with `training-backends launch --id {run.id}` and the same configuration."
