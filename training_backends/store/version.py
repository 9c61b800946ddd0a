"""The version of a store: a value that differs after every commit, cheap enough to ask each time.

Whoever remembers something that was read from a store may use it again while the version is the
same. It is queried for every use, so what another process has changed is never missed.
"""

import sqlite3
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.store.database import is_postgres, sqlite_file

__all__ = ["StoreVersion"]

_SNAPSHOT: Final = "SELECT pg_current_snapshot()::text"
_PATIENCE: Final = 1.0
"""Seconds for an answer of the server, and between two attempts to connect."""


@dataclass(slots=True)
class _Asked:
    """A query that has not been sent yet; all callers until then share its answer."""

    answered: anyio.Event = field(default_factory=anyio.Event)
    answer: Hashable = None


class StoreVersion:
    """Tells the version of one store; used in the event loop only.

    SQLite counts the commits of other connections (`PRAGMA data_version`), without reading the
    file. At a PostgreSQL server the snapshot is compared: while no transaction begins to write or
    ends, it is the same, and so is all that can be read.
    """

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._file = sqlite_file(self._url)
        self._sqlite: sqlite3.Connection | None = None
        self._postgres: Any = None
        self._cursor: Any = None
        self._errors: type[Exception] = OSError
        self._next: _Asked | None = None
        self._turn = anyio.Lock()
        self._closed_until = float("-inf")

    async def current(self) -> Hashable:
        """Return the version; None if it is not known at the moment."""
        if is_postgres(self._url):
            return await self._of_server()
        if self._file is None:
            return None
        if self._sqlite is None:
            with suppress(sqlite3.Error):
                self._sqlite = await to_thread.run_sync(self._opened)
        return self._of_file()

    async def aclose(self) -> None:
        """Close the connection; the next question opens another one."""
        if self._sqlite is not None:
            await to_thread.run_sync(self._sqlite.close)
            self._sqlite = None
        await self._disconnect()

    def _opened(self) -> sqlite3.Connection:
        # Never waits, as it is used in the event loop, where it takes some microseconds.
        return sqlite3.connect(
            f"file:{self._file}?mode=rw",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )

    def _of_file(self) -> Hashable:
        if self._sqlite is None:
            return None
        try:
            found: int = self._sqlite.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error:
            return None
        return found

    async def _of_server(self) -> Hashable:
        """Ask the server, once for all that want to know before the question is sent."""
        if (asked := self._next) is not None:
            await asked.answered.wait()
            return asked.answer
        asked = self._next = _Asked()
        try:
            async with self._turn:
                self._next = None
                asked.answer = await self._ask()
        finally:
            if self._next is asked:
                self._next = None
            asked.answered.set()
        return asked.answer

    async def _ask(self) -> Hashable:
        if anyio.current_time() < self._closed_until:
            return None
        try:
            with anyio.fail_after(_PATIENCE):
                if self._cursor is None:
                    await self._connect()
                await self._cursor.execute(_SNAPSHOT)
                found: tuple[str] = await self._cursor.fetchone()
        except (self._errors, OSError, TimeoutError):
            self._closed_until = anyio.current_time() + _PATIENCE
            await self._disconnect()
            return None
        except BaseException:  # cancelled in the middle of an answer
            with anyio.CancelScope(shield=True):
                await self._disconnect()
            raise
        return found[0]

    async def _connect(self) -> None:
        import psycopg  # noqa: PLC0415  # an extra

        self._errors = psycopg.Error
        # Behind a pooler, each question may reach another session.
        dialect = self._url.set(drivername="postgresql+psycopg").get_dialect()()
        _, options = dialect.create_connect_args(self._url)
        self._postgres = await psycopg.AsyncConnection.connect(
            **{"connect_timeout": 10, **options}, autocommit=True, prepare_threshold=None
        )
        self._cursor = self._postgres.cursor()

    async def _disconnect(self) -> None:
        connection, self._postgres, self._cursor = self._postgres, None, None
        if connection is not None:
            with suppress(Exception):  # it may be broken already
                await connection.close()
