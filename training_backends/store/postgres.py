"""How a run store on a PostgreSQL server is opened: one writes at a time, nobody waits for ever."""

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from training_backends.core.errors import ConfigError, StoreError
from training_backends.core.redaction import register_url

__all__ = ["is_postgres", "is_unreachable", "postgres_engines", "postgres_error"]

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
    sa.event.listen(engine, "begin", _begin)
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


def _begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(_BEGIN)
