"""The database under the run store: transactions, and errors in our words."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random

from training_backends.core.errors import ConfigError, StoreError
from training_backends.store import schema
from training_backends.store.postgres import (
    is_postgres,
    is_unreachable,
    postgres_engines,
    postgres_error,
)
from training_backends.store.sqlite import create_file, sqlite_engine, sqlite_file

__all__ = ["RECOVER", "Database"]

RECOVER = (
    "`training-backends doctor --recover` saves what can still be read and makes a new store; "
    "one on a server comes back from a backup."
)

_PATIENCE: Final = 30
"""Seconds that a server which was there before has to come back."""

_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Database:
    """What the parts of the run store have in common. Safe across threads and processes."""

    def __init__(self, url: str) -> None:
        """Open the store at a SQLAlchemy URL; nothing is read or written yet.

        Raises:
            ConfigError: The URL cannot be read, or its driver is not installed.
        """
        try:
            self._url = sa.make_url(url)
            self._reader, self._writer = _engines(self._url)
        except ConfigError:
            raise
        except (ArgumentError, ImportError, ValueError) as error:
            # The URL may hold a password, so only what was wrong with it is repeated.
            reason = str(error) if isinstance(error, ImportError) else type(error).__name__
            raise ConfigError(
                f"The run store's URL cannot be used ({reason}).",
                hint="TRAINING_BACKENDS_STORE_URL is a SQLAlchemy URL such as "
                "sqlite:///runs.db or postgresql://user@host/database.",
            ) from None
        # There is one writer at a time; threads that queue here need not do so in the database.
        self._turn = threading.Lock()
        self._ready = False
        self._process = os.getpid()

    def close(self) -> None:
        """Close all connections; the next use opens the store as it is by then."""
        self._reader.dispose()
        self._ready = False

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """See one state of the database, whatever others write meanwhile."""
        with self._errors():
            self._prepare()
            with self._connected(self._reader) as connection, connection.begin():
                yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Write all or nothing, alone, durable when it ends."""
        with self._errors():
            self._prepare()
            with (
                self._turn,
                self._connected(self._writer) as connection,
                connection.begin(),
            ):
                yield connection

    def _connected(self, engine: sa.Engine) -> sa.Connection:
        """Connect; a server that was there before may be starting anew, and is waited for."""
        try:
            return engine.connect()
        except DatabaseError as error:
            if not (self._ready and is_unreachable(error)):
                raise
        return Retrying(
            retry=retry_if_exception(is_unreachable),
            wait=wait_random(0.1, 0.5),
            stop=stop_after_delay(_PATIENCE),
            reraise=True,
        )(engine.connect)

    def _prepare(self) -> None:
        if self._process != os.getpid():  # forked: all that is open is the parent's
            self._reader.dispose(close=False)
            self._turn, self._ready, self._process = threading.Lock(), False, os.getpid()
        if self._ready:
            return
        path = sqlite_file(self._url)
        if path is not None:
            create_file(path)
        if not self._is_up_to_date():
            # Loads alembic, which a store that needs no change can do without.
            from training_backends.store.migrate import migrate  # noqa: PLC0415

            with self._turn:
                migrate(self._writer)
        self._ready = True

    def _is_up_to_date(self) -> bool:
        try:
            with self._reader.begin() as connection:
                found = connection.execute(sa.select(schema.revision.c.version_num)).scalar()
        except DatabaseError as error:
            if is_unreachable(error):
                raise
            # There is no such table, or worse: who migrates will see.
            return False
        return found == schema.REVISION

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeout, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> StoreError:
        if is_postgres(self._url):
            return postgres_error(self._url, error)
        place = self._url.render_as_string(hide_password=True)
        cause = getattr(error, "orig", None) or error
        # The lower byte is the kind of error, the others say more about it.
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            return StoreError(f"The run store {place} is damaged: {cause}", hint=RECOVER)
        return StoreError(
            f"The run store {place} cannot be used: {cause}",
            hint="Check the disk and the file's permissions, or set TRAINING_BACKENDS_HOME.",
            retryable=code in _BUSY,
        )


def _engines(url: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    """Make an engine that reads and one that writes."""
    if "@" in (url.host or ""):
        raise ArgumentError("the end of a password is taken for the host")
    if is_postgres(url):
        return postgres_engines(url)
    if url.get_backend_name() != "sqlite":
        # Of any other it is not known that it keeps what the store promises.
        raise ArgumentError("neither SQLite nor PostgreSQL")
    engine = sqlite_engine(url)
    return engine, engine.execution_options(writes=True)
