"""The database under the run store: transactions, and errors in our words."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from training_backends.client.sqlite import create_file, sqlite_engine, sqlite_file
from training_backends.client.store import schema
from training_backends.core.errors import ConfigError, StoreError

__all__ = ["RECOVER", "Database"]

RECOVER = "`training-backends doctor --recover` saves what can still be read and makes a new store."

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
            if self._url.get_backend_name() == "sqlite":
                engine = sqlite_engine(self._url)
            else:
                engine = sa.create_engine(self._url, isolation_level="SERIALIZABLE")
        except (ArgumentError, ImportError) as error:
            # The URL may hold a password, so only what was wrong with it is repeated.
            reason = type(error).__name__ if isinstance(error, ArgumentError) else str(error)
            raise ConfigError(
                f"The run store's URL cannot be used ({reason}).",
                hint="TRAINING_BACKENDS_STORE_URL is a SQLAlchemy URL such as "
                "sqlite:///runs.db; another database needs its driver installed.",
            ) from None
        self._reader = engine
        self._writer = engine.execution_options(writes=True)
        # SQLite has one writer at a time; threads that queue here need not poll its lock.
        self._turn = threading.Lock()
        self._ready = False

    def close(self) -> None:
        """Close all connections; the next use opens the store as it is by then."""
        self._reader.dispose()
        self._ready = False

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """See one state of the database, whatever others write meanwhile."""
        with self._errors():
            self._prepare()
            with self._reader.begin() as connection:
                yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Write all or nothing, alone, durable when it ends."""
        with self._errors():
            self._prepare()
            with self._turn, self._writer.begin() as connection:
                yield connection

    def _prepare(self) -> None:
        if self._ready:
            return
        path = sqlite_file(self._url)
        if path is not None:
            create_file(path)
        if not self._is_up_to_date():
            # Loads alembic, which a store that needs no change can do without.
            from training_backends.client.store.migrating import migrate  # noqa: PLC0415

            with self._turn:
                migrate(self._writer)
        self._ready = True

    def _is_up_to_date(self) -> bool:
        try:
            with self._reader.begin() as connection:
                found = connection.execute(sa.select(schema.revision.c.version_num)).scalar()
        except DatabaseError:
            # There is no such table, or worse: who migrates will see.
            return False
        return found == schema.REVISION

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DatabaseError, PoolTimeout, OSError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> StoreError:
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
