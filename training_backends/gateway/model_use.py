"""Records when models were last used, so that retention keeps them."""

import time
from collections.abc import Collection
from typing import Any, Final

import sqlalchemy as sa

from training_backends.core.errors import StoreError
from training_backends.core.logging import get_logger
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import jobs

__all__ = ["PRECISION", "ModelUse", "is_used", "used_steps"]

log = get_logger()

_ALL: Final = "*"
"""Instead of a step, in jobs of a time when uses were not recorded."""
PRECISION: Final = 3600.0
"""Seconds; further uses within this time are not recorded."""


class ModelUse:
    """Records chats, downloads and jobs that start from a model, in one process."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._known: dict[tuple[str, int | None], float] = {}

    async def mark(self, job_id: str, step: int | None = None) -> None:
        """Record that the model of a job, or its checkpoint at a step, is used now.

        A failure is logged and does not fail the request.
        """
        now = time.time()
        if now - self._known.get((job_id, step), 0) < PRECISION:
            return

        def work(connection: sa.Connection) -> None:
            mine = jobs.c.id == job_id
            values: dict[str, Any] = {"used_at": now}
            if step is not None:
                before = connection.execute(sa.select(jobs.c.used_steps).where(mine)).scalar()
                values["used_steps"] = {**(before or {}), str(step): now}
            connection.execute(jobs.update().where(mine).values(values))

        try:
            await self._store.awrite(work)
        except StoreError as error:
            log.warning("use of a model not recorded", job_id=job_id, reason=error.message)
        else:
            self._known[job_id, step] = now


def is_used(job: Any, before: float) -> bool:
    """Return whether the model of a job, or a checkpoint, was used since a time."""
    return job.used_at is not None and job.used_at >= before - PRECISION


def used_steps(job: Any, before: float, steps: Collection[int]) -> set[int]:
    """Return those of the given steps of a job whose checkpoints were used since a time."""
    known = {step: at for step, at in (job.used_steps or {}).items() if at >= before - PRECISION}
    return {step for step in steps if str(step) in known or _ALL in known}
