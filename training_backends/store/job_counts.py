"""Maintained counts of the gateway's jobs, so that lists know totals and reach any page."""

from collections.abc import Collection, Mapping
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from training_backends.store.gateway_schema import job_counts, jobs

__all__ = ["COUNTED", "change_counts", "count_jobs", "find_rank", "recount_jobs"]

COUNTED: Final = frozenset({"project", "created_by", "status", "model"})
"""Columns by which jobs are counted."""
_ALL_DAYS: Final = -1
_DAY: Final = 86_400


def _day(created_at: float) -> int:
    return int(created_at // _DAY)


def change_counts(connection: sa.Connection, job: Any, *, before: str | None, after: str) -> None:
    """Count a new job, or one whose status has changed, in the transaction that writes its row.

    Args:
        before: Its previous status; None: the job is new.
    """
    changes = {after: 1} if before is None else {before: -1, after: 1}
    rows = [
        {
            "project": job.project,
            "created_by": job.created_by,
            "model": job.model,
            "day": day,
            "status": status,
            "jobs": change,
        }
        for day in (_ALL_DAYS, _day(job.created_at))
        for status, change in changes.items()
        if len(changes) == 1 or before != after
    ]
    if not rows:
        return
    insert = (postgresql if connection.dialect.name == "postgresql" else sqlite).insert
    adding = insert(job_counts).values(rows)
    connection.execute(
        adding.on_conflict_do_update(
            index_elements=list(job_counts.primary_key.columns),
            set_={"jobs": job_counts.c.jobs + adding.excluded.jobs},
        )
    )


def count_jobs(connection: sa.Connection, filters: Mapping[str, Any]) -> int:
    """Return the number of jobs.

    Args:
        filters: Values of columns in `COUNTED`; None does not filter.
    """
    total = sa.select(sa.func.sum(job_counts.c.jobs)).where(
        job_counts.c.day == _ALL_DAYS, *_equal(filters)
    )
    return int(connection.execute(total).scalar() or 0)


def find_rank(
    connection: sa.Connection, filters: Mapping[str, Any], rank: int
) -> tuple[float, int] | None:
    """Return where the job with a rank is in the list of jobs, newest first, counting from 0.

    Returns:
        A time, and the rank among the jobs created before that time; None: there are fewer jobs.
    """
    found = sa.select(job_counts.c.day, sa.func.sum(job_counts.c.jobs)).where(
        job_counts.c.day > _ALL_DAYS, *_equal(filters)
    )
    by_day = found.group_by(job_counts.c.day).order_by(job_counts.c.day.desc())
    for day, number in connection.execute(by_day):
        if rank < number:
            return (day + 1.0) * _DAY, rank
        rank -= int(number)
    return None


def _equal(filters: Mapping[str, Any]) -> Collection[sa.ColumnElement[bool]]:
    return [job_counts.c[name] == value for name, value in filters.items() if value is not None]


def recount_jobs(connection: sa.Connection) -> None:
    """Count all jobs again, after rows were written by other means."""
    connection.execute(job_counts.delete())
    names = ("project", "created_by", "status", "model")
    columns = [jobs.c[name] for name in names]
    whole = sa.cast(jobs.c.created_at / _DAY, sa.Integer)  # truncates in SQLite
    if connection.dialect.name == "postgresql":
        whole = sa.cast(sa.func.floor(jobs.c.created_at / _DAY), sa.Integer)
    for day, groups in ((sa.literal(_ALL_DAYS), columns), (whole, [whole, *columns])):
        found = sa.select(*columns, day, sa.func.count()).group_by(*groups)
        connection.execute(job_counts.insert().from_select([*names, "day", "jobs"], found))
