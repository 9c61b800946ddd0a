"""Running a configuration to its end, with resumptions after temporary failures."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Final, Protocol

import anyio
from anyio import get_cancelled_exc_class, to_thread

from training_backends.client.follow import Following
from training_backends.client.launch import RunRecords
from training_backends.client.notebook import NotebookProgress
from training_backends.core.errors import RunNotFound, TrainingBackendError, UnsupportedOperation
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, RunFailed, TrainingRun, run_id_from
from training_backends.core.status import TrainingStatus
from training_backends.store import RunStore

__all__ = ["Attempts", "OnRecord"]

log = get_logger()

OnRecord = Callable[[LogRecord], object]
"""Called with each record of a run's log, in order."""

_STOPPED_ON_CANCEL: Final = "stopped on cancel"
"""Journal entry of a run that was stopped because the call that followed it was cancelled."""
_STOP_PATIENCE: Final = 60.0
"""Seconds that a cancelled call waits for the provider to accept the stop."""


class _Resume(Protocol):
    def __call__(self, run_id: str, *, new_id: str | None = None) -> Awaitable[TrainingRun]: ...


class Attempts:
    """Follows a run to its end and resumes it as `ID-r1`, `ID-r2` after temporary failures.

    Args:
        stop: Asks the provider to stop a run.
        resume: Continues a failed run as a new one, or an interrupted resumption.
    """

    def __init__(
        self,
        store: RunStore,
        records: RunRecords,
        following: Following,
        *,
        stop: Callable[[str], Awaitable[TrainingRun]],
        resume: _Resume,
    ) -> None:
        self._store = store
        self._records = records
        self._following = following
        self._stop = stop
        self._resume = resume

    async def run(
        self,
        run_id: str,
        launch: Callable[[], Awaitable[TrainingRun]],
        *,
        attempts: int,
        follow: bool,
        on_record: OnRecord | None,
        progress: NotebookProgress | None,
        stop_on_cancel: bool,
    ) -> TrainingRun:
        """Return the completed run, or the newest; see `AsyncTrainingClient.run`."""
        current = run_id
        try:
            await launch()
            run, number = await self._newest(run_id)
            while True:
                current = run.id
                if follow:
                    run = await self._finished(run, on_record, progress)
                elif not run.status.is_terminal:
                    return run
                if run.status is TrainingStatus.COMPLETED:
                    return run
                if number >= attempts or not await self._may_resume(run):
                    raise _failed(run)
                current = _attempt_id(run_id, number)
                run = await self._resumed(run, current)
                number += 1
        except get_cancelled_exc_class():
            if stop_on_cancel:
                await self._stop_cancelled(current, progress)
            raise

    async def note_stop(self, run_id: str) -> None:
        """Note that a run was stopped with its caller, so that a repeated call resumes it."""
        note = partial(self._store.finish, run_id, _STOPPED_ON_CANCEL, result=True)
        await to_thread.run_sync(note)

    async def _newest(self, run_id: str) -> tuple[TrainingRun, int]:
        """Return the last attempt made by this or an earlier call, and its number."""
        run = await to_thread.run_sync(self._store.get, run_id)
        number = 1
        while (later := await self._records.known(_attempt_id(run_id, number))) is not None:
            if later.resumed_from != run.id:
                break
            run, number = later, number + 1
        if not run.status.is_terminal and not await self._records.was_launched(run):
            run = await self._resume(run.id)  # an earlier call ended in the middle of it
        return run, number

    async def _finished(
        self, run: TrainingRun, on_record: OnRecord | None, progress: NotebookProgress | None
    ) -> TrainingRun:
        """Return a run once it has finished, after reporting its records."""
        if progress is not None:
            progress.show(run)
        found = self._following.logs(run, after=None, tail=None, follow=True)
        async with aclosing(found) as records:
            async for record in records:
                if on_record is not None:
                    on_record(record)
                if progress is not None and progress.is_due(record):
                    progress.show(await to_thread.run_sync(self._store.get, run.id))
        run = await to_thread.run_sync(self._store.get, run.id)
        if progress is not None:
            progress.show(run)
        return run

    async def _may_resume(self, run: TrainingRun) -> bool:
        if run.status is TrainingStatus.FAILED:
            return run.failure is not None and run.failure.retryable
        return await to_thread.run_sync(self._store.entry, run.id, _STOPPED_ON_CANCEL) is not None

    async def _resumed(self, run: TrainingRun, new_id: str) -> TrainingRun:
        reason = run.failure.message if run.failure else "it was stopped with its caller"
        log.warning("run is resumed", run_id=run.id, new_run_id=new_id, reason=reason)
        try:
            return await self._resume(run.id, new_id=new_id)
        except UnsupportedOperation as error:
            raise _failed(run) from error

    async def _stop_cancelled(self, run_id: str, progress: NotebookProgress | None) -> None:
        with anyio.move_on_after(_STOP_PATIENCE, shield=True) as limit:
            try:
                with suppress(RunNotFound):  # nothing was launched yet
                    await self._stop(run_id)
                    await self.note_stop(run_id)
                    if progress is not None:
                        progress.show(await to_thread.run_sync(self._store.get, run_id))
            except TrainingBackendError as error:
                log.warning("run not stopped", run_id=run_id, reason=error.message)
        if limit.cancelled_caught:
            log.warning("run not stopped", run_id=run_id, reason="its provider did not answer")


def _attempt_id(run_id: str, number: int) -> str:
    return run_id_from(f"{run_id}-r{number}")


def _failed(run: TrainingRun) -> RunFailed:
    if run.status is TrainingStatus.FAILED:
        reason = f" failed: {run.failure.message}" if run.failure else " failed."
    else:
        reason = " was cancelled."
    return RunFailed(
        f"Run {run.id!r}{reason}",
        run=run,
        hint=f"Read its log with `training-backends logs {run.id}`.",
        backend=run.backend,
        run_id=run.id,
        retryable=bool(run.failure and run.failure.retryable),
    )
