"""Clean-up after a job finishes: its files and its stored keys."""

from typing import Any, Protocol

from pydantic import SecretStr

from training_backends.core.errors import TrainingBackendError
from training_backends.core.logging import get_logger
from training_backends.gateway.files import FileService
from training_backends.gateway.job_request import secret_profile

__all__ = ["JobEnding", "SecretKeeper"]

log = get_logger()


class SecretKeeper(Protocol):
    """Stores the API key of a job's integration until the job finishes."""

    async def set(self, provider: str, secret: str | SecretStr, profile: str | None = None) -> None:
        """Store a secret."""
        ...

    async def delete(self, provider: str, profile: str | None = None) -> None:
        """Delete a secret."""
        ...


class JobEnding:
    """Cleans up after a finished job; safe to repeat."""

    def __init__(self, files: FileService, secrets: SecretKeeper) -> None:
        self._files = files
        self._secrets = secrets

    async def __call__(self, job: Any) -> None:
        """Delete the files that only this job needed, and its stored keys."""
        await self._files.collect(job.blobs)
        for integration in job.integrations:
            await self.forget(integration["type"], job.id)

    async def forget(self, provider: str, job_id: str) -> None:
        """Delete a job's key; a failure is logged and does not fail the job."""
        try:
            await self._secrets.delete(provider, secret_profile(job_id))
        except TrainingBackendError as error:
            log.warning("key of a finished job not deleted", job_id=job_id, reason=error.message)
