"""Results that are to be copied to the destination of their run, until they are."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from training_backends.store.database import Database
from training_backends.store.schema import as_text, destinations

__all__ = ["Destinations", "DueResult"]


class DueResult(NamedTuple):
    """A result that is to be copied.

    Attributes:
        attempts: How often it has failed.
    """

    run_id: str
    attempts: int


class Destinations(Database):
    """The results to copy in the run store; a completed run adds its own."""

    def due_results(self, now: datetime, *, limit: int = 20) -> Sequence[DueResult]:
        """Return results that are due, those first that wait for the longest time."""
        due = sa.select(destinations).where(destinations.c.due_at <= as_text(now))
        with self._reading() as connection:
            rows = connection.execute(due.order_by(destinations.c.due_at).limit(limit)).all()
        return [DueResult(row.run_id, row.attempts) for row in rows]

    def due_result(self, run_id: str) -> DueResult | None:
        """Return the result of a run, due or not; None: it has been copied, or need not be."""
        mine = sa.select(destinations).where(destinations.c.run_id == run_id)
        with self._reading() as connection:
            row = connection.execute(mine).first()
        return None if row is None else DueResult(row.run_id, row.attempts)

    def postpone_result(self, run_id: str, until: datetime) -> None:
        """Count a failed attempt, and try again later."""
        attempts = destinations.c.attempts + 1
        mine = destinations.update().where(destinations.c.run_id == run_id)
        with self._writing() as connection:
            connection.execute(mine.values(due_at=as_text(until), attempts=attempts))

    def result_copied(self, run_id: str) -> None:
        """Record that a result has been copied; safe to repeat."""
        with self._writing() as connection:
            connection.execute(destinations.delete().where(destinations.c.run_id == run_id))
