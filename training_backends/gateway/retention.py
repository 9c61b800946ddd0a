"""Delete the runs of old failed and cancelled jobs; the jobs keep what they show of them."""

import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Final

import anyio
import sqlalchemy as sa

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.leases import Leases
from training_backends.core.errors import RunNotFound
from training_backends.core.logging import get_logger
from training_backends.gateway.jobstore import CHECKPOINT_MARK, JOB_DIGITS, keep_history
from training_backends.gateway.keys import Principal
from training_backends.gateway.models import ModelService
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import jobs
from training_backends.store.schema import runs

__all__ = ["Retention"]

log = get_logger()

_SWEEP_EVERY: Final = 3600.0
_DAY: Final = 86400.0
_ACTOR: Final = "gateway"
"""Who deletes, in the audit log."""


class Retention:
    """Deletes runs by age.

    A run is kept while a job that is not deleted itself was started from one of its checkpoints:
    the adapter of such a job needs it.
    """

    def __init__(
        self, store: GatewayStore, client: AsyncTrainingClient, models: ModelService
    ) -> None:
        self._store = store
        self._client = client
        self._models = models

    async def run(self, days: float, leases: Leases | None = None) -> None:
        """Delete what ended more than `days` ago every hour; runs until cancelled.

        Args:
            leases: Those of a gateway that shares its store: they take turns, since each can
                delete only what belongs to its own home or to none.
        """
        while True:
            try:
                async with nullcontext() if leases is None else leases.hold("retention"):
                    await self.sweep(time.time() - days * _DAY)
            except Exception:  # must not stop the gateway
                log.exception("old runs not deleted")
            await anyio.sleep(_SWEEP_EVERY)

    async def sweep(self, before: float) -> None:
        """Delete the runs of jobs that failed or were cancelled before a time; safe to repeat.

        Args:
            before: In seconds since the epoch.
        """
        for job in await self._store.aread(lambda c: _due(c, before)):
            try:
                if await self._can_delete(job):
                    await self._store.awrite(partial(_expire, job))
                    await self._models.remove(job)
            except Exception:  # the others are deleted
                log.exception("old run not deleted", job_id=job.id)

    async def _can_delete(self, job: Any) -> bool:
        try:
            run = await self._client.get(job.id)
        except RunNotFound:
            return False
        is_here = run.place is None or self._client.backend(run.backend).sees(run)
        return is_here and run.status.is_terminal


def _due(connection: sa.Connection, before: float) -> list[Any]:
    ended = jobs.c.cleaned_up, jobs.c.status.in_(("FAILED", "CANCELLED"))
    # The run is deleted last: what a crash has left is found again.
    has_run = sa.exists().where(runs.c.id == jobs.c.id)
    found = connection.execute(sa.select(jobs).where(*ended, jobs.c.modified_at < before, has_run))
    if not (rows := found.all()):
        return []
    mine = jobs.c.model.contains(CHECKPOINT_MARK), jobs.c.history.is_(None)
    bases = connection.execute(sa.select(jobs.c.model).where(*mine)).scalars()
    used = {name.partition(CHECKPOINT_MARK)[0].rpartition(":")[2] for name in bases}
    return [row for row in rows if row.id[:JOB_DIGITS] not in used]


def _expire(job: Any, connection: sa.Connection) -> None:
    if job.history is None:
        keep_history(connection, job.id)
        Principal(_ACTOR, job.project).record(connection, "job.expire", job.id)
