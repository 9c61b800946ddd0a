"""Limits and retention of projects, and what each project uses.

Jobs and bytes are counted in the transaction that adds to them, with the row of the project's
limits locked, so processes that share a database cannot exceed a limit together. Requests per
second are counted in each process on its own.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

import sqlalchemy as sa

from training_backends.gateway.errors import HTTPProblem, invalid
from training_backends.gateway.keys import Principal, check_project, local_operator
from training_backends.gateway.store import GatewayStore, present
from training_backends.protocols.mistral.status import ACTIVE
from training_backends.store.gateway_schema import IS_OPEN, files, jobs, keys, projects, uploads

__all__ = [
    "FOREVER",
    "KINDS",
    "Kind",
    "Limits",
    "ProjectInfo",
    "ProjectStore",
    "RateLimiter",
    "admit_job",
    "admit_waiting",
    "check_bytes",
    "check_job_limits",
    "limits_of",
    "retention_of",
    "waiting_jobs",
]

Kind = Literal["failed", "completed", "checkpoints", "files", "logs"]
"""What retention deletes; see `retention`."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
FOREVER: Final = "forever"
_RETRY_AFTER: Final = "60"
"""Seconds after which a job may have ended or a file may have been deleted."""
_WOKEN: Final = 20
"""Waiting jobs to look at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a project; None: unlimited.

    Attributes:
        jobs_running: Jobs that train at a time; others wait in the queue.
        jobs_queued: Unfinished jobs that do not train yet.
        bytes: Size of all files.
        requests_per_second: In each gateway process.
        steps: Training steps of a job.
    """

    jobs_running: int | None = None
    jobs_queued: int | None = None
    bytes: int | None = None
    requests_per_second: float | None = None
    steps: int | None = None


_NAMES: Final = tuple(each.name for each in fields(Limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectInfo:
    """A project with its limits and what it uses of them.

    Attributes:
        keep: Days by kind, or `FOREVER`; kinds that are missing have the gateway's setting.
    """

    name: str
    limits: Limits
    keep: Mapping[str, float | str]
    jobs_running: int
    jobs_queued: int
    bytes: int


class ProjectStore:
    """The projects of one gateway. Blocking; safe across processes."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store

    def list(self) -> Sequence[ProjectInfo]:
        """Return all projects that have a key, an object or a limit, by name."""
        return self._store.read(_list)

    def set(
        self,
        name: str,
        limits: Mapping[str, float | None],
        keep: Mapping[str, float | str | None] | None = None,
    ) -> ProjectInfo:
        """Change some limits and periods of a project, effective immediately.

        Args:
            limits: New values by the names of `Limits`.
            keep: Days by kind, or `FOREVER`; None: the gateway's setting.

        Raises:
            ConfigError: The project name is invalid.
        """
        check_project(name)
        values: dict[str, Any] = {**limits, "modified_at": time.time()}

        def work(connection: sa.Connection) -> ProjectInfo:
            if keep:
                new = {**retention_of(connection).get(name, {}), **keep}
                values["retention"] = {k: v for k, v in new.items() if v is not None} or None
            changed = projects.update().where(projects.c.id == name).values(values)
            if not connection.execute(changed).rowcount:
                connection.execute(projects.insert().values(id=name, **values))
            local_operator(name).record(connection, "project.set", name)
            return next(each for each in _list(connection) if each.name == name)

        return self._store.write(work)


def _list(connection: sa.Connection) -> Sequence[ProjectInfo]:
    owners = (table.c.project for table in (keys, jobs, files))
    every = sa.union(sa.select(projects.c.id), *map(sa.select, owners))
    limits = {row.id: _limits(row) for row in connection.execute(sa.select(projects))}
    keep = retention_of(connection)
    running = sa.func.sum(sa.case((_RUNS, 1), else_=0))
    counts = (
        sa.select(jobs.c.project, sa.func.count().label("open"), running.label("running"))
        .where(IS_OPEN, jobs.c.status.in_(ACTIVE))
        .group_by(jobs.c.project)
    )
    counted = {row.project: row for row in connection.execute(counts)}
    sizes = sa.select(files.c.project, sa.func.sum(files.c.bytes)).where(*present())
    stored = {row[0]: int(row[1]) for row in connection.execute(sizes.group_by(files.c.project))}
    found = []
    for name in sorted(connection.execute(every).scalars()):
        row = counted.get(name)
        runs, total = (int(row.running), int(row.open)) if row else (0, 0)
        found.append(
            ProjectInfo(
                name=name,
                limits=limits.get(name, Limits()),
                keep=keep.get(name, {}),
                jobs_running=runs,
                jobs_queued=total - runs,
                bytes=stored.get(name, 0),
            )
        )
    return found


_RUNS: Final = jobs.c.admitted | jobs.c.launched
"""Condition of an unfinished job that is training, or about to."""


def limits_of(connection: sa.Connection, project: str, *, lock: bool = False) -> Limits:
    """Return the limits of a project.

    Args:
        lock: Let other transactions wait that lock them too, until this one ends.
    """
    query = sa.select(projects).where(projects.c.id == project)
    row = connection.execute(query.with_for_update() if lock else query).first()
    return Limits() if row is None else _limits(row)


def retention_of(connection: sa.Connection) -> dict[str, dict[str, float | str]]:
    """Return the periods that projects have of their own, by project and kind."""
    query = sa.select(projects.c.id, projects.c.retention)
    return {row.id: row.retention for row in connection.execute(query) if row.retention}


def _limits(row: Any) -> Limits:
    return Limits(**{name: getattr(row, name) for name in _NAMES})


def check_job_limits(connection: sa.Connection, project: str, steps: int | None) -> None:
    """Require room for one more queued job.

    Args:
        steps: Training steps of the job, if it says.

    Raises:
        HTTPProblem: 429: too many jobs are queued; 422: too many steps.
    """
    limits = limits_of(connection, project, lock=True)
    if limits.steps is not None and steps is not None and steps > limits.steps:
        place = ["body", "hyperparameters", "training_steps"]
        raise invalid(place, _too_many_steps(limits.steps), "less_than_equal")
    if limits.jobs_queued is None:
        return
    if _count(connection, project, ~_RUNS) >= limits.jobs_queued:
        raise _exceeded(
            f"This project has reached its limit of {limits.jobs_queued} queued jobs; wait until "
            "one runs, or cancel one."
        )


def _too_many_steps(limit: int) -> str:
    return f"Input should be less than or equal to {limit}, the limit of this project"


def check_bytes(
    connection: sa.Connection, project: str, more: int, *, with_uploads: bool = False
) -> None:
    """Require room for a file.

    Args:
        with_uploads: Count the sizes of the pending uploads as well.

    Raises:
        HTTPProblem: The file would exceed the limit of its project.
    """
    limit = limits_of(connection, project, lock=True).bytes
    if limit is None:
        return
    query = sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0))
    used = connection.execute(query.where(files.c.project == project, *present())).scalar_one()
    if with_uploads:
        query = sa.select(sa.func.coalesce(sa.func.sum(uploads.c.bytes), 0))
        pending = uploads.c.status == "pending", uploads.c.project == project
        used += connection.execute(query.where(*pending)).scalar_one()
    if used + more > limit:
        raise _exceeded(
            f"This file of {more} bytes would exceed this project's limit of {limit} stored "
            f"bytes, of which {used} are in use; delete files first."
        )


def admit_job(connection: sa.Connection, job: Any) -> bool:
    """Let a job run, unless its project has as many running jobs as it may."""
    if not (job.admitted or job.launched):
        limit = limits_of(connection, job.project, lock=True).jobs_running
        if limit is not None and _count(connection, job.project, _RUNS) >= limit:
            return False
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(admitted=True))
    return True


def admit_waiting(connection: sa.Connection, project: str) -> Sequence[str]:
    """Let the oldest waiting jobs of a project run, as far as there is room; return their ids."""
    limit = limits_of(connection, project, lock=True).jobs_running
    found = waiting_jobs(connection, project)
    if limit is not None:
        found = found[: max(limit - _count(connection, project, _RUNS), 0)]
    connection.execute(jobs.update().where(jobs.c.id.in_(found)).values(admitted=True))
    return found


def waiting_jobs(connection: sa.Connection, project: str | None = None) -> Sequence[str]:
    """Return the ids of the oldest started jobs that wait to be admitted.

    Args:
        project: None: of all projects.
    """
    waits: list[Any] = [IS_OPEN, jobs.c.status == "QUEUED", jobs.c.started_at.is_not(None), ~_RUNS]
    if project is not None:
        waits.append(jobs.c.project == project)
    query = sa.select(jobs.c.id).where(*waits).order_by(jobs.c.started_at).limit(_WOKEN)
    return connection.execute(query).scalars().all()


def _count(connection: sa.Connection, project: str, which: sa.ColumnElement[bool]) -> int:
    counted = sa.select(sa.func.count()).select_from(jobs)
    mine = IS_OPEN, jobs.c.project == project, jobs.c.status.in_(ACTIVE), which
    return connection.execute(counted.where(*mine)).scalar_one()


def _exceeded(sentence: str) -> HTTPProblem:
    # A repetition within seconds is useless; `x-should-retry` keeps OpenAI's clients from it.
    headers = {"retry-after": _RETRY_AFTER, "x-should-retry": "false"}
    return HTTPProblem(429, {"detail": sentence, "code": "insufficient_quota"}, headers)


class RateLimiter:
    """A token bucket for each project with a limit; holds the requests of one second."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tokens at a moment."""

    def check(self, caller: Principal) -> None:
        """Count a request.

        Raises:
            HTTPProblem: 429: the project sends too many.
        """
        rate = caller.requests_per_second
        if rate is None:
            self._buckets.pop(caller.project, None)
            return
        now, most = time.monotonic(), max(rate, 1.0)
        tokens, at = self._buckets.get(caller.project, (most, now))
        tokens = min(most, tokens + (now - at) * rate)
        if tokens >= 1:
            self._buckets[caller.project] = tokens - 1, now
            return
        self._buckets[caller.project] = tokens, now
        wait = math.ceil((1 - tokens) / rate) if rate else int(_RETRY_AFTER)
        sentence = f"This project has reached its limit of {rate:g} requests per second."
        headers = {"retry-after": str(wait), "x-should-retry": "true"}
        raise HTTPProblem(429, {"detail": sentence}, headers)
