"""Follows every live run of a store, together with the other watchers on it."""

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Final

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from training_backends.client.leases import Leases
from training_backends.client.poller import Round, RoundOf, Sweep
from training_backends.core.errors import RunNotFound, StoreError, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.store import RunStore

__all__ = ["OnEvent", "Watcher"]

log = get_logger()

OnEvent = Callable[[TrainingRun, LogRecord], Awaitable[None]]
"""Told of an event, with the run as it stands now."""

_NEW_RUNS: Final = 2.0
"""Seconds within which a run that another process launched is noticed."""
_FIRST_TROUBLE, _LONGEST_TROUBLE = 1.0, 60.0
"""Seconds between two tries while a provider cannot be asked."""
_BATCH: Final = 500


class Watcher:
    """Keeps the records of all live runs up to date and tells of what happens to them.

    Any number of watchers may share a store, in one process or on several machines: each
    sweep of a backend is done by whichever holds its lease at that time, and each event is
    told by one of them, once. Should a process be killed while `on_event` works, that one
    event is told again by the next. An error of `on_event` ends the watcher and leaves the
    event to be told again.

    Made by `AsyncTrainingClient.watcher`.

    Args:
        only: Names of the backends whose runs are watched; None watches all.
    """

    def __init__(
        self,
        store: RunStore,
        leases: Leases,
        round_of: RoundOf,
        *,
        on_event: OnEvent | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self._store = store
        self._leases = leases
        self._round_of = round_of
        self._on_event = on_event
        self._only = only
        self._rounds: dict[str, Round] = {}

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            StoreError: The store cannot be used.
        """
        failed: list[Exception] = []
        async with anyio.create_task_group() as tasks:
            while not failed:
                for name in await self._names():
                    if name not in self._rounds:
                        tasks.start_soon(self._guarded, name, tasks, failed)
                await anyio.sleep(_NEW_RUNS)
        raise failed[0]

    async def sweep(self) -> Sweep:
        """Look at everything whose time has come, once, and tell of what happened.

        Raises:
            TrainingBackendError: A provider cannot be asked.
        """
        asked = details = 0
        for name in await self._names():
            try:
                done = await self._round(name).go()
            finally:
                await self._tell(name)
            asked, details = asked + done.asked, details + done.details
        return Sweep(asked=asked, details=details)

    async def _names(self) -> list[str]:
        found = await to_thread.run_sync(self._store.backends_to_watch)
        return [name for name in found if self._only is None or name in self._only]

    def _round(self, name: str) -> Round:
        if name not in self._rounds:
            self._rounds[name] = self._round_of(name)
        return self._rounds[name]

    async def _guarded(self, name: str, tasks: TaskGroup, failed: list[Exception]) -> None:
        """Keep an error from being wrapped in a group; it ends all rounds."""
        try:
            await self._repeat(name, self._round(name))
        except Exception as error:  # on_event's own, or the store's
            failed.append(error)
            tasks.cancel_scope.cancel()

    async def _repeat(self, name: str, rounds: Round) -> None:
        """Go round for ever; what a provider does not answer is asked again later."""
        trouble = _FIRST_TROUBLE
        while True:
            try:
                await rounds.go()
                pause = await rounds.pause(_NEW_RUNS)
                trouble = _FIRST_TROUBLE
            except StoreError:
                raise
            except TrainingBackendError as error:
                log.warning("runs cannot be seen now", backend=name, reason=error.message)
                pause, trouble = trouble, min(trouble * 2, _LONGEST_TROUBLE)
            await self._tell(name)
            await anyio.sleep(pause)

    async def _tell(self, name: str) -> None:
        """Hand every event that nobody was told of to `on_event`, in order."""
        if self._on_event is None:
            return
        async with self._leases.try_hold(f"tell:{name}") as lease:
            while lease is not None:
                waiting = await to_thread.run_sync(
                    partial(self._store.undelivered, backend=name, limit=_BATCH)
                )
                for event in waiting:
                    try:
                        run = await to_thread.run_sync(self._store.get, event.run_id)
                    except RunNotFound:
                        continue  # deleted meanwhile, with its events
                    await self._on_event(run, event.record)
                    await to_thread.run_sync(self._store.delivered, [event.id])
                if not waiting:
                    return
