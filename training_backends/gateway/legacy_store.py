"""Import `gateway.db`, the gateway's own database up to version 0.1, into the run store once."""

import json
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from training_backends.core.errors import DuplicateRun, StoreError
from training_backends.gateway.store import GatewayStore, lock_home
from training_backends.protocols.mistral.status import ENDED
from training_backends.store import gateway_schema as schema
from training_backends.store.job_counts import recount_jobs
from training_backends.store.schema import deliveries

__all__ = ["import_legacy", "import_legacy_locked"]

_Rows = Sequence[dict[str, Any]]
_FILE: Final = "gateway.db"
_TABLES: Final = ("files", "jobs", "models", "keys", "events", "checkpoints")
_OF_RUN: Final = frozenset({"STARTED", "RUNNING"})
"""Statuses whose events are now computed from the log of the run."""
_METRICS: Final = ("train_loss", "valid_loss", "valid_mean_token_accuracy")
_WITH_PROJECTS: Final = 4
"""First schema version in which no file is private to a key."""
_DEFAULTS: Final = {"project": schema.DEFAULT_PROJECT, "scope": "write", "cleaned_up": False}
PATIENCE: Final = 30.0
"""Seconds to wait for another process that imports."""


def import_legacy(store: GatewayStore, root: Path) -> None:
    """Import the old database in `root`, unless a gateway of an earlier version uses it.

    Raises:
        StoreError: The old database cannot be read, or is in use.
    """
    until = time.monotonic() + PATIENCE
    while (root / _FILE).exists():
        try:
            descriptor = lock_home(root).descriptor
        except DuplicateRun as error:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise StoreError(
                f"A gateway of an earlier version is using {root}.",
                hint="Stop it, and start the new version.",
            ) from error
        try:
            import_legacy_locked(store, root)
        finally:
            os.close(descriptor)


def import_legacy_locked(store: GatewayStore, root: Path) -> None:
    """Import the old database in `root`, whose lock is held; then rename it to `*.orig`.

    Safe to repeat: rows that are already there are left alone.

    Raises:
        StoreError: The old database cannot be read.
    """
    path = root / _FILE
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            tables = _read(connection)
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"The gateway's old database {path} cannot be imported: {error}",
            hint="Restore it from a backup, or move it away to start without the keys, files, "
            "jobs and models in it.",
        ) from error
    store.write(partial(_insert, tables=tables))
    kept = path.with_name(f"{_FILE}.orig")
    if kept.exists():
        kept = path.with_name(f"{_FILE}.orig-{time.time_ns()}")
    path.rename(kept)


def _read(connection: sqlite3.Connection) -> dict[str, _Rows]:
    """Return the rows of each table; a version of before lacks some columns."""
    connection.row_factory = sqlite3.Row
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    there = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    tables: dict[str, _Rows] = {name: [] for name in _TABLES}
    for name in there.intersection(_TABLES):
        tables[name] = [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]  # noqa: S608  # ours
    for file in tables["files"]:
        if version < _WITH_PROJECTS and file["visibility"] == "user":
            file["visibility"] = "workspace"
    return tables


def _insert(connection: sa.Connection, tables: Mapping[str, _Rows]) -> None:
    for name in ("files", "models", "keys"):
        _add(connection, getattr(schema, name), tables[name])
    history = {job["id"]: _history(job["id"], tables) for job in tables["jobs"]}
    for job in tables["jobs"]:
        over = job["status"] in ENDED
        job["history"] = history[job["id"]] if over else None
    added = _add(connection, schema.jobs, tables["jobs"])
    live = {job["id"] for job in added if job["status"] not in ENDED}
    rows = [
        {"job_id": event["job_id"], "name": event["name"], "created_at": event["created_at"]}
        | {"data": json.loads(event["data"])}
        for event in sorted(tables["events"], key=lambda event: event["id"])
        if event["job_id"] in live and json.loads(event["data"]).get("status") not in _OF_RUN
    ]
    if rows:
        connection.execute(schema.events.insert(), rows)
    if added:
        recount_jobs(connection)
        # Earlier versions delivered none of their events.
        connection.execute(deliveries.delete())


def _history(job_id: str, tables: Mapping[str, _Rows]) -> dict[str, Any]:
    """Return the events and checkpoints of a job as `job_events.history` does."""
    return {
        "events": [
            {"name": event["name"], "data": json.loads(event["data"]), "at": event["created_at"]}
            for event in sorted(tables["events"], key=lambda it: (it["created_at"], it["id"]))
            if event["job_id"] == job_id
        ],
        "checkpoints": [
            {
                "step": point["step"],
                "at": point["created_at"],
                "metrics": {name: point[name] for name in _METRICS},
            }
            for point in sorted(tables["checkpoints"], key=lambda it: it["step"])
            if point["job_id"] == job_id
        ],
    }


def _add(connection: sa.Connection, table: sa.Table, rows: _Rows) -> _Rows:
    """Insert the rows whose id is not there yet, and return them."""
    known = set(connection.execute(sa.select(table.c.id)).scalars())
    new = [_row(table, row) for row in rows if row["id"] not in known]
    if new:
        connection.execute(table.insert(), new)
    return new


def _row(table: sa.Table, row: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for column in table.c:
        value = row.get(column.name, _DEFAULTS.get(column.name))
        if isinstance(column.type, sa.JSON) and isinstance(value, str):
            value = json.loads(value)
        elif isinstance(column.type, sa.Boolean):
            value = bool(value)
        values[column.name] = value
    return values
