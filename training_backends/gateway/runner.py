"""Run jobs: one task per job, from validation to the end, resumed after a restart.

A task depends on the job's row only, so it can stop at any moment and be started again:
validation is repeated, `client.launch` with the job's id never starts a second run, and the log
is followed from the stored cursor.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeVar

import anyio
import sqlalchemy as sa
import structlog
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectReceiveStream

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import (
    BackendBroken,
    DatasetError,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.logging import get_logger
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.gateway.errors import HTTPProblem, is_temporary
from training_backends.gateway.files import FileService
from training_backends.gateway.jobstore import (
    NOT_ENDED,
    add_event,
    add_metrics,
    change_status,
    effective,
    error_data,
    finish_job,
    issue_data,
    load_job,
    quote,
)
from training_backends.gateway.store import ENDED, GatewayStore, jobs
from training_backends.protocols.mistral.status import to_wire

__all__ = ["JobRunner", "OnEnd"]

log = get_logger()

OnEnd = Callable[[str], Awaitable[None]]
"""Called with the id of a finished job."""
_T = TypeVar("_T")

_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0
"""Seconds between attempts while a backend is unavailable."""
_POLL_SECONDS: Final = 5.0
"""Seconds between two status polls of a running job, in addition to its log."""
_BATCH: Final = 500
"""Maximum log records per transaction."""
_TRIES_BEFORE_EVENT: Final = 3
_WAITING: Final = "The gateway cannot continue this job at the moment; it will retry."
_TRANSITIONS: Final[dict[str, tuple[str, ...]]] = {
    "STARTED": ("QUEUED",),
    "RUNNING": ("QUEUED", "STARTED"),
    "CANCELLATION_REQUESTED": ("QUEUED", "STARTED", "RUNNING"),
}
"""Statuses that a backend may report for a started job, and the statuses they may follow."""

_STATUSES: Final = {status.value: status for status in TrainingStatus}


class JobRunner:
    """The tasks of all unfinished jobs, in the given task group."""

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        files: FileService,
        tasks: TaskGroup,
        *,
        organization_id: str,
        on_end: OnEnd,
    ) -> None:
        self._store = store
        self._client = client
        self._files = files
        self._tasks = tasks
        self._organization_id = organization_id
        self._on_end = on_end
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._again: set[str] = set()
        self._stops: dict[str, anyio.Event] = {}
        # Validation reads all data; two at a time keep the machine responsive.
        self._validating = anyio.Semaphore(2)

    async def take_up(self) -> None:
        """Resume every unfinished job after a restart."""
        query = sa.select(jobs.c.id).where(jobs.c.status.not_in(ENDED)).order_by(jobs.c.created_at)
        for job_id in await self._store.aread(lambda c: c.execute(query).scalars().all()):
            self.watch(job_id)

    def watch(self, job_id: str) -> None:
        """Drive a job whose row has changed; safe to repeat."""
        if job_id in self._scopes:
            self._again.add(job_id)
            return
        self._scopes[job_id] = anyio.CancelScope()
        self._tasks.start_soon(self._task, job_id, self._scopes[job_id])

    def drop(self, job_id: str) -> None:
        """Cancel the task of a job that was cancelled before its start."""
        if job_id in self._scopes:
            self._scopes[job_id].cancel()

    def stop(self, job_id: str) -> None:
        """Stop a job's run, now or as soon as it is launched."""
        self._stop_event(job_id).set()
        self.watch(job_id)

    def _stop_event(self, job_id: str) -> anyio.Event:
        return self._stops.setdefault(job_id, anyio.Event())

    async def _task(self, job_id: str, scope: anyio.CancelScope) -> None:
        # A task inherits the context of the request that started it.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id, run_id=job_id)
        try:
            with scope:
                await self._guarded(job_id)
        finally:
            del self._scopes[job_id]
        if job_id in self._again:
            self._again.discard(job_id)
            self.watch(job_id)
        else:
            self._stops.pop(job_id, None)

    async def _guarded(self, job_id: str) -> None:
        """Keep the errors of one job from reaching the others or the server.

        A full disk or a lack of file descriptors does not fail a job: the run keeps running, so
        the job is retried until the shortage has passed.
        """
        pause, tries = _FIRST_PAUSE, 0
        while True:
            began = anyio.current_time()
            try:
                await self._drive_or_fail(job_id, again=tries > 0)
            except HTTPProblem:
                log.warning("job not found")
                return
            except Exception as error:
                if anyio.current_time() - began > _LONGEST_PAUSE:
                    pause, tries = _FIRST_PAUSE, 0
                tries += 1
                if is_temporary(error):
                    log.error("job delayed", reason=_reason(error), pause=pause)  # noqa: TRY400
                else:
                    log.exception("job failure not stored", pause=pause)
                if tries == _TRIES_BEFORE_EVENT:
                    await self._record_waiting(job_id)
                await self._pause(job_id, pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
            else:
                return

    async def _pause(self, job_id: str, seconds: float) -> None:
        """Sleep until the time has passed or a stop is requested."""
        stop = self._stop_event(job_id)
        with anyio.move_on_after(seconds):
            await (anyio.sleep_forever() if stop.is_set() else stop.wait())

    async def _record_waiting(self, job_id: str) -> None:
        """Record in a job's events that the gateway is retrying, if that can be stored."""

        def work(connection: sa.Connection) -> None:
            add_event(connection, job_id, "waiting", {"message": _WAITING}, time.time())

        try:
            await self._store.awrite(work)
        except Exception as error:  # already logged
            log.debug("waiting event not stored", reason=_reason(error))

    async def _drive_or_fail(self, job_id: str, *, again: bool) -> None:
        try:
            await self._drive(job_id)
            if again and (await self._load(job_id)).status in ENDED:
                await self._on_end(job_id)  # may be what failed before; safe to repeat
        except Exception as group:  # anything else is a failure of this job
            if is_temporary(group) or isinstance(group, HTTPProblem):
                raise
            error = _single(group)
            if isinstance(error, TrainingBackendError) and not isinstance(error, BackendBroken):
                log.error("job failed", reason=error.message)  # noqa: TRY400
            else:
                log.exception("job failed")
            await self._fail(job_id, error)

    async def _drive(self, job_id: str) -> None:
        while True:
            job = await self._load(job_id)
            if job.status in ENDED:
                return
            if job.started_at is not None:
                await self._train(job)
                return
            if job.status != "VALIDATED":
                await self._validate(job)
            elif job.auto_start:
                await self._store.awrite(lambda c: accept_start(c, job_id))
            else:
                return

    async def _load(self, job_id: str) -> Any:
        return await self._store.aread(lambda connection: load_job(connection, job_id))

    async def _move(self, job: Any, status: str, *only_from: str, **values: Any) -> bool:
        return await self._store.awrite(
            lambda c: change_status(c, job.id, status, only_from=only_from, **values)
        )

    async def _fail(self, job_id: str, error: BaseException) -> None:
        job = await self._load(job_id)
        data = error_data(error, await self._files.names(job))
        if await self._move(job, "FAILED", *NOT_ENDED, data=data):
            await self._on_end(job_id)

    # -- before the start --------------------------------------------------------------

    async def _validate(self, job: Any) -> None:
        async with self._validating:
            await self._move(job, "VALIDATING", "QUEUED")
            config = TrainingConfig.model_validate_json(job.config)
            try:
                report = await self._retrying(
                    lambda: self._client.validate(config, backend=job.backend)
                )
                if not report.ok:
                    unfit = DatasetError(str(report.errors[0]), issues=report.errors)
                    if is_temporary(unfit):
                        raise unfit
                    names = await self._files.names(job)
                    await self._reject(job, issue_data(report.errors, names))
                    return
                estimate = await self._retrying(
                    lambda: self._client.estimate(config, backend=job.backend)
                )
            except TrainingBackendError as error:
                if is_temporary(error):
                    raise
                await self._reject(job, error_data(error, await self._files.names(job)))
                return
            values = {
                "quote": quote(estimate).model_dump(),
                "hyperparameters": effective(job.hyperparameters, estimate),
            }
            await self._move(job, "VALIDATED", "VALIDATING", **values)

    async def _reject(self, job: Any, data: dict[str, Any]) -> None:
        if await self._move(job, "FAILED_VALIDATION", "VALIDATING", data=data):
            await self._on_end(job.id)

    async def _retrying(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Repeat a call while its backend is unavailable."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await call()
            except TrainingBackendError as error:
                if not error.retryable:
                    raise
                pause = await _wait(error, pause)

    # -- after the start ---------------------------------------------------------------

    async def _train(self, job: Any) -> None:
        stop = self._stop_event(job.id)
        if job.status == "CANCELLATION_REQUESTED":
            stop.set()
        if not job.launched and not await self._launch(job, stop):
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._stop_when_asked, job.id, stop)
            tasks.start_soon(self._poll_status, job.id)
            run = await self._follow(job.id)
            tasks.cancel_scope.cancel()
        await self._end(job, run)

    async def _launch(self, job: Any, stop: anyio.Event) -> bool:
        """Launch the run; return False if the job ended instead."""
        config = TrainingConfig.model_validate_json(job.config)
        pause = _FIRST_PAUSE
        while not stop.is_set():
            try:
                run = await self._client.launch(config, backend=job.backend, run_id=job.id)
                break
            except TrainingBackendError as error:
                if not error.retryable:
                    raise
                with anyio.move_on_after(pause):
                    await stop.wait()
                pause = _longer(error, pause)
        else:
            if not await self._stop_during_launch(job):
                return False
            return await self._launched(job, None)
        return await self._launched(job, run.status)

    async def _launched(self, job: Any, status: TrainingStatus | None) -> bool:
        def work(connection: sa.Connection) -> None:
            mine = jobs.update().where(jobs.c.id == job.id)
            connection.execute(mine.values(launched=True))
            _advance(connection, job.id, status)

        await self._store.awrite(work)
        return True

    async def _stop_during_launch(self, job: Any) -> bool:
        """Stop a job cancelled during its launch; return whether its run still needs watching."""
        try:
            run = await self._retrying(lambda: self._client.stop(job.id))
        except RunNotFound:
            if await self._move(job, "CANCELLED", *NOT_ENDED):
                await self._on_end(job.id)
            return False
        if run.status.is_terminal:
            await self._end(job, run)
        return not run.status.is_terminal

    async def _stop_when_asked(self, job_id: str, stop: anyio.Event) -> None:
        await stop.wait()
        try:
            await self._retrying(lambda: self._client.stop(job_id))
        except TrainingBackendError as error:
            if is_temporary(error):
                raise
            log.error("stopping the run failed", reason=error.message)  # noqa: TRY400

    async def _poll_status(self, job_id: str) -> None:
        """Poll a run's status, because not every backend reports it in its log."""
        while True:
            await anyio.sleep(_POLL_SECONDS)
            try:
                run = await self._client.status(job_id)
                await self._store.awrite(partial(_advance, job_id=job_id, status=run.status))
            except Exception as error:
                if not (isinstance(error, TrainingBackendError) or is_temporary(error)):
                    raise
                log.debug("run status unavailable", reason=_reason(error))

    async def _follow(self, job_id: str) -> TrainingRun:
        """Follow a run to its end, through outages of its backend."""
        pause = _FIRST_PAUSE
        while True:
            try:
                if await self._drain(job_id):
                    pause = _FIRST_PAUSE
                run = await self._client.status(job_id)
                if run.status.is_terminal:
                    return run
                await anyio.sleep(_FIRST_PAUSE)
            except TrainingBackendError as error:
                if not error.retryable:
                    raise
                pause = await _wait(error, pause)

    async def _drain(self, job_id: str) -> bool:
        """Store the rest of a run's log after the cursor; return whether there was any."""
        cursor = (await self._load(job_id)).log_cursor
        send, receive = anyio.create_memory_object_stream[LogRecord](_BATCH)
        failure: TrainingBackendError | None = None
        any_record = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._store_records, job_id, receive)
            async with (
                send,
                aclosing(self._client.logs(job_id, after=cursor, follow=True)) as records,
            ):
                try:
                    async for record in records:
                        any_record = True
                        await send.send(record)
                except anyio.BrokenResourceError:
                    pass  # storing failed; the task group raises its error
                except TrainingBackendError as error:
                    failure = error  # raised once all records before it are stored
        if failure is not None and not (failure.retryable and any_record):
            raise failure
        return any_record

    async def _store_records(
        self, job_id: str, records: MemoryObjectReceiveStream[LogRecord]
    ) -> None:
        """Store records as they arrive, together with the cursor after them."""
        async with records:
            async for record in records:
                batch = [record]
                while len(batch) < _BATCH:
                    try:
                        batch.append(records.receive_nowait())
                    except (anyio.WouldBlock, anyio.EndOfStream):
                        break
                await self._store.awrite(partial(_apply, job_id=job_id, batch=batch))

    async def _end(self, job: Any, run: TrainingRun) -> None:
        names = await self._files.names(job)
        await self._store.awrite(lambda c: finish_job(c, job, run, self._organization_id, names))
        await self._on_end(job.id)


def accept_start(connection: sa.Connection, job_id: str) -> bool:
    """Queue a validated job for training, without an event, like the service."""
    return change_status(
        connection,
        job_id,
        "QUEUED",
        only_from=("VALIDATED",),
        silent=True,
        started_at=time.time(),
    )


def _apply(connection: sa.Connection, *, job_id: str, batch: list[LogRecord]) -> None:
    for record in batch:
        if record.source == "status":
            word = str(record.fields.get("status"))
            _advance(connection, job_id, _STATUSES.get(word), at=record.at.timestamp())
    add_metrics(connection, job_id, batch)
    cursor = batch[-1].cursor
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(log_cursor=cursor))


def _advance(
    connection: sa.Connection, job_id: str, status: TrainingStatus | None, at: float | None = None
) -> None:
    """Apply the status that a backend reports, if it is a step forward."""
    word = to_wire(status) if status else None
    if word in _TRANSITIONS:
        change_status(connection, job_id, word, only_from=_TRANSITIONS[word], at=at)


def _single(error: BaseException) -> BaseException:
    """Unwrap an error from nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(error: BaseException) -> str:
    error = _single(error)
    if isinstance(error, TrainingBackendError):
        return error.message
    return f"{type(error).__name__}: {error}"


def _longer(error: TrainingBackendError, pause: float) -> float:
    log.warning("backend unavailable", reason=error.message, pause=pause)
    asked = error.retry_after if isinstance(error, RateLimited) else None
    return min(max(pause * 2, asked or 0.0), _LONGEST_PAUSE)


async def _wait(error: TrainingBackendError, pause: float) -> float:
    """Sleep, then return the next pause."""
    longer = _longer(error, pause)
    asked = error.retry_after if isinstance(error, RateLimited) else None
    await anyio.sleep(max(pause, min(asked or 0.0, _LONGEST_PAUSE)))
    return longer
