"""What is let go of when a job is over."""

from typing import Protocol

from pydantic import SecretStr

from training_backends.core.errors import TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.gateway.files import FileService
from training_backends.gateway.job_request import secret_profile
from training_backends.gateway.jobstore import load_job
from training_backends.gateway.store import GatewayStore

__all__ = ["JobEnding", "SecretKeeper"]

log = get_logger()


class SecretKeeper(Protocol):
    """Keeps the key of a job's integration until the job is over."""

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Keep a secret."""
        ...

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Forget it."""
        ...


class JobEnding:
    """Cleans up behind a job; safe to repeat."""

    def __init__(self, store: GatewayStore, files: FileService, secrets: SecretKeeper) -> None:
        self._store = store
        self._files = files
        self._secrets = secrets

    async def __call__(self, job_id: str) -> None:
        """Remove the files that only this job still needed, and its own keys."""
        job = await self._store.aread(lambda connection: load_job(connection, job_id))
        await self._files.collect(job.blobs)
        for integration in job.integrations:
            await self.forget(integration["type"], job_id)

    async def forget(self, provider: str, job_id: str) -> None:
        """Delete a job's key; what cannot be deleted is logged, never the job's failure."""
        try:
            await self._secrets.delete(provider, secret_profile(job_id))
        except TrainingBackendError as error:
            log.warning("key of an ended job not deleted", job_id=job_id, reason=error.message)
