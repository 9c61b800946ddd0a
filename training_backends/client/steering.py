"""What is asked of a run after its launch: to end, or to go on."""

from typing import Final

import anyio
from anyio import to_thread

from training_backends.client.journal import LaunchWatch
from training_backends.client.launch import RunRecords, Start
from training_backends.client.leases import Leases
from training_backends.client.observe import Looks
from training_backends.client.run_record import (
    about,
    ended_state,
    launch_lease,
    new_run_record,
    require_same,
)
from training_backends.core.errors import RunNotFound, UnsupportedOperation
from training_backends.core.estimate import Estimate
from training_backends.core.run import TrainingRun, new_run_id
from training_backends.core.status import TrainingStatus
from training_backends.store import RunStore

__all__ = ["LAUNCH_PATIENCE", "Steering"]

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
