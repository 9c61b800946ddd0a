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
from typing import Any, Final, TypeVar

from training_backends.backends.openai.api import Entry, OpenAIAPI, read_job
from training_backends.backends.openai.job_request import RUN_KEY, TOKEN_KEY, make_job, shows
from training_backends.backends.openai.job_state import state_of
from training_backends.backends.openai.settings import CLOCK_SLACK, OpenAISettings
from training_backends.backends.openai.uploads import OpenAIUploads
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.errors import (
    AmbiguousLaunch,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.core.logging import get_logger
from training_backends.core.persist import persist, settle
from training_backends.core.run import RunState, TrainingRun
from training_backends.core.status import TrainingStatus

__all__ = ["OpenAILaunch"]

log = get_logger()

_SEEDS: Final = 2**31

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
    _marked: bool = field(default=True, init=False)
    """Whether all jobs that matched show their seed."""

    async def launch(self) -> RunState:
        """Launch the run, continuing after the last completed step."""
        job_id = self.run.remote_id
        if job_id is None:
            # Fails if the server does not offer fine-tuning, before any upload.
            await self._persist(self.api.probe)
            job_id = await self._create()
            created = RunState(status=TrainingStatus.PENDING, remote_id=job_id)
            await self.journal.record(created)
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

    # -- job ---------------------------------------------------------------------------

    async def _create(self) -> str:
        data = self.run.config.data
        uploads = OpenAIUploads(api=self.api, settings=self.settings, journal=self.journal)
        files: list[str | None] = [await uploads.file_id(data.train[0]), None]
        if data.validation:
            files[1] = await uploads.file_id(data.validation[0])

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
                job = await self.api.create_job(self._body)
            finally:
                self._sent_at = time.monotonic()
            return {"job": job.id, "resent": self._lost}

        async def find() -> JSONValue:
            self._lost = True
            found = await self._settle()
            return None if found is None else {"job": found, "resent": False}

        created: Any = await self._persist(lambda: self.journal.step("create", do, find))
        if self._lost or created["resent"] or self._is_distinct:
            await self._cancel_twins(created["job"], resent=created["resent"])
        return str(created["job"])

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
            if len(found) > 1 and not self._is_distinct:
                raise _ambiguous(found)
            return found[-1] if found else None  # the oldest

        # By another process: at an unknown time before now.
        since = 0.0 if self._sent_at is None else time.monotonic() - self._sent_at
        return await settle(look, within=self.settings.settling - since, pauses=self._pauses())

    @property
    def _is_distinct(self) -> bool:
        """Whether all jobs that match the request were created by this launch."""
        random_seed = self.run.config.hyperparameters.seed is None
        return self.settings.sends_metadata or (random_seed and self._marked)

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
                    self._marked = self._marked and job.seed is not None
                    found.append(job.id)
            return found

    def _is_older(self, entry: Entry) -> bool:
        """Return whether a job, and so the rest of the list, is older than the run."""
        created = entry.get("created_at")
        earliest = (self.run.created_at - CLOCK_SLACK).timestamp()
        return isinstance(created, int | float) and created < earliest

    async def _cancel_twins(self, job_id: str, *, resent: bool) -> None:
        """Cancel further jobs of this launch, which a proxy may have created late or twice.

        Args:
            resent: An earlier create request may still take effect.

        Raises:
            AmbiguousLaunch: Whether they are of this launch is unknown.
        """
        cancelled = {job_id}

        async def look() -> None:
            twins = [other for other in await self._persist(self._ours) if other not in cancelled]
            if twins and not self._is_distinct:
                raise _ambiguous([job_id, *twins])
            for other in twins:
                cancelled.add(other)
                try:
                    await self._persist(partial(self.api.act, other, "cancel"))
                    log.warning("cancelled a second job of the run", job=other)
                except TrainingBackendError as error:
                    log.warning("second job of the run", job=other, error=error.message)

        await look()
        if resent:
            await settle(look, within=self.settings.settling, pauses=self._pauses())


def _ambiguous(jobs: Sequence[str]) -> AmbiguousLaunch:
    return AmbiguousLaunch(
        "The response to creating the job was lost, and any of these jobs may be the created one: "
        f"{', '.join(sorted(jobs))}.",
        hint="Cancel the unneeded jobs at the provider, then repeat the launch.",
    )
