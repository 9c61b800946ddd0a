"""Leases: work that only one process at a time may do, until it releases the lease or dies.

The clocks of machines that share a store must agree to within the requested `ttl`: a clock that
is further ahead takes over leases that are still held. Writes stay safe: every lease has a new
fencing token, so a former holder cannot write.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import sqlalchemy as sa

from training_backends.core.errors import StoreError
from training_backends.core.run import utc_now
from training_backends.store.database import Database
from training_backends.store.schema import as_text, leases

__all__ = ["IsGone", "Lease", "LeaseLost", "LeaseTable", "require"]

IsGone = Callable[[str], bool | None]
"""Returns whether an owner is dead: True, False (alive on this machine) or None (unknown).

Called within a transaction, so it must be quick and must not use the store.
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """A held lease.

    Attributes:
        token: Fencing token, greater than that of every earlier lease of any name.
    """

    name: str
    owner: str
    token: int


class LeaseLost(StoreError):
    """Another process has taken over the lease, so nothing was written."""


class LeaseTable(Database):
    """Leases in the run store."""

    moves: ClassVar[int] = 0
    """How many leases of others this process has taken over."""

    def take(self, name: str, owner: str, ttl: timedelta, *, is_gone: IsGone) -> Lease | None:
        """Take a lease; None while it is held, even by the same owner.

        Args:
            ttl: When the lease expires if it is unknown whether its owner is alive. An owner
                alive on this machine keeps it after that; a dead one loses it immediately.
        """
        with self._writing() as connection:
            row = _row(connection, name)
            if row is not None:
                if _holds(row, is_gone):
                    return None
                connection.execute(leases.delete().where(leases.c.token == row.token))
            until = as_text(utc_now() + ttl)
            connection.execute(leases.insert().values(name=name, owner=owner, until=until))
            found = connection.execute(sa.select(leases.c.token).where(leases.c.name == name))
            token = found.scalar_one()
        if row is not None and row.owner != owner:  # only now is the lease ours
            LeaseTable.moves += 1
        return Lease(name, owner, token)

    def renew(self, lease: Lease, ttl: timedelta) -> bool:
        """Extend a lease to `ttl` from now; False if it was taken over."""
        with self._writing() as connection:
            until = as_text(utc_now() + ttl)
            renewed = connection.execute(
                leases.update().where(leases.c.token == lease.token).values(until=until)
            )
            return renewed.rowcount == 1

    def release(self, lease: Lease) -> None:
        """Release a lease; no effect if it was taken over."""
        with self._writing() as connection:
            connection.execute(leases.delete().where(leases.c.token == lease.token))

    def holder(self, name: str, *, is_gone: IsGone = lambda _: None) -> str | None:
        """Return the owner of a held lease, or None if it can be taken."""
        with self._reading() as connection:
            row = _row(connection, name)
        return row.owner if row is not None and _holds(row, is_gone) else None


def require(connection: sa.Connection, lease: Lease | None) -> None:
    """Require that the lease, if given, has not been taken over.

    Raises:
        LeaseLost: The lease was taken over.
    """
    if lease is None:
        return
    row = _row(connection, lease.name)
    if row is None or row.token != lease.token:
        raise LeaseLost(
            f"{lease.name!r} was taken over by {row.owner if row else 'another process'}.",
            hint="The other process continues the work; there is nothing to do here.",
        )


def _row(connection: sa.Connection, name: str) -> Any:
    return connection.execute(sa.select(leases).where(leases.c.name == name)).first()


def _holds(row: Any, is_gone: IsGone) -> bool:
    gone = is_gone(row.owner)
    if gone is None:
        return bool(row.until > as_text(utc_now()))
    return not gone
