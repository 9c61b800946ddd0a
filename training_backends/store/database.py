"""The database of the run store: migrations, transactions and error translation."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from tenacity import (
    Retrying,
    retry_if_exception,
    retry_if_exception_message,
    stop_after_delay,
    wait_random,
)

from training_backends.core.errors import ConfigError, StoreError
from training_backends.core.files import make_private_directory
from training_backends.core.redaction import register_url
from training_backends.store import gateway_schema, schema

__all__ = [
    "CHANNEL",
    "RECOVER",
    "Database",
    "announce",
    "create_file",
    "is_postgres",
    "is_unreachable",
    "postgres_engines",
    "postgres_error",
    "sqlite_engine",
    "sqlite_file",
]

_DRIVERS: Final = frozenset({"postgres", "postgresql", "postgresql+psycopg"})
_SAFE_TO_TELL: Final = frozenset({"host", "hostaddr", "port", "dbname", "service"})
_PASSING: Final = frozenset({"08", "40", "53", "55", "57"})
"""Retryable classes of SQLSTATE: connection, rollback, resources, locks, operator intervention
(https://www.postgresql.org/docs/current/errcodes-appendix.html)."""
_NO_SESSION: Final = frozenset({"08", "28", "3D", "57"})
"""Classes of SQLSTATE without a session: unreachable server or rejected login."""
_LEFT_BEHIND: Final = (
    "A connection pooler reuses sessions with prepared statements of another program."
)
_NO_RIGHTS: Final = "Grant this user a schema with permission to create and change tables."
_LOCKED: Final = "Other programs hold locks in this database; try again later."
_REJECTED: Final = {
    "26": _LEFT_BEHIND,
    "3F": _NO_RIGHTS,
    "40": _LOCKED,
    "42501": _NO_RIGHTS,
    "42P05": _LEFT_BEHIND,
    "53": "The server is out of disk space, memory or connections.",
    "55": _LOCKED,
}
"""Hints by SQLSTATE or its class, for errors reported by the server."""
CHANNEL: Final = "training_backends"
"""On which a PostgreSQL server tells the ids of runs that have changed."""
WRITE_LOCK: Final = int.from_bytes(b"training", "big")
"""Key of the advisory lock that every write transaction holds."""

# Detect a lost server within seconds, regardless of the system's TCP settings.
_CONNECTING: Final = {
    "fallback_application_name": "training-backends",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
# A pooler such as PgBouncer in transaction mode may run each transaction in another session, so
# sessions must keep no state: no prepared statements, and below no settings or locks.
_WITHOUT_SESSION: Final = {"prepare_threshold": None}
# All settings end with the transaction. A process that stalls in a transaction loses the lock
# before the others time out.
BEGIN: Final = f"""
SELECT set_config('lock_timeout', '30s', true),
       set_config('idle_in_transaction_session_timeout', '15s', true),
       set_config('synchronous_commit', CASE current_setting('synchronous_commit')
           WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true),
       pg_advisory_xact_lock({WRITE_LOCK})
"""


def is_postgres(url: sa.URL) -> bool:
    """Return whether a URL names a PostgreSQL database with the supported driver."""
    return url.drivername in _DRIVERS


def postgres_engines(url: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    """Create a reading and a writing engine on one pool.

    A read transaction sees a consistent snapshot. Write transactions of all processes are
    serialized, so each sees the previous one's changes and none conflicts; they are durable
    when they end.

    Raises:
        ConfigError: The driver is not installed.
    """
    register_url(url.render_as_string(hide_password=False))
    given = {name: value for name, value in _CONNECTING.items() if name not in url.query}
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args={**given, **_WITHOUT_SESSION},
            pool_pre_ping=True,
            # Each connection is a server process, of which PostgreSQL allows 100 by default.
            pool_size=2,
            max_overflow=3,
        )
    except ImportError as error:
        raise ConfigError(
            f"The PostgreSQL driver is not installed ({error}).",
            hint="Run `pip install 'training-backends[postgres]'`, or unset "
            "TRAINING_BACKENDS_STORE_URL.",
        ) from None
    sa.event.listen(engine, "begin", _begin_postgres)
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    # Not REPEATABLE READ: its snapshot would predate the wait for the lock.
    writer = engine.execution_options(isolation_level="READ COMMITTED", writes=True)
    return reader, writer


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error means that the server, not the store, is unavailable."""
    return isinstance(error, OperationalError) and hasattr(error.orig, "sqlstate")


def postgres_error(url: sa.URL, error: Exception) -> StoreError:
    """Return the error with its reason and the store's URL, without a password."""
    cause: Any = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None)
    diagnosis = getattr(cause, "diag", None)
    reason = (diagnosis and diagnosis.message_primary) or " ".join(str(cause).split())
    lost = getattr(error, "connection_invalidated", False) or isinstance(error, PoolTimeout)
    passing = state[:2] in _PASSING if state else is_unreachable(error)
    return StoreError(
        f"The run store {_place(url)} cannot be used: {reason}",
        hint=_hint(state, reached=not (lost or is_unreachable(error))),
        retryable=lost or passing,
    )


def _hint(state: str | None, *, reached: bool) -> str:
    state = state or ""
    known = _REJECTED.get(state) or _REJECTED.get(state[:2])
    if known is None and (state[:2] in _NO_SESSION or not reached):
        return (
            "Check that the server is running and accepts this user, and that "
            "TRAINING_BACKENDS_STORE_URL is correct."
        )
    return known or "The server rejected a statement; see its log for details."


def _place(url: sa.URL) -> str:
    query = {name: value for name, value in url.query.items() if name in _SAFE_TO_TELL}
    return sa.URL.create(
        "postgresql", url.username, None, url.host, url.port, url.database, query
    ).render_as_string()


def _begin_postgres(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(BEGIN)


_BUSY_PATIENCE = 30
"""Seconds to wait for another connection's transaction."""


def sqlite_engine(url: str | sa.URL) -> sa.Engine:
    """Create an engine whose transactions are durable when they end.

    Transactions with the execution option `writes` take the write lock at the beginning: one
    that reads first cannot write after another transaction has written.
    """
    if sqlite_file(url) is None:
        # An in-memory database lives as long as its connection, so all threads share one.
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
    """Return the file of a URL; None for in-memory and other databases."""
    url = sa.make_url(url)
    if url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return None
    return Path(str(url.database))


def create_file(path: Path) -> None:
    """Create a missing database file with mode 600; SQLite would use the umask.

    An existing file is not even opened: closing any descriptor of a file drops all locks that this
    process has on it, those of open connections too. Another process that closed the database would
    then delete the write-ahead log that these connections still read and write.
    See https://www.sqlite.org/howtocorrupt.html, section 2.2.
    """
    make_private_directory(path.parent)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _prepare(connection: Any, _record: Any) -> None:
    # Transactions are begun below, not by the driver.
    connection.isolation_level = None
    for pragma in (f"busy_timeout={_BUSY_PATIENCE * 1000}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
    # SQLite ignores busy_timeout when two connections switch to WAL at once.
    for attempt in Retrying(
        retry=retry_if_exception_message(match="database is locked"),
        wait=wait_random(0, 0.05),
        stop=stop_after_delay(_BUSY_PATIENCE),
        reraise=True,
    ):
        with attempt:
            connection.execute("PRAGMA journal_mode=WAL")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


RECOVER = (
    "Run `training-backends doctor --recover` to rebuild the store from what is readable; restore "
    "a store on a server from a backup."
)

RESTART_PATIENCE: Final = 30
"""Seconds to wait for a server to restart."""

_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class Database:
    """Base of the parts of the run store. Safe across threads and processes."""

    def __init__(self, url: str) -> None:
        """Set up the store at a SQLAlchemy URL, without reading or writing.

        Raises:
            ConfigError: The URL is invalid, or its driver is not installed.
        """
        try:
            self._url = sa.make_url(url)
            self._reader, self._writer = _engines(self._url)
        except ConfigError:
            raise
        except (ArgumentError, ImportError, ValueError) as error:
            # Do not quote the URL: it may contain a password.
            reason = str(error) if isinstance(error, ImportError) else type(error).__name__
            raise ConfigError(
                f"Invalid run store URL ({reason}).",
                hint="Set TRAINING_BACKENDS_STORE_URL to a SQLAlchemy URL such as "
                "sqlite:///runs.db or postgresql://user@host/database.",
            ) from None
        # One writer at a time; threads of this process queue here instead of in the database.
        self._turn = threading.Lock()
        self._ready = False
        self._process = os.getpid()

    def close(self) -> None:
        """Close all connections; the next use opens the store again."""
        self._reader.dispose()
        self._ready = False

    def announce(self, run_id: str) -> None:
        """Wake the tasks that wait for changes of a run."""
        with self._writing() as connection:
            announce(connection, run_id)

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """Open a read transaction with a consistent snapshot."""
        with self._errors():
            self._prepare()
            with self._connected(self._reader) as connection, connection.begin():
                yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Open an exclusive write transaction, durable when it ends."""
        with self._errors():
            self._prepare()
            with (
                self._turn,
                self._connected(self._writer) as connection,
                connection.begin(),
            ):
                yield connection

    def _connected(self, engine: sa.Engine) -> sa.Connection:
        """Connect; wait for a server that was reachable before, in case it is restarting."""
        try:
            return engine.connect()
        except DatabaseError as error:
            if not (self._ready and is_unreachable(error)):
                raise
        return Retrying(
            retry=retry_if_exception(is_unreachable),
            wait=wait_random(0.1, 0.5),
            stop=stop_after_delay(RESTART_PATIENCE),
            reraise=True,
        )(engine.connect)

    def _prepare(self) -> None:
        if self._process != os.getpid():  # forked: open connections belong to the parent
            self._reader.dispose(close=False)
            self._turn, self._ready, self._process = threading.Lock(), False, os.getpid()
        if self._ready:
            return
        path = sqlite_file(self._url)
        if path is not None:
            create_file(path)
        if not self._is_up_to_date():
            with self._turn:
                if not _create(self._writer):
                    # Imports alembic, which only an older store needs.
                    from training_backends.store.migrate import migrate  # noqa: PLC0415

                    migrate(self._writer)
        self._ready = True

    def _is_up_to_date(self) -> bool:
        try:
            with self._reader.begin() as connection:
                found = connection.execute(sa.select(schema.revision.c.version_num)).scalar()
        except DatabaseError as error:
            if is_unreachable(error):
                raise
            # No such table, or worse: the migration will report it.
            return False
        return found == schema.REVISION

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, PoolTimeout, OSError) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> StoreError:
        if is_postgres(self._url):
            return postgres_error(self._url, error)
        # The path, not the URL: redaction does not see through percent-encoding.
        place = sqlite_file(self._url) or self._url.database or "in memory"
        cause = getattr(error, "orig", None) or error
        # The lower byte is the primary error code; the others are details.
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code in _DAMAGED:
            return StoreError(f"The run store {place} is damaged: {cause}", hint=RECOVER)
        return StoreError(
            f"The run store {place} cannot be used: {cause}",
            hint="Check free space and file permissions, or set TRAINING_BACKENDS_HOME.",
            retryable=code in _BUSY,
        )


def announce(connection: sa.Connection, run_id: str) -> None:
    """Tell the change of a run with the commit of this transaction, if the database can."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, run_id)))


def _create(writer: sa.Engine) -> bool:
    """Create the tables of the latest revision in an empty database, in one transaction.

    Returns:
        Whether the database was empty. Otherwise nothing changes.
    """
    with writer.begin() as connection:
        if sa.inspect(connection).get_table_names():
            return False
        for statement in _statements(connection.dialect.name, connection.dialect.driver):
            connection.exec_driver_sql(statement)
        connection.execute(schema.revision.insert().values(version_num=schema.REVISION))
        connection.execute(schema.schema_version.insert().values(version=2))
    return True


@cache
def _statements(dialect: str, driver: str) -> tuple[str, ...]:
    """Return the statements that create all tables, compiled once per process."""
    found: list[str] = []
    engine: MockConnection = sa.create_mock_engine(
        f"{dialect}+{driver}://",
        lambda ddl, *_, **__: found.append(str(ddl.compile(dialect=engine.dialect))),
    )
    gateway_schema.jobs.metadata.create_all(engine, checkfirst=False)
    return tuple(found)


def _engines(url: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    """Create a reading and a writing engine."""
    if "@" in (url.host or ""):
        raise ArgumentError("an unescaped @ in the password")
    if is_postgres(url):
        return postgres_engines(url)
    if url.get_backend_name() != "sqlite":
        # Others are untested with the guarantees of the store.
        raise ArgumentError("only SQLite and PostgreSQL are supported")
    engine = sqlite_engine(url)
    return engine, engine.execution_options(writes=True)
