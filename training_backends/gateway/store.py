"""The gateway's own database: files, jobs, events, checkpoints, models and keys."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import sqlalchemy as sa
from anyio import to_thread
from sqlalchemy.exc import DatabaseError

from training_backends.core.errors import StoreError
from training_backends.store.database import create_file, sqlite_engine

__all__ = [
    "DEFAULT_PROJECT",
    "ENDED",
    "SCHEMA_VERSION",
    "GatewayStore",
    "checkpoints",
    "events",
    "files",
    "jobs",
    "keys",
    "models",
]

SCHEMA_VERSION = 4
ENDED = ("SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED")
"""Terminal statuses."""
DEFAULT_PROJECT = "default"
"""Owner of objects created before projects existed, and of keys created without one."""

_T = TypeVar("_T")
_metadata = sa.MetaData()


def _project() -> "sa.Column[str]":
    """Return a column for the project that owns a row."""
    return sa.Column("project", sa.String, nullable=False, server_default=DEFAULT_PROJECT)


files = sa.Table(
    "files",
    _metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("filename", sa.String, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False, index=True),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("purpose", sa.String, nullable=False),
    sa.Column("sample_type", sa.String, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("num_lines", sa.Integer),
    sa.Column("mimetype", sa.String),
    sa.Column("visibility", sa.String),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("deleted_at", sa.Float),
    _project(),
)
jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("backend", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("job_type", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("suffix", sa.String),
    sa.Column("auto_start", sa.Boolean, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
    sa.Column("modified_at", sa.Float, nullable=False),
    # When the start was accepted; `launched`: the backend has accepted it too.
    sa.Column("started_at", sa.Float),
    sa.Column("launched", sa.Boolean, nullable=False, default=False),
    sa.Column("training_files", sa.JSON, nullable=False),
    sa.Column("validation_files", sa.JSON, nullable=False),
    sa.Column("blobs", sa.JSON, nullable=False),
    sa.Column("hyperparameters", sa.JSON, nullable=False),
    sa.Column("classifier_targets", sa.JSON, nullable=False),
    sa.Column("context_length", sa.Integer, nullable=False),
    sa.Column("integrations", sa.JSON, nullable=False),
    sa.Column("wandb_project", sa.String),
    sa.Column("wandb_name", sa.String),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("quote", sa.JSON(none_as_null=True)),
    sa.Column("log_cursor", sa.String),
    sa.Column("trained_tokens", sa.Integer),
    sa.Column("fine_tuned_model", sa.String),
    _project(),
)
events = sa.Table(
    "events",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False, index=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
checkpoints = sa.Table(
    "checkpoints",
    _metadata,
    sa.Column("job_id", sa.String(36), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("train_loss", sa.Float),
    sa.Column("valid_loss", sa.Float),
    sa.Column("valid_mean_token_accuracy", sa.Float),
)
models = sa.Table(
    "models",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("job_id", sa.String(36), nullable=False),
    sa.Column("root", sa.String, nullable=False),
    sa.Column("model_type", sa.String, nullable=False),
    sa.Column("context_length", sa.Integer, nullable=False),
    sa.Column("classifier_targets", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("name", sa.String),
    sa.Column("description", sa.String),
    sa.Column("archived", sa.Boolean, nullable=False, default=False),
    sa.Column("deleted_at", sa.Float),
    _project(),
)
keys = sa.Table(
    "keys",
    _metadata,
    sa.Column("id", sa.String(8), primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("scope", sa.String, nullable=False, server_default="write"),
    sa.Column("expires_at", sa.Float),
    sa.Column("last_used_at", sa.Float),
    _project(),
)

_INDEXES = (
    sa.Index("ix_files_created_at", files.c.created_at),
    sa.Index("ix_jobs_created_at", jobs.c.created_at),
)
"""Created if missing; older versions can still use the database."""
_UPGRADES = {
    1: (
        "ALTER TABLE keys ADD COLUMN scope VARCHAR DEFAULT 'write' NOT NULL",
        "ALTER TABLE keys ADD COLUMN expires_at FLOAT",
        "ALTER TABLE keys ADD COLUMN last_used_at FLOAT",
    ),
    2: ("ALTER TABLE jobs DROP COLUMN checkpoint_stride",),
    3: (
        *(
            f"ALTER TABLE {table} ADD COLUMN project VARCHAR DEFAULT '{DEFAULT_PROJECT}' NOT NULL"
            for table in ("files", "jobs", "models", "keys")
        ),
        # Every key could see them anyway.
        "UPDATE files SET visibility = 'workspace' WHERE visibility = 'user'",
    ),
}
"""Statements that upgrade a database from each schema version to the next."""


class GatewayStore:
    """One SQLite file. Each call is one transaction; a write is durable when it returns."""

    def __init__(self, path: Path) -> None:
        create_file(path)
        self._path = path
        self._reads = sqlite_engine(f"sqlite:///{path}")
        self._writes = self._reads.execution_options(writes=True)
        self._writer = anyio.CapacityLimiter(1)
        self.write(self._prepare)

    def close(self) -> None:
        """Close all connections."""
        self._reads.dispose()

    def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` in a read transaction and return its result.

        Raises:
            StoreError: The database cannot be used.
        """
        return self._run(self._reads, work)

    def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` in a write transaction and return its result once durable.

        Raises:
            StoreError: The database cannot be used; nothing was changed.
        """
        return self._run(self._writes, work)

    async def aread(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Call `read` in a worker thread."""
        return await to_thread.run_sync(self.read, work)

    async def awrite(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Call `write` in a worker thread, one at a time."""
        return await to_thread.run_sync(self.write, work, limiter=self._writer)

    def _run(self, engine: sa.Engine, work: Callable[[sa.Connection], _T]) -> _T:
        try:
            with engine.begin() as connection:
                return work(connection)
        except DatabaseError as error:
            raise StoreError(
                f"The gateway's database {self._path} cannot be used: {error.orig or error}",
                hint="Check free disk space and file permissions.",
            ) from error

    def _prepare(self, connection: sa.Connection) -> None:
        """Create the tables, or upgrade those of an older version."""
        found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if found > SCHEMA_VERSION:
            raise StoreError(
                f"{self._path} was written by a newer version (schema {found}; this version "
                f"supports {SCHEMA_VERSION}).",
                hint="Upgrade training-backends.",
            )
        for version in range(found or SCHEMA_VERSION, SCHEMA_VERSION):
            for statement in _UPGRADES[version]:
                connection.exec_driver_sql(statement)
        _metadata.create_all(connection)
        for index in _INDEXES:
            index.create(connection, checkfirst=True)
        if found != SCHEMA_VERSION:
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
