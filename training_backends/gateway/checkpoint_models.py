"""Checkpoints of jobs as models: named after the fine-tuned model, written when first asked for."""

import shutil
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.files import make_private_directory
from training_backends.gateway.job_events import JobCheckpoint, kept_checkpoints
from training_backends.gateway.jobstore import (
    CHECKPOINT_MARK,
    JOB_DIGITS,
    OWNER,
    begins_with,
    model_name,
)
from training_backends.gateway.keys import Principal
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import jobs
from training_backends.store.runs import among

__all__ = ["CheckpointModel", "CheckpointModels", "job_of_key", "jobs_in"]

_STEP: Final = "-step-"
_LONGEST_STEP: Final = 19


@dataclass(frozen=True, slots=True)
class CheckpointModel:
    """A checkpoint of a job.

    Attributes:
        job: Row of the job.
    """

    job: Any
    point: JobCheckpoint

    @property
    def key(self) -> str:
        """Name for its directory."""
        return _key(self.job.id, self.point.step)


class CheckpointModels:
    """The checkpoints of the jobs of one gateway.

    Args:
        directory: Where models are written.
    """

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        *,
        organization_id: str,
        directory: Path,
    ) -> None:
        self._store = store
        self._client = client
        self._organization_id = organization_id
        self._directory = directory
        self._writing: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    async def find(self, name: str, caller: Principal) -> CheckpointModel | None:
        """Return the checkpoint of this name that can be used, or None."""
        model, _, number = name.rpartition(CHECKPOINT_MARK)
        if not (model and number.isascii() and number.isdigit() and len(number) < _LONGEST_STEP):
            return None
        step, mine = int(number), self._organization_id
        job = await self._store.aread(lambda c: _job(c, model, mine, caller))
        if job is None or not self.keeps(job):
            return None
        points = await self._store.aread(lambda c: kept_checkpoints(c, job))
        return next((CheckpointModel(job, point) for point in points if point.step == step), None)

    def keeps(self, job: Any) -> bool:
        """Return whether the backend of a job can write its checkpoints as models."""
        return self._client.backend(job.backend).capabilities.downloads_checkpoints

    async def path(self, checkpoint: CheckpointModel) -> Path:
        """Return the directory with a checkpoint's model, written once.

        Raises:
            ConfigError: The checkpoint is gone or damaged.
        """
        target = self._directory / checkpoint.key
        async with self._writing[checkpoint.key]:
            if await anyio.Path(target).is_dir():
                return target
            await to_thread.run_sync(make_private_directory, self._directory)
            partial = self._directory / f".{uuid4()}"
            try:
                step = f"step-{checkpoint.point.step}"
                await self._client.download(checkpoint.job.id, partial, checkpoint=step)
                await anyio.Path(partial).rename(target)
            finally:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(_remove, partial)
        return target

    def written(self, job_id: str, step: int) -> Path:
        """Return the directory of the model of a checkpoint, which may not exist."""
        return self._directory / _key(job_id, step)

    async def remove(self, job_id: str, step: int) -> None:
        """Remove the model of a checkpoint that is deleted."""
        await to_thread.run_sync(_remove, self.written(job_id, step))

    async def forget(self, job_id: str) -> None:
        """Remove the checkpoints of a model that is deleted."""
        for path in await self.paths(job_id):
            await to_thread.run_sync(_remove, path)

    async def paths(self, job_id: str) -> list[Path]:
        """Return the directories that were written for a job."""
        return await to_thread.run_sync(lambda: [*self._directory.glob(f"{job_id}{_STEP}*")])

    async def sweep(self) -> None:
        """Remove incomplete checkpoints, and those of deleted models."""
        found = await to_thread.run_sync(jobs_in, self._directory)
        query = sa.select(jobs.c.id).where(jobs.c.history.is_(None))
        kept = await self._store.aread(
            lambda connection: {row.id for row in among(connection, query, jobs.c.id, found)}
        )
        await to_thread.run_sync(_sweep, self._directory, kept)


def _key(job_id: str, step: int) -> str:
    return f"{job_id}{_STEP}{step}"


def job_of_key(key: str) -> str:
    """Return the id of the job in the name of a checkpoint's directory."""
    return key.partition(_STEP)[0]


def jobs_in(directory: Path) -> set[str]:
    """Return the ids of the jobs with files in a directory of models or checkpoints."""
    return {job_of_key(path.name) for path in directory.glob("*")}


def _sweep(directory: Path, kept: Collection[str]) -> None:
    for path in directory.glob("*") if directory.is_dir() else ():
        if job_of_key(path.name) not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _job(connection: sa.Connection, name: str, organization_id: str, caller: Principal) -> Any:
    """Return the job whose model has this name, unless the model was deleted."""
    tag = name.rpartition(":")[2]
    if len(tag) != JOB_DIGITS:
        return None
    mine = begins_with(tag), caller.sees(OWNER)
    for row in connection.execute(sa.select(jobs).where(*mine, jobs.c.history.is_(None))):
        # Until a job has finished, its checkpoints have the date of its creation.
        names = (model_name(row, organization_id, at) for at in (row.created_at, row.modified_at))
        if name in {row.fine_tuned_model, *names}:
            return row
    return None
