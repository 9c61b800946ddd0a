"""The watcher: keeps all live runs of a store up to date, cooperating with other watchers."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Final

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from training_backends.client.leases import Leases
from training_backends.client.poller import Poller, PollerFactory, PollResult
from training_backends.core.backoff import Backoff
from training_backends.core.errors import RunNotFound, StoreError, TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.store import EVENT_SOURCES, Delivery, RunStore

__all__ = ["OnEvent", "Watcher"]

log = get_logger()

OnEvent = Callable[[TrainingRun, LogRecord], Awaitable[None]]
"""Called with the current record of a run and the event."""

NEW_RUNS_INTERVAL: Final = 2.0
"""Seconds until a run launched by another process is noticed."""
_FIRST_TROUBLE, _LONGEST_TROUBLE = 1.0, 60.0
"""Seconds between attempts while a provider cannot be reached."""
_BATCH: Final = 500


class Watcher:
    """Keeps the records of all live runs up to date and delivers events.

    Any number of watchers may share a store, in one process or on several machines. The watcher
    that holds a backend's lease does the sweep, and each event is delivered by one of them. If a
    process is killed, or a watcher cancelled, while `on_event` runs, that event is delivered
    again. An exception from `on_event` ends the watcher; the event is delivered again later.

    Created by `AsyncTrainingClient.watcher`.

    Args:
        on_event: Called with each event.
        only: Names of the backends to watch; None: all.
        sources: Deliver only events of these sources, see `LogRecord`, and leave others to other
            watchers; None: all.
        deliver_results: Copies results that are due.

    Raises:
        ValueError: Records of a source are not delivered.
    """

    def __init__(
        self,
        store: RunStore,
        leases: Leases,
        new_poller: PollerFactory,
        *,
        on_event: OnEvent | None = None,
        only: Collection[str] | None = None,
        sources: Collection[str] | None = None,
        deliver_results: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        sources = {sources} if isinstance(sources, str) else sources
        if sources is not None and (others := set(sources) - EVENT_SOURCES):
            raise ValueError(
                f"sources has {', '.join(sorted(others))}, but only "
                f"{', '.join(sorted(EVENT_SOURCES))} are delivered; read metrics with "
                "`metrics(run, after_step=...)`, and everything with `logs`"
            )
        self._store = store
        self._leases = leases
        self._new_poller = new_poller
        self._on_event = on_event
        self._only = only
        self._sources = sources
        self._deliver_results = deliver_results
        self._pollers: dict[str, Poller] = {}
        self._woken = anyio.Event()

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            StoreError: The store cannot be used.
        """
        failed: list[Exception] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._copying, tasks, failed)
            while not failed:
                woken = self._woken
                for name in await self._names():
                    if name not in self._pollers:
                        tasks.start_soon(self._guarded, name, tasks, failed)
                await _rest(NEW_RUNS_INTERVAL, woken)
        raise failed[0]

    async def _copying(self, tasks: TaskGroup, failed: list[Exception]) -> None:
        """Copy results to the destinations of their runs until cancelled."""
        while self._deliver_results is not None:
            woken = self._woken
            try:
                await self._deliver_results()
            except Exception as error:  # raised by the store
                failed.append(error)
                tasks.cancel_scope.cancel()
            await _rest(NEW_RUNS_INTERVAL, woken)

    def wake(self) -> None:
        """Look for due runs now, in the event loop of `run`: one was just launched."""
        woken, self._woken = self._woken, anyio.Event()
        woken.set()

    async def sweep(self) -> PollResult:
        """Observe all runs that are due, once, and deliver the events.

        Raises:
            TrainingBackendError: A provider cannot be reached.
        """
        asked = details = 0
        for name in await self._names():
            try:
                done = await self._poller(name).poll()
            finally:
                await self._deliver(name)
            asked, details = asked + done.asked, details + done.details
        if self._deliver_results is not None:
            await self._deliver_results()
        return PollResult(asked=asked, details=details)

    async def _names(self) -> list[str]:
        found = await to_thread.run_sync(self._store.backends_to_watch)
        return [name for name in found if self._only is None or name in self._only]

    def _poller(self, name: str) -> Poller:
        if name not in self._pollers:
            self._pollers[name] = self._new_poller(name)
        return self._pollers[name]

    async def _guarded(self, name: str, tasks: TaskGroup, failed: list[Exception]) -> None:
        """Collect an error, so that it is not wrapped in a group, and end all polling."""
        try:
            await self._repeat(name, self._poller(name))
        except Exception as error:  # raised by on_event or the store
            failed.append(error)
            tasks.cancel_scope.cancel()

    async def _repeat(self, name: str, poller: Poller) -> None:
        """Repeat sweeps until cancelled, backing off while the provider cannot be reached."""
        backoff = Backoff(_FIRST_TROUBLE, _LONGEST_TROUBLE)
        while True:
            woken = self._woken
            try:
                await poller.poll()
                pause = await poller.pause(NEW_RUNS_INTERVAL)
                backoff.reset()
            except StoreError:
                raise
            except TrainingBackendError as error:
                log.warning("runs cannot be observed", backend=name, reason=error.message)
                pause = backoff.next()
            await self._deliver(name)
            await _rest(pause, woken)

    async def _deliver(self, name: str) -> None:
        """Pass all undelivered events to `on_event`, in order."""
        if self._on_event is None or not await self._undelivered(name, limit=1):
            return
        async with self._leases.try_hold(f"deliver:{name}") as lease:
            while lease is not None:
                waiting = await self._undelivered(name, limit=_BATCH)
                for event in waiting:
                    try:
                        run = await to_thread.run_sync(self._store.get, event.run_id)
                    except RunNotFound:
                        continue  # deleted in the meantime, with its events
                    await self._on_event(run, event.record)
                    with anyio.CancelScope(shield=True):  # or it is delivered again
                        await to_thread.run_sync(self._store.delivered, [event.id])
                if not waiting:
                    return

    async def _undelivered(self, name: str, *, limit: int) -> Sequence[Delivery]:
        read = partial(self._store.undelivered, backend=name, limit=limit, sources=self._sources)
        return await to_thread.run_sync(read)


async def _rest(seconds: float, woken: anyio.Event) -> None:
    """Sleep until the time has passed or the event is set."""
    with anyio.move_on_after(seconds):
        await woken.wait()
