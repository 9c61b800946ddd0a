"""Launch journals: the steps of each launch, and known uploads."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from training_backends.core.backend import JSONValue
from training_backends.core.run import utc_now
from training_backends.store.database import Database, announce
from training_backends.store.leases import Lease, require
from training_backends.store.schema import as_text, journal, uploads

__all__ = ["JournalEntry", "Journals", "SavedStep", "put_back"]

_ANY_STEP = "*"
"""Name of an entry for all steps of a run whose journal may have lost rows."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A launch step that was begun.

    Attributes:
        finished: Whether its result is known.
        supposed: Whether it was begun is unknown, because the journal was damaged.
    """

    finished: bool
    result: JSONValue
    supposed: bool = False


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A step recovered from a damaged store."""

    name: str
    begun_at: str
    result: str | None


class Journals(Database):
    """Launch journals and known uploads in the run store.

    Methods with a lease write only if it has not been taken over.
    """

    def entry(self, run_id: str, name: str) -> JournalEntry | None:
        """Return a step, or None if it was never begun."""
        names = journal.c.name.in_([name, _ANY_STEP])
        query = sa.select(journal.c.name, journal.c.result).where(journal.c.run_id == run_id, names)
        with self._reading() as connection:
            found = {row.name: row.result for row in connection.execute(query)}
        if name in found:
            result = found[name]
            return JournalEntry(result is not None, None if result is None else json.loads(result))
        return JournalEntry(finished=False, result=None, supposed=True) if found else None

    def has_open_step(self, run_id: str) -> bool:
        """Return whether a step of the run was, or may have been, begun and is unfinished."""
        query = sa.select(journal.c.name).where(
            journal.c.run_id == run_id, journal.c.result.is_(None)
        )
        with self._reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def step_names(self, run_id: str) -> frozenset[str]:
        """Return the names of the steps of a run that were, or may have been, begun."""
        query = sa.select(journal.c.name).where(journal.c.run_id == run_id)
        with self._reading() as connection:
            return frozenset(connection.execute(query).scalars())

    def begin(self, run_id: str, name: str, *, lease: Lease | None = None) -> None:
        """Record that a step is about to begin.

        Raises:
            LeaseLost: Another process has taken over this launch.
        """
        with self._writing() as connection:
            require(connection, lease)
            connection.execute(journal.insert().values(_begun(run_id, name)))

    def finish(
        self, run_id: str, name: str, result: JSONValue, *, lease: Lease | None = None
    ) -> None:
        """Record a step's result.

        Raises:
            LeaseLost: Another process has taken over this launch.
        """
        encoded = json.dumps(result)
        with self._writing() as connection:
            require(connection, lease)
            known = connection.execute(
                journal.update().where(_step(run_id, name)).values(result=encoded)
            )
            if known.rowcount == 0:  # there is only the entry for all steps
                row = _begun(run_id, name)
                connection.execute(journal.insert().values(**row, result=encoded))
            announce(connection, run_id)

    def forget(self, run_id: str, name: str, *, lease: Lease | None = None) -> None:
        """Remove a begun step that certainly had no effect.

        Raises:
            LeaseLost: Another process has taken over this launch.
        """
        with self._writing() as connection:
            require(connection, lease)
            connection.execute(journal.delete().where(_step(run_id, name)))

    def known_upload(self, scope: str, sha256: str) -> str | None:
        """Return the provider's file id of uploaded content; the file may have been deleted."""
        with self._reading() as connection:
            found: str | None = connection.execute(
                sa.select(uploads.c.remote_id).where(_content(scope, sha256))
            ).scalar()
            return found

    def uploaded(self, scope: str, sha256: str, remote_id: str) -> None:
        """Record the provider's file id of uploaded content, replacing an older one."""
        with self._writing() as connection:
            connection.execute(uploads.delete().where(_content(scope, sha256)))
            connection.execute(
                uploads.insert().values(
                    scope=scope, sha256=sha256, remote_id=remote_id, uploaded_at=as_text(utc_now())
                )
            )


def put_back(connection: sa.Connection, run_id: str, steps: Iterable[SavedStep]) -> None:
    """Write a recovered journal, marked as possibly incomplete."""
    mark = SavedStep(_ANY_STEP, as_text(utc_now()), None)
    by_name = {step.name: step for step in (*steps, mark)}
    rows = [
        {"run_id": run_id, "name": step.name, "begun_at": step.begun_at, "result": step.result}
        for step in by_name.values()
    ]
    connection.execute(journal.insert(), rows)


def _begun(run_id: str, name: str) -> dict[str, str]:
    return {"run_id": run_id, "name": name, "begun_at": as_text(utc_now())}


def _step(run_id: str, name: str) -> sa.ColumnElement[bool]:
    return (journal.c.run_id == run_id) & (journal.c.name == name)


def _content(scope: str, sha256: str) -> sa.ColumnElement[bool]:
    return (uploads.c.scope == scope) & (uploads.c.sha256 == sha256)
