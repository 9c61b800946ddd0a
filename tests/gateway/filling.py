"""Fill a store with as many runs, jobs, files and models as wanted, made from one real job."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from training_backends.core.run import utc_now
from training_backends.gateway.store import GatewayStore
from training_backends.store.database import is_postgres
from training_backends.store.gateway_schema import events, files, jobs, keys, models
from training_backends.store.job_counts import recount_jobs
from training_backends.store.schema import documents, metrics, records, runs

__all__ = ["LIVE", "analyze", "copy_id", "fill"]

LIVE: Final = 20
"""Jobs that run, whatever the number of those that have finished."""
_DAYS: Final = 1000.0
_MODELS: Final = 2
_FILES: Final = 1
"""Of so many jobs one has a model, or a file of its own."""
_PART: Final = 50_000
"""Jobs in a transaction, so that the write-ahead log of SQLite stays small."""
_FIRST: Final = "<first>"
_LAST: Final = "<last>"
_LITERAL: Final = {"no_parameters": True}
"""Of statements in which a percent sign is one."""
_SETTINGS: Final[Mapping[bool, Sequence[str]]] = {
    True: (
        "SET session_replication_role = replica",  # no checks of foreign keys
        "SET synchronous_commit = off",
        "SET maintenance_work_mem = '512MB'",
    ),
    False: (
        "PRAGMA synchronous=OFF",
        "PRAGMA cache_size=-400000",
        "PRAGMA threads=2",
        "PRAGMA busy_timeout=0",
        "PRAGMA journal_mode=OFF",  # writes half as much; fails if the database is open elsewhere
        "PRAGMA busy_timeout=30000",
    ),
}
"""Of connections to PostgreSQL, and to SQLite."""


def copy_id(number: int) -> str:
    """Return the id of a copy of the job; the first is the oldest."""
    return f"{number:08x}-0000-4000-8000-000000000000"


def fill(store: GatewayStore, job_id: str, count: int) -> None:
    """Add `count` copies of a finished job and its run, spread evenly over the last years.

    The youngest `LIVE` of them run. Each has the events and records of the first. A million takes
    minutes: the indexes are created afterwards, and nothing is forced to disk.
    """
    with _bulk(store) as engine:
        with engine.begin() as connection:
            copies = _copies(connection, job_id, count)
            indexes = [index for table in copies for index in table.indexes]
            for index in indexes:
                index.drop(connection)
        for first in range(1, count + 1, _PART):
            last = min(first + _PART - 1, count)
            with engine.begin() as connection:
                for copied in copies.values():
                    numbers = copied.replace(_FIRST, str(first)).replace(_LAST, str(last))
                    connection.exec_driver_sql(numbers, execution_options=_LITERAL)
        with engine.begin() as connection:
            for index in indexes:
                index.create(connection)
            recount_jobs(connection)


def analyze(store: GatewayStore) -> None:
    """Let the planner know what was filled in, as a server does by itself after a while.

    Nobody tells the planner of SQLite, so there the log is only written to the database.
    """
    with _bulk(store) as engine:
        postgres = engine.dialect.name == "postgresql"
        alone = engine.execution_options(isolation_level="AUTOCOMMIT")
        with alone.connect() as connection:
            for statement in (
                ("VACUUM (ANALYZE)", "CHECKPOINT")
                if postgres
                else ("PRAGMA wal_checkpoint(TRUNCATE)",)
            ):
                connection.exec_driver_sql(statement)


@contextmanager
def _bulk(store: GatewayStore) -> Iterator[sa.Engine]:
    """Connect for writing much, in a way that may lose it."""
    url = store._url  # with the password
    postgres = is_postgres(url)
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg") if postgres else url, poolclass=NullPool
    )

    def prepare(connection: Any, _record: Any) -> None:
        for setting in _SETTINGS[postgres]:
            with suppress(sqlite3.OperationalError):
                connection.execute(setting)
        connection.commit()

    sa.event.listen(engine, "connect", prepare)
    try:
        yield engine
    finally:
        engine.dispose()


def _copies(connection: sa.Connection, job_id: str, count: int) -> dict[sa.Table, str]:
    """Return statements that insert the copies with the numbers from `_FIRST` to `_LAST`."""
    postgres = connection.dialect.name == "postgresql"
    now = utc_now().timestamp()
    hexed = "lpad(to_hex(n), 8, '0')" if postgres else "printf('%08x', n)"
    new_id = f"{hexed} || '-0000-4000-8000-000000000000'"
    runs_now = f"n > {count - LIVE}"
    age = f"{now - _DAYS * 86_400} + n * {_DAYS * 86_400 / count!r}"
    at = f"strftime('%Y-%m-%dT%H:%M:%f000+00:00', {age}, 'unixepoch')"
    if postgres:
        form = 'YYYY-MM-DD"T"HH24:MI:SS.US'
        at = f"to_char(to_timestamp({age}) at time zone 'UTC', '{form}') || '+00:00'"
    true, false = ("true", "false") if postgres else ("1", "0")
    found = connection.execute(
        sa.select(documents.c.document).where(documents.c.run_id == job_id)
    ).scalar_one()
    run = {
        name: value
        for name, value in json.loads(found).items()
        if name not in {"id", "remote_id", "created_at"}
    }
    running = {**run, "status": "running", "finished_at": None, "result_model": None}
    document = (
        f"""'{{"id": "' || {new_id} || '", "remote_id": "' || {new_id} || '", "created_at": "' """
        f"""|| {at} || '", ' || CASE WHEN {runs_now} THEN {_rest(running)} ELSE {_rest(run)} END"""
    )
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
        (documents, "run_id", {"run_id": new_id, "document": document}, 1),
        (records, "run_id", own_run, 1),
        (metrics, "run_id", {"run_id": new_id}, 1),
        (
            jobs,
            "id",
            {
                "id": new_id,
                "created_at": age,
                "modified_at": age,
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
    numbers = (
        f"generate_series({_FIRST}, {_LAST}) numbers(n)"
        if postgres
        else f"(WITH RECURSIVE numbers(n) AS (SELECT {_FIRST} UNION ALL SELECT n + 1 FROM numbers "
        f"WHERE n < {_LAST}) SELECT n FROM numbers)"
    )
    copies = {}
    for table, key, changed, every in tables:
        names = [c.name for c in table.c if c.name not in changed or changed[c.name] is not None]
        values = [changed.get(name) or f"t.{name}" for name in names]
        first = sa.select(table.c.id).order_by(table.c.created_at).limit(1) if not key else None
        chosen = (
            f"t.{key} = '{job_id}'"
            if first is None
            else f"t.id = '{connection.execute(first).scalar()}'"
        )
        copies[table] = (
            f"INSERT INTO {table.name} ({', '.join(names)}) SELECT {', '.join(values)} "
            f"FROM {numbers} CROSS JOIN {table.name} t "
            f"WHERE {chosen} AND n / {every} * {every} = n"
        )
    return copies


def _rest(document: Mapping[str, Any]) -> str:
    """Return a literal with the JSON of an object, after its opening bracket."""
    return "'{}'".format(json.dumps(document)[1:].replace("'", "''"))
