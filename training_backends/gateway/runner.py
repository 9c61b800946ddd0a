"""Drive jobs: validate, launch and stop them, and take over what becomes of their runs.

The client's watcher observes the runs. A job's task does what its row and its run's record ask
for, and ends: a job whose run is training has none. It depends on these two only, so it can stop
at any moment and be started again: validation is repeated, and `client.launch` with the job's id
never starts a second run.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final

import anyio
import sqlalchemy as sa
import structlog
from anyio import to_thread
from anyio.abc import TaskGroup

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.leases import Leases
from training_backends.core.backoff import Backoff
from training_backends.core.config import Hyperparameters, TrainingConfig
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
from training_backends.core.tracing import remote_parent
from training_backends.gateway.errors import is_temporary
from training_backends.gateway.files import FileService
from training_backends.gateway.job_events import ORDER, reached
from training_backends.gateway.jobstore import (
    accept_start,
    add_event,
    advance_job,
    change_status,
    effective,
    error_data,
    finish_job,
    issue_data,
    load_job,
    quote,
)
from training_backends.gateway.openai_requests import multiplied_rate
from training_backends.gateway.projects import admit_job, admit_waiting, limits_of, waiting_jobs
from training_backends.gateway.result_files import ResultFiles
from training_backends.gateway.store import GatewayStore
from training_backends.protocols.mistral.status import ACTIVE, ENDED, to_wire
from training_backends.store.gateway_schema import IS_OPEN, jobs
from training_backends.store.schema import runs

__all__ = ["JobRunner", "OnEnd"]

log = get_logger()

OnEnd = Callable[[Any], Awaitable[None]]
"""Called with the row of a finished job, again after a failure or a crash."""

FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0
"""Seconds between attempts while a backend, the store or the system is unavailable."""
CATCH_UP_EVERY: Final = 60.0
"""Seconds between two searches for jobs whose events another watcher of this home received."""
TAKE_OVER_EVERY: Final = 2.0
"""The same for gateways that share a store, which also search for jobs of one that has ended."""
_TRIES_BEFORE_EVENT: Final = 3
_WAITING: Final = "The gateway cannot continue this job at the moment; it will retry."


class JobRunner:
    """The tasks of jobs with something to do, in the given task group."""

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        files: FileService,
        tasks: TaskGroup,
        *,
        organization_id: str,
        max_steps: int,
        results: ResultFiles,
        on_end: OnEnd,
        leases: Leases | None = None,
    ) -> None:
        self._store = store
        self._client = client
        self._files = files
        self._tasks = tasks
        self._organization_id = organization_id
        self._max_steps = max_steps
        self._results = results
        self._on_end = on_end
        self._leases = leases
        self._watcher = client.watcher(on_event=self._on_event)
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._again: set[str] = set()
        self._wakes: dict[str, anyio.Event] = {}
        self._stopped: set[str] = set()
        # Validation reads all data; two at a time keep the machine responsive.
        self._validating = anyio.Semaphore(2)

    async def start(self) -> None:
        """Resume every job that is not over and cleaned up, and watch the runs of all."""
        for job_id in await self._store.aread(_open):
            self.drive(job_id)
        self._tasks.start_soon(self._watch)
        self._tasks.start_soon(self._catch_up)

    def drive(self, job_id: str) -> None:
        """Do what a job's row and run now ask for; safe to repeat."""
        if job_id in self._scopes:
            self._again.add(job_id)
            self._wakes[job_id].set()
            return
        self._scopes[job_id] = anyio.CancelScope()
        self._wakes[job_id] = anyio.Event()
        self._tasks.start_soon(self._task, job_id, self._scopes[job_id])

    def drop(self, job_id: str) -> None:
        """Cancel the task of a job that was cancelled before its start."""
        if job_id in self._scopes:
            self._scopes[job_id].cancel()

    async def _watch(self) -> None:
        """Keep the runs up to date until cancelled, through failures of the store."""
        backoff = Backoff(FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            began = anyio.current_time()
            try:
                await self._watcher.run()
            except Exception as error:
                if anyio.current_time() - began > _LONGEST_PAUSE:
                    backoff.reset()
                pause = backoff.next()
                if is_temporary(error):
                    log.error("watching delayed", reason=_reason(error), pause=pause)  # noqa: TRY400
                else:
                    log.exception("watching failed", pause=pause)
                await anyio.sleep(pause)
                self._watcher = self._client.watcher(on_event=self._on_event)

    async def _on_event(self, run: TrainingRun, record: LogRecord) -> None:
        if record.source == "status":
            self.drive(run.id)

    async def _catch_up(self) -> None:
        """Drive the jobs whose events another watcher received, or whose gateway has ended."""
        while True:
            await anyio.sleep(CATCH_UP_EVERY if self._leases is None else TAKE_OVER_EVERY)
            try:
                behind = await self._store.aread(lambda c: [*_behind(c), *waiting_jobs(c)])
                for job_id in behind:
                    if not await self._is_driven(job_id):
                        self.drive(job_id)
                if self._leases is None:
                    continue
                for job_id in await self._store.aread(_pending):
                    if job_id not in self._stopped and not await self._is_driven(job_id):
                        self.drive(job_id)
            except Exception as error:  # must not stop the gateway
                log.error("jobs not compared with their runs", reason=_reason(error))  # noqa: TRY400

    async def _is_driven(self, job_id: str) -> bool:
        """Return whether a task of this gateway, or of another one that lives, drives a job."""
        if job_id in self._scopes:
            return True
        if self._leases is None:
            return False
        return await to_thread.run_sync(self._leases.is_held, _lease(job_id))

    def _alone(self, job_id: str) -> AbstractAsyncContextManager[object]:
        """Keep the other gateways of the store from driving a job; one that dies frees it."""
        return nullcontext() if self._leases is None else self._leases.hold(_lease(job_id))

    async def _task(self, job_id: str, scope: anyio.CancelScope) -> None:
        # A task inherits the context of the request that started it.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id, run_id=job_id)
        try:
            with scope:
                await self._guarded(job_id)
        finally:
            del self._scopes[job_id], self._wakes[job_id]
        if job_id in self._again:
            self._again.discard(job_id)
            self.drive(job_id)

    async def _guarded(self, job_id: str) -> None:
        """Keep the errors of one job from reaching the others or the server.

        A full disk, a lack of file descriptors or an unavailable backend does not fail a job: the
        run keeps running, so the job is retried until the shortage has passed.
        """
        backoff, tries = Backoff(FIRST_PAUSE, _LONGEST_PAUSE), 0
        while True:
            began = anyio.current_time()
            try:
                async with self._alone(job_id):
                    await self._drive_or_fail(job_id)
            except Exception as error:
                if anyio.current_time() - began > _LONGEST_PAUSE:
                    backoff.reset()
                    tries = 0
                tries += 1
                pause = max(backoff.next(), _asked(error))
                if is_temporary(error):
                    log.error("job delayed", reason=_reason(error), pause=pause)  # noqa: TRY400
                else:
                    log.exception("job failure not stored", pause=pause)
                if tries == _TRIES_BEFORE_EVENT:
                    await self._record_waiting(job_id)
                with anyio.move_on_after(pause):
                    await self._wakes[job_id].wait()
                self._wakes[job_id] = anyio.Event()
            else:
                return

    async def _record_waiting(self, job_id: str) -> None:
        """Record in a job's events that the gateway is retrying, if that can be stored."""
        try:
            await self._store.awrite(
                lambda c: add_event(c, job_id, "waiting", {"message": _WAITING})
            )
        except Exception as error:  # already logged
            log.debug("waiting event not stored", reason=_reason(error))

    async def _drive_or_fail(self, job_id: str) -> None:
        try:
            await self._drive(job_id)
        except Exception as group:  # anything else is a failure of this job
            if is_temporary(group):
                raise
            error = _single(group)
            if isinstance(error, TrainingBackendError) and not isinstance(error, BackendBroken):
                log.error("job failed", reason=error.message)  # noqa: TRY400
            else:
                log.exception("job failed")
            job = await self._load(job_id)
            data = error_data(error, await self._files.names(job))
            await self._move(job, "FAILED", *ACTIVE, data=data)
            await self._drive(job_id)

    async def _drive(self, job_id: str) -> None:
        while True:
            job = await self._load(job_id)
            if job is None:  # a run of somebody else in this home
                return
            if job.status in ENDED:
                await self._clean_up(job)
                return
            if job.launched:
                if not await self._follow(job):
                    return
            elif job.started_at is not None:
                if not await self._is_here(job) or not await self._launch(job):
                    return
            elif job.status != "VALIDATED":
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

    async def _set(self, job: Any, **values: bool) -> None:
        mine = jobs.update().where(jobs.c.id == job.id)
        await self._store.awrite(lambda c: c.execute(mine.values(**values)))

    async def _clean_up(self, job: Any) -> None:
        self._stopped.discard(job.id)
        if not job.cleaned_up:
            await self._on_end(job)
            await self._set(job, cleaned_up=True)
            if await self._store.aread(lambda c: waiting_jobs(c, job.project)):
                for job_id in await self._store.awrite(lambda c: admit_waiting(c, job.project)):
                    self.drive(job_id)

    async def _validate(self, job: Any) -> None:
        async with self._validating:
            await self._move(job, "VALIDATING", "QUEUED")
            config = TrainingConfig.model_validate_json(job.config)
            capabilities = self._client.backend(job.backend).capabilities
            try:
                if job.openai is not None and capabilities.inspects:
                    config = await self._files.converted(config, capabilities.provider_format)
                report = await self._client.validate(config, backend=job.backend)
                if not report.ok:
                    unfit = DatasetError(str(report.errors[0]), issues=report.errors)
                    if is_temporary(unfit):
                        raise unfit
                    names = await self._files.names(job)
                    await self._reject(job, issue_data(report.errors, names))
                    return
                estimate = await self._client.estimate(config, backend=job.backend)
                most = await self._most_steps(job)
                if estimate.steps is not None and estimate.steps > most:
                    sentence = f"The job would train {estimate.steps} steps; the limit is {most}."
                    await self._reject(job, {"error": sentence})
                    return
                chosen = {**job.hyperparameters, **multiplied_rate(job, config, estimate)}
            except TrainingBackendError as error:
                if is_temporary(error):
                    raise
                await self._reject(job, error_data(error, await self._files.names(job)))
                return
            values: dict[str, Any] = {
                "quote": quote(estimate).model_dump(),
                "hyperparameters": effective(chosen, estimate),
            }
            if job.openai is not None:
                hyperparameters = Hyperparameters(**chosen)
                config = config.model_copy(update={"hyperparameters": hyperparameters})
                values["config"] = config.model_dump_json()
            await self._move(job, "VALIDATED", "VALIDATING", **values)

    async def _most_steps(self, job: Any) -> int:
        limits = await self._store.aread(lambda c: limits_of(c, job.project))
        if limits.steps is None:
            return self._max_steps
        return min(limits.steps, self._max_steps)

    async def _reject(self, job: Any, data: dict[str, Any]) -> None:
        await self._move(job, "FAILED_VALIDATION", "VALIDATING", data=data)

    async def _launch(self, job: Any) -> bool:
        """Launch a job's run, unless the job was cancelled before its backend accepted it.

        Returns:
            Whether there is more to do: not while the project has too many running jobs.
        """
        if job.status == "CANCELLATION_REQUESTED":
            try:
                await self._client.stop(job.id)
            except RunNotFound:
                await self._move(job, "CANCELLED", *ACTIVE)
                return True
            self._stopped.add(job.id)
        elif not await self._store.awrite(lambda c: admit_job(c, job)):
            return False
        else:
            config = TrainingConfig.model_validate_json(job.config)
            with remote_parent(job.trace):
                await self._client.launch(config, backend=job.backend, run_id=job.id)
        await self._set(job, launched=True)
        self._watcher.wake()
        return True

    async def _is_here(self, job: Any) -> bool:
        """Return whether a job's run, if there is one, belongs to this home or to no home.

        Only the gateways of its home can continue its launch or stop it.
        """
        try:
            run = await self._client.get(job.id)
        except RunNotFound:
            return True
        return run.place is None or self._client.backend(run.backend).sees(run)

    async def _follow(self, job: Any) -> bool:
        """Take over what a job's run has become; return whether there is more to do."""
        run = await self._client.get(job.id)
        if run.status.is_terminal:
            await self._client.refresh(job.id)  # reads the log of a run that ended at its launch
            names, mine = await self._files.names(job), self._organization_id
            completed = run.status is TrainingStatus.COMPLETED
            results = await self._results.write(job) if completed else []
            await self._store.awrite(
                lambda c: finish_job(c, job, run, mine, names=names, results=results)
            )
            return True
        if await self._store.aread(lambda c: reached(c, job)) != job.status:
            await self._store.awrite(lambda c: advance_job(c, job))
        if job.status != "CANCELLATION_REQUESTED" or job.id in self._stopped:
            return False
        if run.status is TrainingStatus.STOPPING:
            return False  # whoever stopped it said whether with a checkpoint
        if not await self._is_here(job):
            return False
        try:
            await self._client.stop(job.id)
        except TrainingBackendError as error:
            if is_temporary(error):
                raise
            log.error("stopping the run failed", reason=error.message)  # noqa: TRY400
        self._stopped.add(job.id)
        return True


def _open(connection: sa.Connection) -> list[str]:
    """Return the ids of the jobs that are not over and cleaned up, oldest first."""
    # Sorted here: for the order, SQLite would read all jobs.
    rows = connection.execute(sa.select(jobs.c.created_at, jobs.c.id).where(IS_OPEN)).all()
    return [job_id for _, job_id in sorted(map(tuple, rows))]


def _behind(connection: sa.Connection) -> list[str]:
    """Return the ids of the launched jobs that do not show how far their runs are."""
    query = sa.select(jobs.c.id, jobs.c.status, runs.c.status.label("run")).where(
        IS_OPEN, jobs.c.status.in_(ORDER), jobs.c.launched
    )
    rows = connection.execute(query.outerjoin(runs, runs.c.id == jobs.c.id)).all()
    return [row.id for row in rows if row.run is None or _is_ahead(row.run, row.status)]


def _pending(connection: sa.Connection) -> list[str]:
    """Return the ids of the jobs for which a gateway has something to do."""
    stopping = jobs.c.status == "CANCELLATION_REQUESTED"
    query = sa.select(jobs.c.id).where(
        IS_OPEN,
        sa.or_(
            jobs.c.status.in_([*ENDED, "QUEUED", "VALIDATING"]),
            (jobs.c.status == "VALIDATED") & jobs.c.auto_start,
            stopping,
        ),
        sa.or_(jobs.c.launched.is_(sa.false()), stopping, jobs.c.status.in_(ENDED)),
    )
    return list(connection.execute(query).scalars())


def _lease(job_id: str) -> str:
    return f"job:{job_id}"


def _is_ahead(run: str, job: str) -> bool:
    status = TrainingStatus(run)
    word = to_wire(status)
    return status.is_terminal or (word in ORDER and ORDER.index(word) > ORDER.index(job))


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


def _asked(error: BaseException) -> float:
    """Return the seconds to wait that a backend asked for, within bounds."""
    asked = error.retry_after if isinstance(error, RateLimited) else None
    return min(asked or 0.0, _LONGEST_PAUSE)
