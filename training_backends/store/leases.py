"""Leases: work that only one process at a time may do, until it ends or dies.

Machines that share a store must have clocks that agree to within the `ttl` that they ask
for: one that is fast by more takes over what is still held. What was taken over is lost to
its former holder all the same, because every take gives a new token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from training_backends.core.errors import StoreError
from training_backends.core.run import utc_now
from training_backends.store.database import Database
from training_backends.store.schema import as_text, leases

__all__ = ["IsGone", "Lease", "LeaseLost", "Leases", "require"]

IsGone = Callable[[str], bool | None]
"""Tells whether an owner is dead: True, False (it lives here), None (nobody here can tell).

It is asked within a transaction, so it must be quick and leave the store alone.
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a holder has in hand.

    Attributes:
        token: Greater than that of every lease taken before, of whatever name.
    """

    name: str
    owner: str
    token: int


class LeaseLost(StoreError):
    """Somebody else has taken the lease over, so nothing was written under it."""


class Leases(Database):
    """Leases in the run store."""

    def take(self, name: str, owner: str, ttl: timedelta, *, is_gone: IsGone) -> Lease | None:
        """Take a lease; None while it is held, even by the same owner.

        Args:
            ttl: When it may be taken from an owner of whom nobody here can tell whether it
                lives. An owner that lives here keeps it however late it is; one that is gone
                loses it at once.
        """
        with self._writing() as connection:
            row = _row(connection, name)
            if row is not None:
                if _holds(row, is_gone):
                    return None
                connection.execute(leases.delete().where(leases.c.token == row.token))
            until = as_text(utc_now() + ttl)
            connection.execute(leases.insert().values(name=name, owner=owner, until=until))
            token = connection.execute(sa.select(leases.c.token).where(leases.c.name == name))
            return Lease(name, owner, token.scalar_one())

    def renew(self, lease: Lease, ttl: timedelta) -> bool:
        """Hold a lease for `ttl` from now on; False if it was taken over."""
        with self._writing() as connection:
            until = as_text(utc_now() + ttl)
            renewed = connection.execute(
                leases.update().where(leases.c.token == lease.token).values(until=until)
            )
            return renewed.rowcount == 1

    def release(self, lease: Lease) -> None:
        """Let go of a lease; one that was taken over is left alone."""
        with self._writing() as connection:
            connection.execute(leases.delete().where(leases.c.token == lease.token))

    def holder(self, name: str, *, is_gone: IsGone = lambda _: None) -> str | None:
        """Return the owner of a lease that could not be taken now, or None."""
        with self._reading() as connection:
            row = _row(connection, name)
        return row.owner if row is not None and _holds(row, is_gone) else None


def require(connection: sa.Connection, lease: Lease | None) -> None:
    """Let a transaction go on only while a lease, if given, was not taken over.

    Raises:
        LeaseLost: It was.
    """
    if lease is None:
        return
    row = _row(connection, lease.name)
    if row is None or row.token != lease.token:
        raise LeaseLost(
            f"{lease.name!r} was taken over by {row.owner if row else 'another process'}.",
            hint="The other process goes on with it; nothing is left to do here.",
        )


def _row(connection: sa.Connection, name: str) -> Any:
    return connection.execute(sa.select(leases).where(leases.c.name == name)).first()


def _holds(row: Any, is_gone: IsGone) -> bool:
    gone = is_gone(row.owner)
    if gone is None:
        return bool(row.until > as_text(utc_now()))
    return not gone
