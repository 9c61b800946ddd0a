"""What follows when a job finishes: its files and stored keys are removed, its end reported."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

import sqlalchemy as sa
from pydantic import SecretStr

from training_backends.core.errors import TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.credentials.vault import CredentialInfo
from training_backends.gateway.files import FileService
from training_backends.gateway.job_request import job_of_profile, secret_profile
from training_backends.gateway.store import GatewayStore
from training_backends.gateway.webhooks import Webhooks
from training_backends.store.gateway_schema import jobs

__all__ = ["JobEnding", "SecretKeeper"]

log = get_logger()


class SecretKeeper(Protocol):
    """Stores the API key of a job's integration until the job finishes."""

    async def list(self) -> Sequence[CredentialInfo]:
        """Return the names of stored secrets."""
        ...

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Store a secret."""
        ...

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Delete a secret."""
        ...


class JobEnding:
    """Cleans up after a finished job; safe to repeat.

    Args:
        webhooks: Reports the end of each job.
    """

    def __init__(
        self, files: FileService, secrets: SecretKeeper, webhooks: Webhooks | None = None
    ) -> None:
        self._files = files
        self._secrets = secrets
        self._webhooks = webhooks

    async def __call__(self, job: Any) -> None:
        """Delete the files that only this job needed, and its stored keys; report its end."""
        if self._webhooks is not None:
            await self._webhooks.add(job)
        await self._files.used(job)
        await self._files.collect(job.blobs)
        for integration in job.integrations:
            await self.forget(integration["type"], job.id)

    async def forget_orphans(self, store: GatewayStore, *, before: datetime) -> None:
        """Delete the keys of jobs that were never stored, because the gateway ended in between.

        Args:
            before: When this gateway started; younger keys may be those of jobs being created.
        """
        try:
            stored = [each for each in await self._secrets.list() if each.source == "keyring"]
        except TrainingBackendError as error:
            log.warning("stored keys not checked", reason=error.message)
            return
        found = {
            job_id: each.provider
            for each in stored
            if (job_id := job_of_profile(each.profile)) is not None
            and each.stored_at is not None
            and each.stored_at < before
        }
        if not found:
            return
        query = sa.select(jobs.c.id).where(jobs.c.id.in_(found))
        known = await store.aread(lambda c: c.execute(query).scalars().all())
        for job_id in found.keys() - {*known}:
            await self.forget(found[job_id], job_id)

    async def forget(self, provider: str, job_id: str) -> None:
        """Delete a job's key; a failure is logged and does not fail the job."""
        try:
            await self._secrets.delete(provider, secret_profile(job_id))
        except TrainingBackendError as error:
            log.warning("key of a finished job not deleted", job_id=job_id, reason=error.message)
