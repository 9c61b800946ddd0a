"""Launching, stopping and resuming runs, each launch at most once."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
from anyio import to_thread

from training_backends.client.journal import (
    FindingJournal,
    LaunchWatch,
    StoreJournal,
    may_create_job,
)
from training_backends.client.leases import Leases
from training_backends.client.observe import Observer, report_change
from training_backends.client.run_record import (
    LAUNCHED,
    about,
    ended_state,
    failure_kind,
    launch_lease,
    new_run_record,
    require_same,
    with_state,
)
from training_backends.core.backend import Journal, TrainingBackend
from training_backends.core.dataset import DataFile
from training_backends.core.errors import (
    BudgetExceeded,
    ConfigError,
    DuplicateRun,
    RunNotFound,
    TrainingBackendError,
    UnsupportedOperation,
)
from training_backends.core.estimate import Estimate
from training_backends.core.files import digest_of
from training_backends.core.run import Failure, RunState, TrainingRun, new_run_id
from training_backends.core.status import TrainingStatus
from training_backends.store import Lease, RunStore

__all__ = ["LAUNCH_PATIENCE", "RunRecords", "Start", "Steering"]

Start = Callable[[TrainingRun, Journal], Awaitable[RunState]]
"""Starts a run at its backend: `launch`, or `resume` from another run."""
_CHECKPOINT = "checkpoint"
"""Journal step that stores the checkpoint a resumed run starts from."""
_DATA = "data files"
"""Journal step that stores the digests of the data files at launch."""


Localize = Callable[[TrainingRun], Awaitable[TrainingRun]]
"""Returns a run as its backend sees it: with the paths of data that was fetched."""


class RunRecords:
    """Updates the run store during launches."""

    def __init__(self, store: RunStore, leases: Leases, localize: Localize) -> None:
        self._store = store
        self._leases = leases
        self._localize = localize

    async def known(self, run_id: str) -> TrainingRun | None:
        """Return the run with exactly this id, or None."""
        try:
            return await to_thread.run_sync(self._store.get, run_id)
        except RunNotFound:
            return None

    async def remember_data(self, run_id: str, files: Iterable[DataFile]) -> None:
        """Store size, modification time and digest of a run's data files."""

        def store() -> None:
            self._store.finish(run_id, _DATA, list(_contents(files)))

        await to_thread.run_sync(store)

    async def changed_data(self, run_id: str) -> list[str]:
        """Return the paths of data files that have changed since the launch."""
        entry = await to_thread.run_sync(self._store.entry, run_id, _DATA)
        if entry is None or not isinstance(entry.result, list):
            return []  # launched by an earlier version, or restored from a damaged store
        known: list[Any] = entry.result
        return await to_thread.run_sync(
            lambda: [str(file["path"]) for file in known if _has_changed(file)]
        )

    async def notice_known(
        self, run: TrainingRun, watch: LaunchWatch, changed: Sequence[str] = ()
    ) -> None:
        """Notify the user that the run already exists, and of changed data files.

        Args:
            changed: URLs of remote data that has changed.
        """
        if run.status.is_terminal or await self.was_launched(run):
            watch.notice(f"Run {run.id} already exists ({run.status}); nothing launched.")
        for path in (*changed, *await self.changed_data(run.id)):
            watch.notice(f"Data file {path} has changed since run {run.id} was launched.")

    async def has_open_step(self, run_id: str) -> bool:
        """Return whether the outcome of a journal step is unknown."""
        return await to_thread.run_sync(self._store.has_open_step, run_id)

    async def was_launched(self, run: TrainingRun) -> bool:
        """Return whether the provider has accepted the launch."""
        entry = await to_thread.run_sync(self._store.entry, run.id, LAUNCHED)
        return entry is not None

    async def may_be_at_provider(self, run: TrainingRun) -> bool:
        """Return whether the provider may have a job for the run."""
        return run.remote_id is not None or await self.was_launched(run)

    async def is_abandoned(self, run: TrainingRun) -> bool:
        """Return whether a run's launch was interrupted and no process continues it."""
        if run.status not in {TrainingStatus.PENDING, TrainingStatus.READY}:
            return False
        # In this order: a launch that finishes between the two checks is found by the second.
        launching = await to_thread.run_sync(self._leases.is_held, launch_lease(run.id))
        return not launching and not await self.was_launched(run)

    async def launch(
        self,
        run_id: str,
        watch: LaunchWatch,
        start: Start,
        *,
        lease: Lease,
    ) -> TrainingRun:
        """Start a recorded run at its backend, unless it was already started.

        Args:
            lease: Held for the whole launch; if it is lost, no further step is begun.
        """
        run = await to_thread.run_sync(self._store.get, run_id)
        if run.status.is_terminal or await self.was_launched(run):
            return run
        journal = StoreJournal(self._store, run_id, watch, lease, leases=self._leases)
        try:
            with about("launch", run):
                seen = await self._localize(run.model_copy(update={"failure": None}))
                state = await start(seen, journal)
        except TrainingBackendError as error:
            error.run_id = error.run_id or run_id
            await self._launch_failed(run, error)
            raise

        async def accepted() -> str:
            return state.remote_id or run_id

        await journal.step(LAUNCHED, accepted, repeatable=True)
        return await self.saw(run, state, accepted=True)

    async def find_job(self, run: TrainingRun, start: Start, *, lease: Lease) -> bool:
        """Find and record the job that an interrupted launch may have created.

        Returns:
            Whether there is one.

        Raises:
            UnsupportedOperation: It cannot be found out.
            TrainingBackendError: The provider cannot be asked.
        """
        if not may_create_job(await self._steps(run.id)):
            return False
        journal = FindingJournal(self._store, run.id, lease, self._leases)
        try:
            with about("stop", run):
                state = await start(await self._localize(run), journal)
                await journal.record(state)
        except Exception:  # also a group with it
            if journal.has_job is None:
                raise
        # The replay took a different path, for example because a data file has changed.
        if not journal.has_job and may_create_job(await self._steps(run.id) - journal.replayed):
            raise _interrupted(run, "Repeat the launch to find out, then stop the run.")
        return bool(journal.has_job)

    async def _steps(self, run_id: str) -> frozenset[str]:
        names = await to_thread.run_sync(self._store.step_names, run_id)
        return names - {_CHECKPOINT, _DATA}

    def resuming(
        self, backend: TrainingBackend, source: TrainingRun, checkpoint: str | None
    ) -> Start:
        """Return the `Start` that resumes `source`."""

        async def start(run: TrainingRun, journal: Journal) -> RunState:
            async def choose() -> str | None:
                return checkpoint

            # A repeated resume uses the checkpoint chosen first.
            chosen = await journal.step(_CHECKPOINT, choose, repeatable=True)
            wanted = checkpoint if chosen is None else str(chosen)
            if checkpoint not in {None, wanted}:
                raise DuplicateRun(
                    f"Run {run.id!r} is already being resumed from {wanted}.",
                    hint="Omit the checkpoint, or choose another --id.",
                    other=run.id,
                )
            try:
                before = await self._localize(source)
                return await backend.resume(before, run, journal, checkpoint=wanted)
            except (ConfigError, UnsupportedOperation):
                # This checkpoint is not usable; the next attempt may choose another.
                await to_thread.run_sync(self._store.forget, run.id, _CHECKPOINT)
                raise

        return start

    async def saw(
        self, run: TrainingRun, state: RunState, *, accepted: bool = False
    ) -> TrainingRun:
        """Store the state of a run and return the updated run.

        Args:
            accepted: Whether the provider has accepted the launch. Otherwise there is no job,
                and so no log to read later.
        """

        def change(now: TrainingRun) -> TrainingRun:
            if accepted:
                now = now.model_copy(update={"failure": None})
            return with_state(now, state)

        seen = await to_thread.run_sync(
            partial(self._store.launched, run.id, change, whole=not accepted)
        )
        report_change(run, seen, state)
        return seen

    async def _launch_failed(self, run: TrainingRun, error: TrainingBackendError) -> None:
        """Store why a launch failed; only an exceeded budget ends the run."""
        if isinstance(error, BudgetExceeded):
            failure = Failure(kind="quota", message=error.message)
            ended = ended_state(TrainingStatus.CANCELLED, failure)
            await self.saw(run, ended)
            return
        failure = Failure(kind=failure_kind(error), message=error.message, retryable=True)
        await to_thread.run_sync(
            self._store.update, run.id, lambda now: now.model_copy(update={"failure": failure})
        )


def _contents(files: Iterable[DataFile]) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            found, digest = file.path.stat(), digest_of(file.path).sha256
        except OSError:
            continue  # the backend raises an error if it needs the file
        yield {
            "path": str(file.path),
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "sha256": digest,
        }


def _has_changed(known: dict[str, Any]) -> bool:
    """Return whether a file has changed; it is read only if its modification time differs."""
    path = Path(known["path"])
    try:
        found = path.stat()
        if found.st_size != known["size"]:
            return True
        if found.st_mtime_ns == known["mtime_ns"]:
            return False
        return digest_of(path).sha256 != str(known["sha256"])
    except OSError:
        return True


LAUNCH_PATIENCE: Final = 5.0
"""Seconds that `stop` waits for another process that is launching the run."""


class Steering:
    """Stops, resumes and discards runs."""

    def __init__(
        self, store: RunStore, leases: Leases, records: RunRecords, observer: Observer
    ) -> None:
        self._store = store
        self._leases = leases
        self._records = records
        self._observer = observer

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool) -> TrainingRun:
        """Ask the provider to stop a run; cancel a run without a job."""
        if run.status.is_terminal:
            return run
        if await self._records.may_be_at_provider(run):
            try:
                return await self._stop_at_provider(run, save_checkpoint=save_checkpoint)
            except RunNotFound:
                if await self._records.was_launched(run):
                    raise
        run = await self._cancel_unlaunched(run)
        if run.status.is_terminal:
            return run
        return await self._stop_at_provider(run, save_checkpoint=save_checkpoint)

    async def pause(self, run: TrainingRun) -> TrainingRun:
        """Ask the provider to pause a run that is in progress."""
        backend = await self._able_to_pause(run, "pause")
        if run.status in {TrainingStatus.PAUSED, TrainingStatus.STOPPING}:
            return run
        with about("pause", run):
            await backend.pause(run)
        return await self._observer.observe(run)

    async def unpause(self, run: TrainingRun) -> TrainingRun:
        """Ask the provider to continue a paused run in place."""
        backend = await self._able_to_pause(run, "unpause")
        if run.status is TrainingStatus.STOPPING:
            raise backend.unsupported(
                "unpause a run that is stopping", "If it is being paused, wait until it is paused."
            )
        if run.status is not TrainingStatus.PAUSED:
            return run
        with about("unpause", run):
            await backend.unpause(run)
        return await self._observer.observe(run)

    async def _able_to_pause(self, run: TrainingRun, verb: str) -> TrainingBackend:
        backend = await self._observer.backend_of(run.backend)
        if not backend.capabilities.pauses:
            raise backend.unsupported("pause runs", "Stop the run, and resume it later.")
        if run.status.is_terminal or not await self._records.was_launched(run):
            state = run.status if run.status.is_terminal else "not launched"
            raise backend.unsupported(f"{verb} a run that is {state}")
        return backend

    async def resume(
        self, run: TrainingRun, watch: LaunchWatch, *, checkpoint: str | None, new_id: str | None
    ) -> TrainingRun:
        """Continue a run as a new one, or continue its interrupted launch."""
        backend = await self._observer.backend_of(run.backend)
        launched = await self._records.was_launched(run)
        if not run.status.is_terminal and not launched:
            return await self._launch_again(run, watch, checkpoint)
        if backend.capabilities.resumes == "no":
            raise backend.unsupported(
                "resume a run", "Launch its configuration again under a new id."
            )
        if checkpoint is not None and backend.capabilities.resumes == "anew":
            raise backend.unsupported(
                "resume from a checkpoint", "Omit the checkpoint to train from the start."
            )
        if run.status not in {TrainingStatus.FAILED, TrainingStatus.CANCELLED}:
            raise backend.unsupported(
                f"resume a run that is {run.status}",
                "Unpause it instead."
                if run.status is TrainingStatus.PAUSED
                else "Resume failed or cancelled runs only.",
            )
        if not (launched or run.remote_id or await self._records.has_open_step(run.id)):
            raise UnsupportedOperation(
                f"Run {run.id!r} was never started, so there is nothing to resume.",
                hint="Launch its configuration again under a new id.",
                backend=run.backend,
                run_id=run.id,
            )
        new_run = new_run_record(
            new_run_id() if new_id is None else new_id, run.backend, run.config
        )
        # The best available estimate is that of the run being continued.
        update = {"resumed_from": run.id, "estimate": run.estimate}
        new_run = new_run.model_copy(update=update)
        async with self._leases.hold(launch_lease(new_run.id)) as lease:
            known = await self._records.known(new_run.id)
            if known is None:
                if not backend.capabilities.quotes:
                    await watch.decide(run.estimate or Estimate(), run.config.budget)
                await to_thread.run_sync(self._store.insert, new_run)
                watch.updated(new_run)
            else:
                require_same(known, new_run)
            start = self._records.resuming(backend, run, checkpoint)
            return await self._records.launch(new_run.id, watch, start, lease=lease)

    async def discard(self, run: TrainingRun) -> TrainingRun:
        """Cancel a draft that never reached its provider; return any other run unchanged."""
        if await self._records.may_be_at_provider(run):
            return run
        if await self._records.has_open_step(run.id):
            raise _interrupted(run, "Stop the run before deleting it.")
        return await self._cancel_unlaunched(run)

    async def _stop_at_provider(self, run: TrainingRun, *, save_checkpoint: bool) -> TrainingRun:
        backend = await self._observer.backend_of(run.backend)
        with about("stop", run):
            await backend.stop(run, save_checkpoint=save_checkpoint)
        return await self._observer.observe(run)

    async def _cancel_unlaunched(self, run: TrainingRun) -> TrainingRun:
        """Cancel a run without a job; return it unchanged if it has one by now.

        Takes the launch's lease: otherwise another process could launch a job for a run that is
        recorded as cancelled and no longer observed.
        """
        async with AsyncExitStack() as held:
            lease = None
            with anyio.move_on_after(LAUNCH_PATIENCE):
                lease = await held.enter_async_context(self._leases.hold(launch_lease(run.id)))
            now = await to_thread.run_sync(self._store.get, run.id)
            if now.remote_id != run.remote_id or now.status.is_terminal:
                return now
            if lease is None:
                backend = await self._observer.backend_of(run.backend)
                raise backend.unsupported(
                    "stop a run that is being launched",
                    "Stop the program that is launching it, or try again later.",
                )
            if await self._records.was_launched(now):
                return now
            if now.remote_id is None:
                start = await self._start_of(now, None)
                if await self._records.find_job(now, start, lease=lease):
                    return await to_thread.run_sync(self._store.get, run.id)
            return await self._records.saw(now, ended_state(TrainingStatus.CANCELLED))

    async def _launch_again(
        self, run: TrainingRun, watch: LaunchWatch, checkpoint: str | None
    ) -> TrainingRun:
        """Continue an interrupted launch or resume."""
        start = await self._start_of(run, checkpoint)
        async with self._leases.hold(launch_lease(run.id)) as lease:
            return await self._records.launch(run.id, watch, start, lease=lease)

    async def _start_of(self, run: TrainingRun, checkpoint: str | None) -> Start:
        """Return what launches or resumes a run at its backend."""
        backend = await self._observer.backend_of(run.backend)
        if run.resumed_from is None:
            return backend.launch
        source = await to_thread.run_sync(self._store.get, run.resumed_from)
        return self._records.resuming(backend, source, checkpoint)


def _interrupted(run: TrainingRun, hint: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"The launch of run {run.id!r} was interrupted, and the provider may have a job for it.",
        hint=hint,
        backend=run.backend,
        run_id=run.id,
    )
