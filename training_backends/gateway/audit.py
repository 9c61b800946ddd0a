"""Read the audit log, and delete its entries by age; `Principal.record` adds to it."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import anyio
import sqlalchemy as sa

from training_backends.core.logging import get_logger
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import audit

__all__ = ["AuditLog"]

log = get_logger()

_PAGE: Final = 1000
"""Entries read at a time."""
_SWEEP_EVERY: Final = 3600.0
_DAY: Final = 86400.0


class AuditLog:
    """The audit log of one gateway. Blocking, except for `sweep`."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store

    def entries(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        project: str | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the entries from `since` on, before `until`, in the order of their commit.

        Args:
            project: Only entries of the keys of this project.
        """
        conditions = []
        if since is not None:
            conditions.append(audit.c.at >= since.timestamp())
        if until is not None:
            conditions.append(audit.c.at < until.timestamp())
        if project is not None:
            conditions.append(audit.c.project == project)
        query = sa.select(audit).where(*conditions).order_by(audit.c.id).limit(_PAGE)
        last = -1
        while rows := self._page(query.where(audit.c.id > last)):
            yield from map(_document, rows)
            last = rows[-1].id

    def _page(self, query: sa.Select[Any]) -> list[Any]:
        return self._store.read(lambda connection: list(connection.execute(query)))

    async def sweep(self, days: float) -> None:
        """Delete entries older than `days` every hour; runs until cancelled."""
        while True:
            try:
                await self._store.awrite(partial(_delete_old, days=days))
            except Exception:  # must not stop the gateway
                log.exception("old audit entries not deleted")
            await anyio.sleep(_SWEEP_EVERY)


def _delete_old(connection: sa.Connection, days: float) -> None:
    connection.execute(audit.delete().where(audit.c.at < time.time() - days * _DAY))


def _document(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "at": datetime.fromtimestamp(row.at, UTC).isoformat(),
        **{name: getattr(row, name) for name in _FIELDS},
    }


_FIELDS: Final = ("actor", "project", "action", "target", "outcome", "address", "request_id")
