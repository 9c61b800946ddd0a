"""The gateway's part of the database that also holds its runs."""

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.core.errors import DuplicateRun
from training_backends.core.files import make_private_directory
from training_backends.gateway.errors import invalid
from training_backends.store.database import is_postgres
from training_backends.store.gateway_schema import files
from training_backends.store.leases import LeaseTable

__all__ = [
    "COUNTED_AHEAD",
    "GatewayStore",
    "HomeLock",
    "database_url",
    "lock_home",
    "page_at",
    "page_of",
    "present",
    "shares_home",
]

COUNTED_AHEAD: Final = 1000
"""Rows after a page that are counted for a total that is not maintained."""
_T = TypeVar("_T")


class GatewayStore(LeaseTable):
    """Each call is one transaction; a write is durable when it returns."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._queue = anyio.CapacityLimiter(1)

    def read(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` in a read transaction and return its result.

        Raises:
            StoreError: The database cannot be used.
        """
        with self._reading() as connection:
            return work(connection)

    def write(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Run `work` in a write transaction and return its result once durable.

        Raises:
            StoreError: The database cannot be used; nothing was changed.
        """
        with self._writing() as connection:
            return work(connection)

    async def aread(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Call `read` in a worker thread."""
        return await to_thread.run_sync(self.read, work)

    async def awrite(self, work: Callable[[sa.Connection], _T]) -> _T:
        """Call `write` in a worker thread, one at a time."""
        return await to_thread.run_sync(self.write, work, limiter=self._queue)


def database_url(root: Path, store_url: str | None) -> str:
    """Return the URL of the database of the gateway with its state in `root`."""
    return store_url or f"sqlite:///{root / 'runs.db'}"


@dataclass(frozen=True, slots=True)
class HomeLock:
    """A home that this process uses.

    Attributes:
        descriptor: Closing it releases the home.
        alone: Whether no other process used the home when this one started.
    """

    descriptor: int
    alone: bool

    def settle(self) -> None:
        """Let other gateways in, once what must not be shared is done."""
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)


def shares_home(store_url: str | None) -> bool:
    """Return whether several gateways may use a home at once: their store must be a server."""
    return store_url is not None and is_postgres(sa.make_url(store_url))


def lock_home(root: Path, *, shared: bool = False) -> HomeLock:
    """Lock the home for this process; the kernel releases the lock when the process exits.

    Args:
        shared: Other processes may lock it too, after `settle`.

    Raises:
        DuplicateRun: Another gateway is using this home.
    """
    make_private_directory(root)
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for one that starts
            return HomeLock(descriptor, alone=False)
        os.close(descriptor)
        raise DuplicateRun(
            f"Another gateway is using {root}.",
            hint="Stop that gateway, or set TRAINING_BACKENDS_HOME to another directory. Several "
            "gateways share a home if their store is on PostgreSQL.",
        ) from None
    return HomeLock(descriptor, alone=True)


def page_at(
    connection: sa.Connection,
    table: sa.Table,
    columns: Sequence["sa.Column[Any]"],
    conditions: Sequence[sa.ColumnElement[bool]],
    order: Sequence[sa.ColumnElement[Any]],
    *,
    skip: int,
    size: int,
) -> Sequence[Any]:
    """Return a page of rows; only entries of an index are passed to reach it, not rows."""
    query = sa.select(*columns)
    if not skip:
        return connection.execute(query.where(*conditions).order_by(*order).limit(size)).all()
    found = sa.select(table.c.id).where(*conditions).order_by(*order).limit(size).offset(skip)
    ids = connection.execute(found).scalars().all()
    rows = {row.id: row for row in connection.execute(query.where(table.c.id.in_(ids)))}
    return [rows[each] for each in ids]


def present() -> list[sa.ColumnElement[bool]]:
    """Return the condition for files that are neither deleted nor expired."""
    alive = files.c.expires_at.is_(None) | (files.c.expires_at > time.time())
    return [files.c.deleted_at.is_(None), alive]


def page_of(
    connection: sa.Connection,
    query: "sa.Select[Any]",
    table: sa.Table,
    *,
    visible: sa.ColumnElement[bool],
    after: str | None,
    limit: int,
    descending: bool = True,
) -> Sequence[Any]:
    """Return the rows of a query that follow a row by time, one more than `limit` if there are.

    Args:
        visible: The rows that `after` may name, whether or not the query returns them.

    Raises:
        HTTPProblem: `after` is no id of such a row.
    """
    at, key = table.c.created_at, table.c.id
    order = (at.desc(), key.desc()) if descending else (at, key)
    if after is not None:
        row = connection.execute(sa.select(at, key).where(key == after, visible)).first()
        if row is None:
            raise invalid(["query", "after"], f"{after} is not in this list", "unknown_id")
        place = sa.tuple_(at, key)
        query = query.where(place < tuple(row) if descending else place > tuple(row))
    return connection.execute(query.order_by(*order).limit(limit + 1)).all()
