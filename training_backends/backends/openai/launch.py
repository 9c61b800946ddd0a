"""Launch a run once: upload each file once, and create one job.

The protocol has no idempotency keys, and a job starts when it is created. So the create request is
a journal step that is sent again only after its job was looked for until it would have appeared.
A job is recognized by a random value in its metadata. Where a server keeps no metadata, jobs are
compared field by field, with a random seed if the configuration has none, and jobs that existed
before or belong to other runs are left out.
"""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from training_backends.backends.openai.api import Entry, OpenAIAPI, read_job
from training_backends.backends.openai.job_request import RUN_KEY, TOKEN_KEY, make_job, shows
from training_backends.backends.openai.job_state import state_of
from training_backends.backends.openai.settings import CLOCK_SLACK, OpenAISettings
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.config import DataSource
from training_backends.core.errors import (
    AmbiguousLaunch,
    DatasetError,
    Issue,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.logging import get_logger
from training_backends.core.persist import persist, poll, settle
from training_backends.core.run import RunState, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.http.upload import FileUpload, HashedFile, hash_file
from training_backends.protocols.openai.status import FILE_FAILED
from training_backends.protocols.openai.wire import FileObject

__all__ = ["OpenAILaunch"]

log = get_logger()

_SEEDS: Final = 2**31
_PROCESSING: Final = frozenset({"pending", "running"})
"""Statuses of a file at Azure that no job may use yet."""

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class OpenAILaunch:
    """One launch."""

    api: OpenAIAPI
    settings: OpenAISettings
    run: TrainingRun
    journal: Journal
    _lost: bool = field(default=False, init=False)
    """Whether the response to a create request may have been lost."""
    _sent_at: float | None = field(default=None, init=False)
    """When the create request failed, in the time of `time.monotonic`."""
    _body: dict[str, Any] = field(default_factory=dict, init=False)
    """The create request."""
    _before: Sequence[str] = field(default=(), init=False)
    """Jobs that matched it before it was sent."""

    async def launch(self) -> RunState:
        """Launch the run, continuing after the last completed step."""
        job_id = self.run.remote_id
        if job_id is None:
            # Fails if the server does not offer fine-tuning, before any upload.
            await self._persist(self.api.probe)
            job_id = await self._create()
            created = RunState(status=TrainingStatus.PENDING, remote_id=job_id)
            await self.journal.record(created)
            if self._lost:
                await self._cancel_twins(job_id)
        try:
            return state_of(await self._persist(lambda: self.api.get_job(str(job_id))))
        except RunNotFound:
            raise
        except TrainingBackendError:
            # The job exists, so this must not fail the launch.
            return RunState(status=TrainingStatus.PENDING, remote_id=job_id)

    def _pauses(self) -> Backoff:
        return Backoff(self.settings.poll_min, self.settings.longest_poll, factor=1.4)

    async def _persist(self, act: Callable[[], Awaitable[_T]]) -> _T:
        return await persist(act, within=self.settings.call_timeout, pauses=self._pauses())

    # -- files -------------------------------------------------------------------------

    async def _file_id(self, source: DataSource) -> str:
        """Return the id of a file that jobs can use, uploading it if necessary."""
        path = source.path
        if path is None:
            return str(source.remote_id)  # the server checks it when the job is created
        hashed = await hash_file(path)
        # The name contains the hash, so a file found by name has the right content.
        filename = f"{path.stem[:80]}-{hashed.sha256[:16]}.jsonl"

        async def find() -> str | None:
            found = await self.api.find_file(filename, hashed.size)
            return None if found is None or found.status in FILE_FAILED else found.id

        async def upload() -> str:
            return (await self._upload(path, filename, hashed)).id

        async def has(file_id: str) -> bool:
            return await self._has(file_id, hashed)

        scope = self.settings.scope
        file_id = await self._persist(
            lambda: self.journal.upload(scope, hashed.sha256, upload, find, has)
        )
        if self.settings.variant == "azure":
            await self._processed(file_id, path)
        return file_id

    async def _upload(self, path: Path, filename: str, hashed: HashedFile) -> FileObject:
        upload = FileUpload(
            path,
            fields={"purpose": "fine-tune"},
            filename=filename,
            hashed=hashed,
            on_progress=lambda done, total: self.journal.progress(
                f"upload {path.name}", done, total
            ),
        )
        return await self.api.upload_file(upload)

    async def _has(self, file_id: str, hashed: HashedFile) -> bool:
        try:
            found = await self.api.get_file(file_id)
        except RunNotFound:
            return False
        return found.status not in FILE_FAILED and found.bytes in {None, hashed.size}

    async def _processed(self, file_id: str, path: Path) -> None:
        """Wait until a job may use the file.

        Raises:
            DatasetError: The provider rejected it.
            WaitTimeout: The provider did not process it in time; repeat to continue.
        """
        file = await poll(
            lambda: self.api.get_file(file_id),
            lambda found: found.status not in _PROCESSING,
            within=self.settings.upload_timeout,
            what=f"processing {path.name}",
            pauses=self._pauses(),
        )
        if file.status in FILE_FAILED:
            why = file.status_details or f"its status is {file.status}"
            issue = Issue(code="rejected_by_provider", message=why, path=str(path))
            raise DatasetError(f"The provider rejected {path.name}: {why}.", issues=[issue])

    # -- job ---------------------------------------------------------------------------

    async def _create(self) -> str:
        data = self.run.config.data
        files: list[str | None] = [await self._file_id(data.train[0]), None]
        if data.validation:
            files[1] = await self._file_id(data.validation[0])

        async def list_jobs() -> JSONValue:
            return [files, await self._like(self._body)]

        token = await self.journal.token("launch")
        if self.settings.sends_metadata:
            metadata = {RUN_KEY: self.run.id, TOKEN_KEY: token}
            self._body = self._request(files, metadata=metadata)
        else:
            seed = int(token, 16) % _SEEDS
            self._body = self._request(files, seed=seed)
            # A first attempt may have created a job with files that were lost since.
            step = partial(self.journal.step, "before create", list_jobs, repeatable=True)
            listed: Any = await self._persist(step)
            files, self._before = listed
            self._body = self._request(files, seed=seed)

        async def do() -> JSONValue:
            try:
                return (await self.api.create_job(self._body)).id
            finally:
                self._sent_at = time.monotonic()

        async def find() -> JSONValue:
            self._lost = True
            return await self._settle()

        return str(await self._persist(lambda: self.journal.step("create", do, find)))

    def _request(
        self,
        files: list[str | None],
        *,
        metadata: Mapping[str, str] | None = None,
        seed: int | None = None,
    ) -> dict[str, Any]:
        return make_job(
            self.run.config,
            self.settings,
            train=str(files[0]),
            validation=files[1],
            metadata=metadata,
            seed=seed,
        )

    async def _settle(self) -> str | None:
        """Look for the job of a create request without a response, until it must exist.

        Raises:
            AmbiguousLaunch: Several match, and nothing distinguishes them.
        """

        async def look() -> str | None:
            found = await self._persist(self._ours)
            if len(found) > 1 and not self.settings.sends_metadata:
                raise _ambiguous(found)
            return found[-1] if found else None  # the oldest

        # By another process: at an unknown time before now.
        since = 0.0 if self._sent_at is None else time.monotonic() - self._sent_at
        return await settle(look, within=self.settings.settling - since, pauses=self._pauses())

    async def _ours(self) -> list[str]:
        """Return the jobs that this launch created, or may have created; newest first."""
        metadata = self._body.get("metadata")
        if metadata is None:
            new = [job_id for job_id in await self._like(self._body) if job_id not in self._before]
            claimed = await self.journal.claimed(new)
            return [job_id for job_id in new if job_id not in claimed]
        found: list[str] = []
        async with aclosing(self.api.jobs({TOKEN_KEY: metadata[TOKEN_KEY]})) as entries:
            async for entry in entries:
                if self._is_older(entry):
                    break
                shown = entry.get("metadata")
                if isinstance(shown, dict) and shown.get(TOKEN_KEY) == metadata[TOKEN_KEY]:
                    found.append(str(entry.get("id")))
        return found

    async def _like(self, body: Entry) -> list[str]:
        """Return the jobs that show the fields of a request, newest first."""
        async with aclosing(self.api.jobs()) as entries:
            found = []
            async for entry in entries:
                if self._is_older(entry):
                    break
                job = read_job(entry)
                # One that was cancelled to resolve an ambiguity is no candidate.
                if job is not None and job.status != "cancelled" and shows(job, body):
                    found.append(job.id)
            return found

    def _is_older(self, entry: Entry) -> bool:
        """Return whether a job, and so the rest of the list, is older than the run."""
        created = entry.get("created_at")
        earliest = (self.run.created_at - CLOCK_SLACK).timestamp()
        return isinstance(created, int | float) and created < earliest

    async def _cancel_twins(self, job_id: str) -> None:
        """Cancel further jobs of this launch, which a proxy may have created late.

        Raises:
            AmbiguousLaunch: Whether they are of this launch is unknown.
        """
        twins = [other for other in await self._persist(self._ours) if other != job_id]
        if twins and not self.settings.sends_metadata:
            raise _ambiguous([job_id, *twins])
        for other in twins:
            try:
                await self._persist(partial(self.api.act, other, "cancel"))
            except TrainingBackendError as error:
                log.warning("second job of a launch", job=other, error=error.message)


def _ambiguous(jobs: Sequence[str]) -> AmbiguousLaunch:
    return AmbiguousLaunch(
        "The response to creating the job was lost, and any of these jobs may be the created one: "
        f"{', '.join(sorted(jobs))}.",
        hint="Cancel the unneeded jobs at the provider, then repeat the launch.",
    )
