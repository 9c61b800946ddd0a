"""Deliver an event of each finished job to a webhook, as OpenAI's service does."""

import json
import time
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit
from uuid import NAMESPACE_OID, uuid5

import anyio
import sqlalchemy as sa

from training_backends.client.leases import Leases
from training_backends.core.backoff import Backoff
from training_backends.core.errors import TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.gateway.openai_ids import JOB, wire_id
from training_backends.gateway.store import GatewayStore
from training_backends.http.client import HttpClient
from training_backends.http.policy import HttpPolicy
from training_backends.http.urls import normalize_base_url
from training_backends.http.webhook import signed_headers
from training_backends.protocols.mistral.status import to_status
from training_backends.protocols.openai.status import to_wire
from training_backends.protocols.openai.webhooks import JOB_EVENTS, job_event
from training_backends.store.gateway_schema import webhooks

__all__ = ["Webhooks"]

log = get_logger()

FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 6 * 3600.0
"""Seconds between two attempts: twice as many each time."""
GIVEN_UP_AFTER: Final = 72 * 3600.0
"""Seconds, as at OpenAI."""
_OTHERS_TURN: Final = 5.0
"""Seconds after which a gateway looks whether the one that delivers events has ended."""
_AT_A_TIME: Final = 8
_ANY_STATUS: Final = range(200, 600)
_GONE: Final = 410
_POLICY: Final = HttpPolicy(read_timeout=15.0, write_timeout=15.0, call_timeout=30.0, attempts=1)


class Webhooks:
    """The events that a webhook has not received yet, in the database.

    An event is delivered at least once. Repeated deliveries have the same id.

    Args:
        url: Where events are sent.
        key: Signs them.
    """

    def __init__(self, store: GatewayStore, url: str, key: bytes) -> None:
        self._store = store
        parts = urlsplit(url)
        self._path = parts.path
        self._query = parse_qsl(parts.query, keep_blank_values=True)
        self._key = key
        base = normalize_base_url(f"{parts.scheme}://{parts.netloc}")
        self._http = HttpClient(base, policy=_POLICY)
        self._added = anyio.Event()

    async def add(self, job: Any) -> None:
        """Add the event of a finished job; no effect if it is waiting already."""
        status = to_wire(to_status(job.status))
        if status not in JOB_EVENTS:
            return
        now = time.time()
        row = {
            "id": str(uuid5(NAMESPACE_OID, f"end of {job.id}")),
            "job_id": job.id,
            "type": status,
            "created_at": job.modified_at,
            "attempts": 0,
            "due_at": now,
        }

        def work(connection: sa.Connection) -> None:
            same = sa.select(webhooks.c.id).where(webhooks.c.id == row["id"])
            if connection.execute(same).first() is None:
                connection.execute(webhooks.insert().values(row))

        await self._store.awrite(work)
        self._added.set()

    async def run(self, leases: Leases | None = None) -> None:
        """Deliver events when they are due, until cancelled.

        Args:
            leases: Those of a gateway that shares its store: one of them delivers at a time.
        """
        backoff = Backoff(1.0, 60.0)
        try:
            while True:
                try:
                    if leases is None:
                        pause = await self._deliver_due()
                    else:
                        async with leases.try_hold("webhooks") as lease:
                            pause = await self._deliver_due() if lease else _OTHERS_TURN
                        pause = min(pause, _OTHERS_TURN)
                    backoff.reset()
                except Exception as error:  # must not stop the gateway
                    pause = backoff.next()
                    log.error("webhook events not read", reason=str(error))  # noqa: TRY400
                with anyio.move_on_after(pause):
                    await self._added.wait()
                self._added = anyio.Event()
        finally:
            with anyio.CancelScope(shield=True):
                await self._http.aclose()

    async def _deliver_due(self) -> float:
        """Deliver what is due and return the seconds until more is."""
        query = sa.select(webhooks).order_by(webhooks.c.due_at).limit(_AT_A_TIME)
        while True:
            rows = await self._store.aread(lambda c: c.execute(query).all())
            now = time.time()
            due = [row for row in rows if row.due_at <= now]
            if not due:
                return min(max(rows[0].due_at - now, 0.0), LONGEST_PAUSE) if rows else LONGEST_PAUSE
            async with anyio.create_task_group() as tasks:
                for row in due:
                    tasks.start_soon(self._deliver, row)

    async def _deliver(self, row: Any) -> None:
        event_id = f"evt_{row.id.replace('-', '')}"
        event = job_event(event_id, row.type, int(row.created_at), wire_id(JOB, row.job_id))
        body = json.dumps(event, separators=(",", ":")).encode()
        now = time.time()
        try:
            answer = await self._http.send(
                "POST",
                self._path,
                query=self._query,
                headers=signed_headers(self._key, event_id, int(now), body),
                content=body,
                expect=_ANY_STATUS,
            )
        except TrainingBackendError as error:
            status, reason = 0, error.message
        else:
            status, reason = answer.status, f"status {answer.status}"
        pause = min(FIRST_PAUSE * 2.0 ** min(row.attempts, 30), LONGEST_PAUSE)
        mine = webhooks.c.id == row.id
        change: sa.Executable = webhooks.delete().where(mine)
        if 200 <= status < 300:
            log.info("webhook event delivered", job_id=row.job_id)
        elif status == _GONE or now + pause > row.created_at + GIVEN_UP_AFTER:
            log.error("webhook event given up", job_id=row.job_id, reason=reason)
        else:
            log.warning("webhook event delayed", job_id=row.job_id, reason=reason, pause=pause)
            values = {"attempts": row.attempts + 1, "due_at": now + pause}
            change = webhooks.update().where(mine).values(values)
        await self._store.awrite(partial(_execute, change))


def _execute(change: sa.Executable, connection: sa.Connection) -> None:
    connection.execute(change)
