"""Delete by age what jobs and uploads have left: runs, models, checkpoints, logs and files.

Jobs themselves stay, with their events and the metrics of their checkpoints. Nothing is deleted
that an unfinished job or a job started from it needs, or that was used since.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.leases import Leases
from training_backends.core.errors import RunNotFound, UnsupportedOperation
from training_backends.core.files import disk_usage
from training_backends.core.logging import get_logger
from training_backends.core.run import TrainingRun
from training_backends.gateway.files import FileService
from training_backends.gateway.job_events import job_checkpoints, kept_checkpoints
from training_backends.gateway.jobstore import CHECKPOINT_MARK, JOB_DIGITS, keep_history, load_job
from training_backends.gateway.keys import Principal
from training_backends.gateway.model_use import is_used, used_steps
from training_backends.gateway.models import ModelService
from training_backends.gateway.projects import FOREVER, KINDS, Kind, retention_of
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore
from training_backends.rundir.place import make_place
from training_backends.store.gateway_schema import (
    DEFAULT_PROJECT,
    HAS_CHECKPOINTS,
    HAS_LOGS,
    HAS_RUN,
    job_counts,
    jobs,
    keys,
    models,
)

__all__ = ["Expired", "Retention", "by_gateway"]

log = get_logger()

SWEEP_EVERY: Final = 3600.0
TAKE_OVER_EVERY: Final = 60.0
"""Seconds between two attempts to become the gateway that sweeps."""
_DAY: Final = 86400.0
_BATCH: Final = 200
_ALL_DAYS: Final = -1
_FAILED: Final = ("FAILED", "FAILED_VALIDATION", "CANCELLED")
_COMPLETED: Final = ("SUCCESS",)

ActorOf = Callable[[str], Principal]
"""Returns who deletes, for the audit log of a project."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Something that was deleted.

    Attributes:
        id: Of the job, or of the file.
        bytes: How much its deletion has freed, as far as it is known.
    """

    kind: Kind
    id: str
    project: str
    bytes: int


def by_gateway(project: str) -> Principal:
    """Return the gateway itself as the one who deletes."""
    return Principal("gateway", project)


class Retention:
    """Deletes what is older than the periods in the settings, or those of its project."""

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        models: ModelService,
        files: FileService,
        settings: GatewaySettings,
    ) -> None:
        self._store = store
        self._client = client
        self._models = models
        self._files = files
        self._days = {kind: getattr(settings, f"keep_{kind}_days") for kind in KINDS}

    async def run(self, leases: Leases | None = None) -> None:
        """Sweep now and every hour; runs until cancelled.

        Args:
            leases: Those of a gateway that shares its store: of all gateways of a home, one
                sweeps. Each home has one, since only that can delete its runs.
        """
        while True:
            try:
                place = await to_thread.run_sync(make_place, self._client.home)
                name = f"retention:{place.id}"
                alone = nullcontext(True) if leases is None else leases.try_hold(name)  # noqa: FBT003
                async with alone as mine:
                    if mine:
                        await self.sweep()
                        await anyio.sleep(SWEEP_EVERY)
            except Exception:  # must not stop the gateway
                log.exception("retention failed")
            await anyio.sleep(TAKE_OVER_EVERY)

    async def sweep(
        self,
        *,
        kinds: Collection[Kind] = KINDS,
        project: str | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
        actor_of: ActorOf = by_gateway,
    ) -> list[Expired]:
        """Delete what has been kept for long enough; safe to repeat, and to do at the same time.

        Args:
            project: Only what belongs to it; None: all.
            older_than: Seconds, instead of the periods of settings and projects.
            dry_run: Change nothing.

        Returns:
            What was deleted, or would be.
        """
        now, expired = time.time(), list[Expired]()
        plan = await self._store.aread(lambda c: self._plan(c, project))
        for owner, kind, days in plan:
            seconds = days * _DAY if older_than is None else older_than
            if kind not in kinds or seconds == float("inf"):
                continue
            sweep = _Sweep(owner, now - seconds, dry_run=dry_run, actor=actor_of(owner))
            try:
                expired += [each async for each in self._expired(kind, sweep)]
            except Exception:  # the other kinds and projects are swept
                log.exception("retention failed", project=owner, kind=kind)
        if expired and not dry_run:
            counts = Counter(str(each.kind) for each in expired)
            log.info("retention", freed_bytes=sum(each.bytes for each in expired), **counts)
        return expired

    def _plan(
        self, connection: sa.Connection, project: str | None
    ) -> list[tuple[str, Kind, float]]:
        """Return each project and kind with its period in days, infinity for ever."""
        own = retention_of(connection)
        names = [project] if project is not None else _projects(connection)
        found = []
        for name in names:
            for kind in KINDS:
                days = own.get(name, {}).get(kind, self._days[kind])
                is_kept = days is None or days == FOREVER
                found.append((name, kind, float("inf") if is_kept else float(days)))
        return found

    async def _expired(self, kind: Kind, sweep: "_Sweep") -> AsyncIterator[Expired]:
        if kind == "files":
            found = await self._files.expire(
                sweep.project, sweep.before, sweep.actor, dry_run=sweep.dry_run
            )
            for file_id, freed in found:
                yield Expired(kind, file_id, sweep.project, freed)
            return
        work = {"checkpoints": self._checkpoints, "logs": self._log}.get(kind, self._run)
        async for job in self._jobs(kind, sweep):
            try:
                bytes_freed = await work(job, sweep)
            except Exception:  # the other jobs are swept
                log.exception("retention failed", job_id=job.id, kind=kind)
                continue
            if bytes_freed is not None:
                yield Expired(kind, job.id, sweep.project, bytes_freed)

    async def _jobs(self, kind: Kind, sweep: "_Sweep") -> AsyncIterator[Any]:
        """Yield the jobs that have ended before the time, and still have something of a kind."""
        mark = {"checkpoints": HAS_CHECKPOINTS, "logs": HAS_LOGS}.get(kind, HAS_RUN)
        statuses = {"completed": _COMPLETED, "checkpoints": _COMPLETED, "failed": _FAILED}
        for status in statuses.get(kind, (*_COMPLETED, *_FAILED)):
            ended: Sequence[Any] = ()
            place = (0.0, "")
            while True:
                ended = await self._store.aread(partial(_ended, sweep, status, mark, place))
                for job in ended:
                    yield job
                if len(ended) < _BATCH:
                    break
                place = ended[-1].modified_at, ended[-1].id

    async def _run(self, job: Any, sweep: "_Sweep") -> int | None:
        """Delete the run of a job, with its model; return the bytes freed."""
        run = await self._find_run(job)
        if run is None:
            if not sweep.dry_run:
                await self._lacks(job, "has_run", "has_checkpoints", "has_logs")
            return None
        if not self._is_here(run):
            return None
        places = await self._models.places(job)
        if await to_thread.run_sync(self._models.offers_any, places):
            return None  # a base model of the catalogue
        freed = await to_thread.run_sync(_sizes, places)
        if sweep.dry_run:
            may = await self._store.aread(lambda c: _may_expire(c, job.id, sweep))
            return freed if may else None
        if not await self._store.awrite(lambda c: _expire_run(c, job.id, sweep)):
            return None
        await self._models.remove(job)
        if await self._find_run(job) is not None:
            return None  # the reason is logged; the next sweep repeats it
        await self._lacks(job, "has_run", "has_checkpoints", "has_logs")
        return freed - await to_thread.run_sync(_sizes, places)

    async def _checkpoints(self, job: Any, sweep: "_Sweep") -> int | None:
        """Delete the unused checkpoints of a job; return the bytes freed."""
        run = await self._find_run(job)
        if run is None:
            if not sweep.dry_run:
                await self._lacks(job, "has_checkpoints")
            return None
        if not self._is_here(run):
            return None
        points = await self._store.aread(lambda c: kept_checkpoints(c, job))
        steps = {point.step for point in points}
        found = await self._store.aread(lambda c: _unused_steps(c, job.id, steps, sweep))
        paths = [Path(each.path) for each in run.checkpoints if each.path and each.step in found]
        places = [*paths, *(await self._models.checkpoint_places(job, found))]
        freed = await to_thread.run_sync(_sizes, places)
        if sweep.dry_run:
            return freed if found else None
        if found := await self._store.awrite(lambda c: _expire_steps(c, job.id, found, sweep)):
            try:
                await self._models.remove_checkpoints(job, found)
            except UnsupportedOperation:
                return None
            freed -= await to_thread.run_sync(_sizes, places)
        if found == steps:
            await self._lacks(job, "has_checkpoints")
        return freed if found else None

    async def _log(self, job: Any, sweep: "_Sweep") -> int | None:
        """Delete the log of a job's run, and its metrics except those that the job shows."""
        run = await self._find_run(job)
        if run is None or not self._is_here(run):
            if run is None and not sweep.dry_run:
                await self._lacks(job, "has_logs")
            return None
        size = partial(_sizes, [self._client.home / "runs" / job.id])
        if sweep.dry_run:
            return 0
        before = await to_thread.run_sync(size)
        points = await self._store.aread(lambda c: job_checkpoints(c, job))
        await self._store.awrite(lambda c: sweep.actor.record(c, "logs.expire", job.id))
        freed = await self._client.remove_log(job.id, keep_steps=[each.step for each in points])
        await self._lacks(job, "has_logs")
        return freed + max(before - await to_thread.run_sync(size), 0)

    async def _find_run(self, job: Any) -> TrainingRun | None:
        try:
            return await self._client.get(job.id)
        except RunNotFound:
            return None

    def _is_here(self, run: TrainingRun) -> bool:
        """Return whether a run is finished and may be deleted from here."""
        is_here = run.place is None or self._client.backend(run.backend).sees(run)
        return is_here and run.status.is_terminal

    async def _lacks(self, job: Any, *names: str) -> None:
        """Record what a job does not have any more."""
        gone = jobs.update().where(jobs.c.id == job.id).values(dict.fromkeys(names, False))
        await self._store.awrite(lambda c: c.execute(gone))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """A sweep of one project and kind.

    Attributes:
        before: When what expires ended, at the latest.
    """

    project: str
    before: float
    dry_run: bool
    actor: Principal


def _projects(connection: sa.Connection) -> list[str]:
    """Return all projects, from tables that are small; the static key belongs to the default."""
    counted = sa.select(job_counts.c.project).where(job_counts.c.day == _ALL_DAYS)
    found = connection.execute(sa.union(counted, sa.select(keys.c.project))).scalars()
    return sorted({*found, DEFAULT_PROJECT})


def _ended(
    sweep: _Sweep,
    status: str,
    mark: sa.TextClause,
    after: tuple[float, str],
    connection: sa.Connection,
) -> Sequence[Any]:
    place = sa.tuple_(jobs.c.modified_at, jobs.c.id)
    found = sa.select(jobs).where(
        *(jobs.c.project == sweep.project, jobs.c.status == status, jobs.c.cleaned_up, mark),
        *(jobs.c.modified_at < sweep.before, place > after),
    )
    found = found.order_by(jobs.c.modified_at, jobs.c.id).limit(_BATCH)
    return connection.execute(found).all()


def _may_expire(connection: sa.Connection, job_id: str, sweep: _Sweep) -> bool:
    """Return whether nothing needs the run of a job any more."""
    job = load_job(connection, job_id)
    return job.history is not None or not (
        is_used(job, sweep.before) or _derived(connection, job_id)
    )


def _expire_run(connection: sa.Connection, job_id: str, sweep: _Sweep) -> bool:
    """Delete a job's model for clients before its run is deleted; False: it is needed.

    If a crash leaves the run, the next sweep continues from here.
    """
    if not _may_expire(connection, job_id, sweep):
        return False
    if load_job(connection, job_id).history is None:
        keep_history(connection, job_id)
        mine = models.c.job_id == job_id, models.c.deleted_at.is_(None)
        connection.execute(models.update().where(*mine).values(deleted_at=time.time()))
        sweep.actor.record(connection, "job.expire", job_id)
    return True


def _unused_steps(
    connection: sa.Connection, job_id: str, steps: Collection[int], sweep: _Sweep
) -> set[int]:
    """Return the steps of the checkpoints that are no longer needed."""
    used = used_steps(load_job(connection, job_id), sweep.before, steps)
    return {*steps} - used - _derived(connection, job_id)


def _expire_steps(
    connection: sa.Connection, job_id: str, steps: Collection[int], sweep: _Sweep
) -> set[int]:
    unused = _unused_steps(connection, job_id, steps, sweep)
    if unused:
        sweep.actor.record(connection, "checkpoints.expire", job_id)
    return unused


def _derived(connection: sa.Connection, job_id: str) -> set[int]:
    """Return the steps of a job's checkpoints from which other jobs were started; 0: its result.

    Those count whose own models are not deleted, whether or not they have finished.
    """
    # Few names, from the counts of jobs, instead of all jobs.
    tag = f":{job_id[:JOB_DIGITS]}"
    counted = sa.select(job_counts.c.project, job_counts.c.model).distinct()
    counted = counted.where(
        job_counts.c.day == _ALL_DAYS,
        job_counts.c.model.endswith(tag) | job_counts.c.model.contains(tag + CHECKPOINT_MARK),
    )
    found = set()
    for project, name in connection.execute(counted).all():
        mine = jobs.c.project == project, jobs.c.model == name, jobs.c.history.is_(None)
        if connection.execute(sa.select(jobs.c.id).where(*mine).limit(1)).first() is not None:
            found.add(int(name.partition(CHECKPOINT_MARK)[2] or 0))
    return found


def _sizes(paths: Collection[Path]) -> int:
    return sum(map(disk_usage, paths))
