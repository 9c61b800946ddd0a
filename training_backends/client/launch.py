"""The records of runs on their way to a provider: launched once, continued, brought up to date."""

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
from anyio import to_thread

from training_backends.client.journal import LaunchWatch, StoreJournal
from training_backends.client.leases import Leases
from training_backends.client.observe import Looks, report_change
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
from training_backends.core.run import Failure, RunState, TrainingRun, new_run_id
from training_backends.core.status import TrainingStatus
from training_backends.datasets.scan import digested
from training_backends.store import Lease, RunStore

__all__ = ["LAUNCH_PATIENCE", "RunRecords", "Start", "Steering"]

Start = Callable[[TrainingRun, Journal], Awaitable[RunState]]
"""Has a backend start a run: `launch`, or `resume` from another one."""
_CHECKPOINT = "checkpoint"
"""Journal step that remembers from where a resumed run starts."""
_DATA = "data files"
"""Journal step that remembers the content of the data files at launch."""


class RunRecords:
    """What the client does with its store besides reading it."""

    def __init__(self, store: RunStore, leases: Leases) -> None:
        self._store = store
        self._leases = leases

    async def known(self, run_id: str) -> TrainingRun | None:
        """Return the run with exactly this id, or None."""
        try:
            return await to_thread.run_sync(self._store.get, run_id)
        except RunNotFound:
            return None

    async def remember_data(self, run_id: str, files: Iterable[DataFile]) -> None:
        """Store size, time and digest of the data files that a run is launched on."""

        def store() -> None:
            self._store.finish(run_id, _DATA, list(_contents(files)))

        await to_thread.run_sync(store)

    async def changed_data(self, run_id: str) -> list[str]:
        """Return the paths of the data files whose content differs from that at launch."""
        entry = await to_thread.run_sync(self._store.entry, run_id, _DATA)
        if entry is None or not isinstance(entry.result, list):
            return []  # launched by an earlier version, or rebuilt from a damaged store
        known: list[Any] = entry.result
        return await to_thread.run_sync(
            lambda: [str(file["path"]) for file in known if _has_changed(file)]
        )

    async def notice_known(self, run: TrainingRun, watch: LaunchWatch) -> None:
        """Say of a repeated launch what it does not do, and whether the data has changed."""
        if run.status.is_terminal or await self.was_launched(run):
            watch.notice(f"Run {run.id} already exists ({run.status}); nothing launched.")
        for path in await self.changed_data(run.id):
            watch.notice(f"The data file {path} has changed since the run {run.id} was launched.")

    async def has_open_step(self, run_id: str) -> bool:
        """Tell whether a step was begun whose outcome is not known."""
        return await to_thread.run_sync(self._store.has_open_step, run_id)

    async def was_launched(self, run: TrainingRun) -> bool:
        """Tell whether the provider has accepted the run's start."""
        entry = await to_thread.run_sync(self._store.entry, run.id, LAUNCHED)
        return entry is not None

    async def may_be_at_provider(self, run: TrainingRun) -> bool:
        """Tell whether asking the provider for the run makes sense."""
        return run.remote_id is not None or await self.was_launched(run)

    async def is_abandoned(self, run: TrainingRun) -> bool:
        """Tell whether a run will stand still, because nobody launches it any more."""
        if run.status not in {TrainingStatus.PENDING, TrainingStatus.READY}:
            return False
        # In this order: a launch that ends between the two looks has left its mark.
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
        """Have the backend start a recorded run, unless it was started before.

        Args:
            lease: Held as long as this goes on; without it, nothing is begun any more.
        """
        run = await to_thread.run_sync(self._store.get, run_id)
        if run.status.is_terminal or await self.was_launched(run):
            return run
        journal = StoreJournal(self._store, run_id, watch, lease)
        try:
            with about("launch", run):
                state = await start(run.model_copy(update={"failure": None}), journal)
        except TrainingBackendError as error:
            error.run_id = error.run_id or run_id
            await self._launch_failed(run, error)
            raise

        async def accepted() -> str:
            return state.remote_id or run_id

        await journal.step(LAUNCHED, accepted, repeatable=True)
        return await self.saw(run, state, accepted=True)

    def resuming(
        self, backend: TrainingBackend, source: TrainingRun, checkpoint: str | None
    ) -> Start:
        """Return what starts a run as the continuation of `source`."""

        async def start(run: TrainingRun, journal: Journal) -> RunState:
            async def choose() -> str | None:
                return checkpoint

            # A repeated resumption goes on from where the first one was asked to.
            chosen = await journal.step(_CHECKPOINT, choose, repeatable=True)
            wanted = checkpoint if chosen is None else str(chosen)
            if checkpoint not in {None, wanted}:
                raise DuplicateRun(
                    f"The run {run.id!r} is being resumed from {wanted} already.",
                    hint="Leave the checkpoint out, or choose another --id.",
                    other=run.id,
                )
            try:
                return await backend.resume(source, run, journal, checkpoint=wanted)
            except (ConfigError, UnsupportedOperation):
                # It cannot start there: the next try may name another one, or none.
                await to_thread.run_sync(self._store.forget, run.id, _CHECKPOINT)
                raise

        return start

    async def saw(
        self, run: TrainingRun, state: RunState, *, accepted: bool = False
    ) -> TrainingRun:
        """Store the state of a run and return the run with it.

        Args:
            accepted: Whether it comes from a provider that has accepted the launch. Otherwise
                there is no job, and so no log to be read later.
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
        """Remember why a launch did not work; only a refused price ends the run."""
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
            found, digest = file.path.stat(), digested(file).sha256
        except OSError:
            continue  # the backend says so, if it needs the file
        yield {
            "path": str(file.path),
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "sha256": digest,
        }


def _has_changed(known: dict[str, Any]) -> bool:
    """Compare a file with what was stored of it; it is read only if size and time leave doubt."""
    path = Path(known["path"])
    try:
        found = path.stat()
        if found.st_size != known["size"]:
            return True
        if found.st_mtime_ns == known["mtime_ns"]:
            return False
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest != str(known["sha256"])
    except OSError:
        return True


LAUNCH_PATIENCE: Final = 5.0
"""Seconds for which a stop waits for a launch going on elsewhere to have a job."""


class Steering:
    """Stops runs and resumes them."""

    def __init__(self, store: RunStore, leases: Leases, records: RunRecords, looks: Looks) -> None:
        self._store = store
        self._leases = leases
        self._records = records
        self._looks = looks

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool) -> TrainingRun:
        """Ask the provider to end a run; cancel one that it does not have."""
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

    async def resume(
        self, run: TrainingRun, watch: LaunchWatch, *, checkpoint: str | None, new_id: str | None
    ) -> TrainingRun:
        """Continue a run as a new one; go on with the launch of one that was cut off."""
        backend = await self._looks.backend_of(run.backend)
        launched = await self._records.was_launched(run)
        if not run.status.is_terminal and not launched:
            return await self._launch_again(run, watch, checkpoint)
        if run.status not in {TrainingStatus.FAILED, TrainingStatus.CANCELLED}:
            raise backend.unsupported(
                f"resume a run that is {run.status}", "Only a failed or cancelled run is resumed."
            )
        if not backend.capabilities.resumes:
            raise backend.unsupported(
                "resume a run", "Launch its configuration again under a new id."
            )
        if not (launched or run.remote_id or await self._records.has_open_step(run.id)):
            raise UnsupportedOperation(
                f"The run {run.id!r} was never started, so there is nothing to resume.",
                hint="Launch its configuration again under a new id.",
                backend=run.backend,
                run_id=run.id,
            )
        new_run = new_run_record(
            new_run_id() if new_id is None else new_id, run.backend, run.config
        )
        new_run = new_run.model_copy(update={"resumed_from": run.id})
        async with self._leases.hold(launch_lease(new_run.id)) as lease:
            known = await self._records.known(new_run.id)
            if known is None:
                if not backend.capabilities.quotes:
                    # The best that is known of the price: what the run that it continues takes.
                    await watch.decide(run.estimate or Estimate(), run.config.budget)
                await to_thread.run_sync(self._store.insert, new_run)
            else:
                require_same(known, new_run)
            start = self._records.resuming(backend, run, checkpoint)
            return await self._records.launch(new_run.id, watch, start, lease=lease)

    async def discard(self, run: TrainingRun) -> TrainingRun:
        """Cancel a draft that certainly never reached its provider; leave any other run alone."""
        if await self._records.may_be_at_provider(run):
            return run
        if await self._records.has_open_step(run.id):
            raise UnsupportedOperation(
                f"The launch of the run {run.id!r} was cut off, and the provider may have a job "
                "for it.",
                hint="Repeat the launch to find out, or stop the run before you delete it.",
                backend=run.backend,
                run_id=run.id,
            )
        return await self._cancel_unlaunched(run)

    async def _stop_at_provider(self, run: TrainingRun, *, save_checkpoint: bool) -> TrainingRun:
        backend = await self._looks.backend_of(run.backend)
        with about("stop", run):
            await backend.stop(run, save_checkpoint=save_checkpoint)
        return await self._looks.look(run)

    async def _cancel_unlaunched(self, run: TrainingRun) -> TrainingRun:
        """Cancel a run that its provider does not have; leave it alone if it got there meanwhile.

        Done under the launch's lease: a launch going on elsewhere would start what is
        recorded as over here, and nobody would look at it again.
        """
        with anyio.move_on_after(LAUNCH_PATIENCE):
            async with self._leases.hold(launch_lease(run.id)):
                now = await to_thread.run_sync(self._store.get, run.id)
                if now.remote_id == run.remote_id and not await self._records.was_launched(now):
                    return await self._records.saw(now, ended_state(TrainingStatus.CANCELLED))
                return now
        now = await to_thread.run_sync(self._store.get, run.id)
        if now.remote_id == run.remote_id and not now.status.is_terminal:
            backend = await self._looks.backend_of(run.backend)
            raise backend.unsupported(
                "stop a run that is just being launched",
                "End the program that launches it, or try again in a while.",
            )
        return now

    async def _launch_again(
        self, run: TrainingRun, watch: LaunchWatch, checkpoint: str | None
    ) -> TrainingRun:
        """Go on with a launch that was cut off, as what it was: a start or a resumption."""
        backend = await self._looks.backend_of(run.backend)
        start: Start = backend.launch
        if run.resumed_from is not None:
            source = await to_thread.run_sync(self._store.get, run.resumed_from)
            start = self._records.resuming(backend, source, checkpoint)
        async with self._leases.hold(launch_lease(run.id)) as lease:
            return await self._records.launch(run.id, watch, start, lease=lease)
