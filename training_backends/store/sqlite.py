"""How every SQLite database of ours is opened: durable, patient, its owner's only."""

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from tenacity import Retrying, retry_if_exception_message, stop_after_delay, wait_random

from training_backends.core.files import make_private_directory

__all__ = ["create_file", "sqlite_engine", "sqlite_file"]

_PATIENCE = 30
"""Seconds that a connection waits for another's transaction."""


def sqlite_engine(url: str | sa.URL) -> sa.Engine:
    """Make an engine whose transactions are durable when they end.

    One with the execution option `writes` takes the write lock when it begins: had it read
    before, it could not go on to write after somebody else did.
    """
    if sqlite_file(url) is None:
        # A database in memory is as old as its connection, so all threads share one.
        engine = sa.create_engine(
            url,
            poolclass=sa.QueuePool,
            pool_size=1,
            max_overflow=0,
            connect_args={"check_same_thread": False},
        )
    else:
        engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", _prepare)
    sa.event.listen(engine, "begin", _begin)
    return engine


def sqlite_file(url: str | sa.URL) -> Path | None:
    """Return the file that a URL names; None for memory or another kind of database."""
    url = sa.make_url(url)
    if url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return None
    return Path(str(url.database))


def create_file(path: Path) -> None:
    """Create a database's file, private to its owner; SQLite would leave that to the umask."""
    make_private_directory(path.parent)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _prepare(connection: Any, _record: Any) -> None:
    # SQLAlchemy begins transactions itself (below), so the driver must not.
    connection.isolation_level = None
    for pragma in (f"busy_timeout={_PATIENCE * 1000}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    # Of two that turn a database to WAL, SQLite refuses one at once, however patient it is.
    for attempt in Retrying(
        retry=retry_if_exception_message(match="database is locked"),
        wait=wait_random(0, 0.05),
        stop=stop_after_delay(_PATIENCE),
        reraise=True,
    ):
        with attempt:
            connection.execute("PRAGMA journal_mode=WAL")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
