"""Waiting for runs and reading their logs: all from the store, brought up to date meanwhile."""

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from functools import partial
from typing import Final

import anyio
from anyio import to_thread

from training_backends.client.launch import RunRecords
from training_backends.client.leases import Leases
from training_backends.client.observe import Looks, due_at
from training_backends.client.poller import RoundOf
from training_backends.core.concurrency import run_all
from training_backends.core.errors import (
    ProtocolError,
    RunNotFound,
    StoreError,
    TrainingBackendError,
)
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, TrainingRun, utc_now
from training_backends.store import RunStore

__all__ = ["Following"]

log = get_logger()

_PAGE: Final = 1000
_SHORTEST: Final = 0.05
_STORE_LOOK: Final = 0.5
"""Seconds between two looks into the store, where another process may have written."""
_FOLLOWED: Final = 4
"""A followed run is looked at again after so many times the shortest interval, at most."""
_LONGEST_TROUBLE: Final = 30.0


class Following:
    """Reads logs and waits for ends."""

    def __init__(
        self,
        store: RunStore,
        leases: Leases,
        records: RunRecords,
        looks: Looks,
        round_of: RoundOf,
    ) -> None:
        self._store = store
        self._leases = leases
        self._records = records
        self._looks = looks
        self._round_of = round_of

    async def logs(
        self, run: TrainingRun, *, after: str | None, follow: bool
    ) -> AsyncGenerator[LogRecord, None]:
        """Yield what is stored of a run's log, then what comes."""
        asked = False
        trouble = _SHORTEST
        while True:
            over = await to_thread.run_sync(self._store.is_whole, run.id)
            async with aclosing(self._stored(run.id, after)) as records:
                async for record in records:
                    after = record.cursor
                    yield record
            if over or (asked and not follow):
                return
            run = await to_thread.run_sync(self._store.get, run.id)
            if follow:
                trouble = await self._follow(run, trouble)
            else:
                await self._require_job(run)
                await self._looks.look(run)
                asked = True

    async def wait(self, runs: Collection[TrainingRun]) -> None:
        """Return once all of the runs are over."""
        await run_all(partial(self._launched, run.id) for run in runs)
        by_backend: dict[str, list[str]] = {}
        for run in runs:
            by_backend.setdefault(run.backend, []).append(run.id)
        await run_all(partial(self._ended, name, ids) for name, ids in by_backend.items())

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

    async def _follow(self, run: TrainingRun, trouble: float) -> float:
        """Look at a run if it is time and nobody else does; return the pause after trouble."""
        await self._require_launch(run)
        if not await self._records.may_be_at_provider(run):
            await self._launched(run.id)
            return trouble
        if not await self._looks.sees(run):
            await anyio.sleep(_STORE_LOOK)  # whoever can observe it writes into the store
            return trouble
        shortest, longest = (await self._looks.backend_of(run.backend)).poll_interval
        now = utc_now()
        due = due_at(run, now, (shortest, min(longest, shortest * _FOLLOWED)))
        if due > now:
            await anyio.sleep(min(max((due - now).total_seconds(), _SHORTEST), _STORE_LOOK))
            return trouble
        async with self._leases.try_hold(f"look:{run.id}") as lease:
            if lease is not None:
                try:
                    await self._looks.watch(run)
                except TrainingBackendError as error:
                    await self._bear(run, error)
                else:
                    return _SHORTEST
        await anyio.sleep(trouble)
        return min(trouble * 2, _LONGEST_TROUBLE)

    async def _ended(self, name: str, run_ids: Collection[str]) -> None:
        rounds = self._round_of(name, only=run_ids)
        trouble = _SHORTEST
        await rounds.load()
        while rounds.runs:
            for run in rounds.runs.values():
                await self._require_launch(run)
            try:
                await rounds.go()
                for run in rounds.runs.values():
                    error = rounds.trouble_of(run.id)
                    # A proxy's error page in place of an answer may be gone the next time.
                    if error is not None and not isinstance(error, ProtocolError):
                        await self._bear(run, error)
                pause, trouble = await rounds.pause(_STORE_LOOK), _SHORTEST
            except TrainingBackendError as error:
                for run in rounds.runs.values():
                    await self._bear(run, error)
                pause, trouble = trouble, min(trouble * 2, _LONGEST_TROUBLE)
            await anyio.sleep(pause)
            await rounds.load()

    async def _bear(self, run: TrainingRun, error: TrainingBackendError) -> None:
        """Bear with a provider that cannot be asked now, for as long as the settings say."""
        if isinstance(error, StoreError) or not error.retryable:
            raise error
        now = await to_thread.run_sync(self._store.get, run.id)
        since = now.stale.since if now.stale else utc_now()
        if utc_now() - since > self._looks.settings.give_up_after:
            raise error
        log.warning("run cannot be seen now", run_id=run.id, reason=error.message)

    async def _launched(self, run_id: str) -> None:
        """Return once a run has a job."""
        while True:
            run = await to_thread.run_sync(self._store.get, run_id)
            await self._require_launch(run)
            if run.status.is_terminal or await self._records.may_be_at_provider(run):
                return
            await anyio.sleep(_STORE_LOOK)

    async def _require_launch(self, run: TrainingRun) -> None:
        """Refuse to wait for a run whose launch was cut off: it would stand for ever."""
        if await self._records.is_abandoned(run):
            backend = await self._looks.backend_of(run.backend)
            what = f"wait for the run {run.id}, whose launch was cut off"
            raise backend.unsupported(what, _again(run))

    async def _require_job(self, run: TrainingRun) -> None:
        if not await self._records.may_be_at_provider(run):
            raise RunNotFound(
                f"The run {run.id} has no job at its provider yet, so no log.",
                hint=_again(run),
                backend=run.backend,
                run_id=run.id,
            )


def _again(run: TrainingRun) -> str:
    if run.resumed_from:
        return f"`training-backends resume {run.id}` goes on with it."
    return f"`training-backends launch --id {run.id}` with the same configuration goes on with it."
