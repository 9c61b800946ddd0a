"""The database under the run store: transactions, and errors in our words."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
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
from training_backends.store import schema
from training_backends.store.schema import REVISION, revision

__all__ = [
    "RECOVER",
    "Database",
    "create_file",
    "is_postgres",
    "is_unreachable",
    "migrate",
    "postgres_engines",
    "postgres_error",
    "sqlite_engine",
    "sqlite_file",
]

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_ALONE: Final = threading.Lock()
"""Alembic keeps what it is at in its modules, so one thread of a process migrates at a time."""
_BEFORE_ALEMBIC: Final = "0001"
"""What a store is whose version stands in a table `schema_version`."""


def migrate(engine: sa.Engine) -> None:
    """Bring a new or older store to the newest revision, in one transaction.

    Safe when several processes do it at once: the first does it, the others find it done.

    Args:
        engine: Takes the write lock when it begins.

    Raises:
        StoreError: The store was written by a newer version.
    """
    config = Config()
    # A Config takes % for the beginning of a reference.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with _ALONE, engine.begin() as connection:
        config.attributes["connection"] = connection
        found = _found(connection)
        if found == REVISION:
            return
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if found not in {*known, None}:
            raise StoreError(
                f"The run store was written by a newer version (revision {found}, "
                f"this one knows {REVISION}).",
                hint="Upgrade training-backends.",
            )
        if found == _BEFORE_ALEMBIC:
            command.stamp(config, _BEFORE_ALEMBIC)
        command.upgrade(config, "head")


def _found(connection: sa.Connection) -> str | None:
    """Return the revision of a store, however it says so; None: it is empty."""
    tables = sa.inspect(connection)
    if tables.has_table(revision.name):
        return connection.execute(sa.select(revision.c.version_num)).scalar()
    if tables.has_table("schema_version"):
        number = connection.execute(sa.text("SELECT version FROM schema_version")).scalar()
        return f"{number or 1:04}"
    return None


_DRIVERS: Final = frozenset({"postgres", "postgresql", "postgresql+psycopg"})
_SAFE_TO_TELL: Final = frozenset({"host", "hostaddr", "port", "dbname", "service"})
_PASSING: Final = frozenset({"08", "40", "53", "55", "57"})
"""Classes of SQLSTATE that the next try may not meet: connection, rollback, resources, locks,
operator (https://www.postgresql.org/docs/current/errcodes-appendix.html)."""
_NO_SESSION: Final = frozenset({"08", "28", "3D", "57"})
"""Classes of SQLSTATE of a server that cannot be reached, or that lets this user in nowhere."""
_LEFT_BEHIND: Final = (
    "A pooler in between hands out sessions in which another program has left prepared statements."
)
_NO_RIGHTS: Final = "Give this user a schema, and the right to create and change tables in it."
_LOCKED: Final = "Other programs hold locks in this database; try again."
_REJECTED: Final = {
    "26": _LEFT_BEHIND,
    "3F": _NO_RIGHTS,
    "40": _LOCKED,
    "42501": _NO_RIGHTS,
    "42P05": _LEFT_BEHIND,
    "53": "The server is out of disk space, memory or connections.",
    "55": _LOCKED,
}
"""What to do by SQLSTATE, or by its class, where the server answered."""
_TURN: Final = int.from_bytes(b"training", "big")
"""Key of the advisory lock that whoever writes holds until its transaction ends."""

# A server that went away is found out in seconds, whatever patience the system has.
_CONNECTING: Final = {
    "fallback_application_name": "training-backends",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
# A pooler such as PgBouncer in transaction mode gives each transaction another session of the
# server, so nothing may be left in one: no prepared statement, and below no setting or lock.
_WITHOUT_SESSION: Final = {"prepare_threshold": None}
# Everything set here ends with the transaction. Whoever falls silent in the middle, perhaps with
# its machine, loses its turn before others give up.
_BEGIN: Final = f"""
SELECT set_config('lock_timeout', '30s', true),
       set_config('idle_in_transaction_session_timeout', '15s', true),
       set_config('synchronous_commit', CASE current_setting('synchronous_commit')
           WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true),
       pg_advisory_xact_lock({_TURN})
"""


def is_postgres(url: sa.URL) -> bool:
    """Tell whether a URL names a PostgreSQL database, by the one driver that serves it here."""
    return url.drivername in _DRIVERS


def postgres_engines(url: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    """Make an engine that reads and one that writes, on one pool.

    A transaction that reads sees one state of the database. Those that write take turns, in
    whatever process, so each sees what the last one wrote and none fails for another's sake;
    they are durable when they end.

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
            # Each is a process of the server, which has 100 for all by default.
            pool_size=2,
            max_overflow=3,
        )
    except ImportError as error:
        raise ConfigError(
            f"A run store on PostgreSQL needs a driver that is not installed ({error}).",
            hint="pip install 'training-backends[postgres]', or leave out "
            "TRAINING_BACKENDS_STORE_URL.",
        ) from None
    sa.event.listen(engine, "begin", _begin_postgres)
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    # Waiting for the turn is a statement itself: what REPEATABLE READ sees is as old as that.
    writer = engine.execution_options(isolation_level="READ COMMITTED", writes=True)
    return reader, writer


def is_unreachable(error: BaseException) -> bool:
    """Tell whether an error means that the server, not the store on it, cannot be used."""
    return isinstance(error, OperationalError) and hasattr(error.orig, "sqlstate")


def postgres_error(url: sa.URL, error: Exception) -> StoreError:
    """Say what is wrong, and where; no password."""
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
            "Check that the server runs and lets this user in; TRAINING_BACKENDS_STORE_URL says "
            "where it is."
        )
    return known or "The server answered and rejected a statement; its log says more about it."


def _place(url: sa.URL) -> str:
    query = {name: value for name, value in url.query.items() if name in _SAFE_TO_TELL}
    return sa.URL.create(
        "postgresql", url.username, None, url.host, url.port, url.database, query
    ).render_as_string()


def _begin_postgres(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(_BEGIN)


_BUSY_PATIENCE = 30
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
        stop=stop_after_delay(_BUSY_PATIENCE),
        reraise=True,
    ):
        with attempt:
            connection.execute("PRAGMA journal_mode=WAL")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


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
            from training_backends.store.database import migrate  # noqa: PLC0415

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
