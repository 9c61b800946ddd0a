"""Fill a store with as many runs, jobs, files and models as wanted, made from one real job."""

from collections.abc import Mapping
from typing import Any, Final

import sqlalchemy as sa

from training_backends.core.run import utc_now
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import events, files, jobs, keys, models
from training_backends.store.job_counts import recount_jobs
from training_backends.store.schema import documents, metrics, records, runs

__all__ = ["LIVE", "analyze", "fill"]

LIVE: Final = 20
"""Jobs that run, whatever the number of those that have finished."""
_DAYS: Final = 1000.0
_MODELS: Final = 2
_FILES: Final = 1
"""Of so many jobs one has a model, or a file of its own."""


def fill(store: GatewayStore, job_id: str, count: int) -> None:
    """Add `count` copies of a finished job and its run, spread evenly over the last years.

    The youngest `LIVE` of them run. Each has the events and records of the first.
    """
    now = utc_now().timestamp()
    store.write(lambda connection: _fill(connection, job_id, count, now))


def _fill(connection: sa.Connection, job_id: str, count: int, now: float) -> None:
    postgres = connection.dialect.name == "postgresql"
    hexed = "lpad(to_hex(n), 8, '0')" if postgres else "printf('%08x', n)"
    new_id = f"{hexed} || '-0000-4000-8000-000000000000'"
    runs_now = f"n > {count - LIVE}"
    age = f"{now - _DAYS * 86_400} + n * {_DAYS * 86_400 / count!r}"
    at = f"strftime('%Y-%m-%dT%H:%M:%f000+00:00', {age}, 'unixepoch')"
    if postgres:
        form = 'YYYY-MM-DD"T"HH24:MI:SS.US'
        at = f"to_char(to_timestamp({age}) at time zone 'UTC', '{form}') || '+00:00'"
    true, false = ("true", "false") if postgres else ("1", "0")
    own = {"job_id": new_id, "id": None}
    own_run = {"run_id": new_id, "id": None}
    tables: list[tuple[sa.Table, str, Mapping[str, str | None], int]] = [
        (
            runs,
            "id",
            {
                "id": new_id,
                "created_at": at,
                "remote_id": new_id,
                "status": f"CASE WHEN {runs_now} THEN 'running' ELSE 'completed' END",
                "whole": f"CASE WHEN {runs_now} THEN {false} ELSE {true} END",
            },
            1,
        ),
        (documents, "run_id", {"run_id": new_id}, 1),
        (records, "run_id", own_run, 1),
        (metrics, "run_id", {"run_id": new_id}, 1),
        (
            jobs,
            "id",
            {
                "id": new_id,
                "created_at": age,
                "status": f"CASE WHEN {runs_now} THEN 'RUNNING' ELSE 'SUCCESS' END",
                "cleaned_up": f"CASE WHEN {runs_now} THEN {false} ELSE {true} END",
                "fine_tuned_model": f"'ft:m:' || {hexed}",
            },
            1,
        ),
        (events, "job_id", own, 1),
        (
            models,
            "job_id",
            {"id": f"'ft:m:' || {hexed}", "job_id": new_id, "created_at": age},
            _MODELS,
        ),
        (files, "", {"id": new_id, "created_at": age, "sha256": new_id}, _FILES),
        (keys, "", {"id": hexed, "created_at": age}, 10),
    ]
    for table, key, changed, every in tables:
        names = [c.name for c in table.c if c.name not in changed or changed[c.name] is not None]
        values = [changed.get(name) or f"t.{name}" for name in names]
        chosen = (
            f"t.{key} = '{job_id}'"
            if key
            else f"t.id = (SELECT id FROM {table.name} ORDER BY created_at LIMIT 1)"
        )
        connection.exec_driver_sql(
            f"INSERT INTO {table.name} ({', '.join(names)}) "
            f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers "
            f"WHERE n < {count}) SELECT {', '.join(values)} FROM {table.name} t, numbers "
            f"WHERE {chosen} AND n / {every} * {every} = n"
        )
    recount_jobs(connection)


def analyze(store: GatewayStore) -> None:
    """Let the planner know what was filled in, as the database does by itself after a while."""
    engine: Any = store._reader  # outside any transaction
    if engine.dialect.name == "postgresql":
        plain = sa.create_engine(engine.url.set(drivername="postgresql+psycopg"))
        with plain.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM (ANALYZE)")
        plain.dispose()
    else:
        store.write(lambda connection: connection.exec_driver_sql("ANALYZE"))
