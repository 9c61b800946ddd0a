"""Create a job exactly once over a protocol without idempotency keys.

A create request whose response is lost may have created a job, or not, or may create one later,
when a proxy or a slow server processes it. So each attempt is a separate journal step and is sent
once. Before it, the journal records which matching jobs exist: they belong to others. After a
lost response, new matching jobs are looked for until a late one would have appeared: one is ours,
several are ambiguous, and with none another attempt is made. The lost response is recorded, and
before the start the jobs are searched again for a late duplicate.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import anyio
from pydantic import BaseModel

from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.backends.mistral.job_request import matches, same_job
from training_backends.backends.mistral.job_state import has_started, is_over
from training_backends.backends.mistral.retry import Steps
from training_backends.backends.mistral.settings import CLOCK_SLACK
from training_backends.core.backend import JSONValue
from training_backends.core.errors import (
    AmbiguousLaunch,
    DuplicateRun,
    TrainingBackendError,
    may_have_happened,
)
from training_backends.core.persist import asked_pause, may_pass
from training_backends.core.run import TrainingRun, utc_now
from training_backends.protocols.mistral.wire import Job, JobIn, TrainingFile

__all__ = ["Creation", "require_no_twin"]

_CREATES: Final = 3
"""Maximum create requests per launch."""
_CREATED: Final = "created"
"""Journal step that records how the job was identified."""
_CLEAN_UP: Final = (
    "No job was started. Cancel the unneeded jobs at the provider (unstarted jobs cost nothing), "
    "then repeat the launch: it uses the remaining one."
)

_Listed = tuple[str, Job | None]
"""A job id, and the job if it is well-formed."""


class _Files(BaseModel):
    """File ids of a create request, with the weights of the training files."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    validation: tuple[str, ...] = ()


class _Before(BaseModel):
    """State recorded before a create request is sent.

    Attributes:
        jobs: Existing jobs that match the request.
        at: When they were listed.
        files: Files of the request.
    """

    jobs: tuple[str, ...] = ()
    at: datetime | None = None
    files: _Files | None = None

    def request(self, wanted: JobIn) -> JobIn:
        """Return `wanted` with the recorded files."""
        if self.files is None:
            return wanted
        # A changed size limit may have split the files differently since.
        weights = self.files.weights or [file.weight for file in wanted.training_files]
        train = [
            TrainingFile(file_id=file_id, weight=weight)
            for file_id, weight in zip(self.files.train, weights, strict=True)
        ]
        validation = list(self.files.validation) or None
        return wanted.model_copy(update={"training_files": train, "validation_files": validation})


class _Created(BaseModel):
    """How the job was identified.

    Attributes:
        before: Matching jobs that existed before.
        lost: Files of each create request whose response was lost.
    """

    before: tuple[str, ...] = ()
    lost: tuple[_Files, ...] = ()

    def twins(self, job: Job) -> list[Job]:
        """Return the jobs that the lost requests would have created."""
        return [
            job.model_copy(
                update={"training_files": files.train, "validation_files": files.validation}
            )
            for files in self.lost
        ]


@dataclass(slots=True, kw_only=True)
class Creation:
    """Creates the job of one launch, or finds the one created by an earlier attempt."""

    api: MistralAPI
    steps: Steps
    run: TrainingRun
    _lost: list[JobIn] = field(default_factory=list)
    """Create requests that may have created a job, or still may."""
    _before: frozenset[str] = frozenset()
    _trouble: TrainingBackendError | None = None
    """Error of the current attempt."""

    async def create(self, wanted: JobIn) -> str:
        """Return the id of the job for `wanted`.

        Raises:
            AmbiguousLaunch: Several jobs may have been created by an earlier attempt.
            DuplicateRun: The server has a similar job of another origin.
        """
        number, left = 0, _CREATES
        while True:
            number += 1
            job_id = await self._try("" if number == 1 else f"#{number}", wanted)
            if job_id is not None:
                return job_id
            if self._trouble is None:
                continue  # nothing was sent now: replayed from an earlier launch
            left -= 1
            if not left or not may_pass(self._trouble):
                raise self._trouble
            await anyio.sleep(max(self.steps.polls().next(), asked_pause(self._trouble)))

    async def _try(self, tag: str, wanted: JobIn) -> str | None:
        """Send one create request, or replay its earlier result; None: no known job."""
        fresh = False
        self._trouble = None

        async def list_jobs() -> JSONValue:
            nonlocal fresh
            fresh = True
            seen = await self._like([*self._lost, wanted])
            return _Before(
                jobs=tuple(job_id for job_id, _ in seen),
                at=utc_now(),
                files=_files(wanted),
            ).model_dump(mode="json")

        before = _Before.model_validate(await self.steps.remember(f"before create{tag}", list_jobs))
        asked = before.request(wanted)
        if not self._lost:
            self._before = frozenset(before.jobs)

        async def find() -> JSONValue:
            found = await self._settle(asked, None if self._trouble else before.at)
            return {"found": found} if found else {"lost": True}

        async def do() -> JSONValue:
            if self._lost:
                late = await self._one_of(await self._like([*self._lost, asked]))
                if late is not None:
                    return {"found": late}
            elif not fresh:
                # Jobs created by others since the listing would pass as ours: list again.
                return {"refused": True}
            return await self._send(asked)

        answer = await self.steps.surely(f"create{tag}", do, find)
        if isinstance(answer, str):
            return await self._created(answer)
        if isinstance(answer, dict) and "refused" not in answer:
            self._lost.append(asked)
            if "found" in answer:
                return await self._created(str(answer["found"]))
        return None

    async def _send(self, asked: JobIn) -> JSONValue:
        try:
            return (await self.api.create_job(asked)).id
        except DuplicateRun as error:
            seen = await self._like([*self._lost, asked])
            # New and matching: sent twice by a proxy, or from an earlier attempt.
            found = await (self._settle(asked, None) if self._lost else self._one_of(seen))
            if found is not None:
                return {"found": found}
            self._trouble = _duplicate(error, seen)
        except TrainingBackendError as error:
            self._trouble = error
            if may_have_happened(error):
                raise
        return {"refused": True}

    async def _created(self, job_id: str) -> str:
        lost = tuple(_files(asked) for asked in self._lost)
        created = _Created(before=tuple(sorted(self._before)), lost=lost)

        async def remember() -> JSONValue:
            return created.model_dump(mode="json")

        await self.steps.remember(_CREATED, remember)
        return job_id

    async def _settle(self, asked: JobIn, sent_at: datetime | None) -> str | None:
        """Look for the job of a create request without a response, until it must exist.

        Args:
            sent_at: When the request was sent; None: just now.
        """
        waited = 0.0 if sent_at is None else max(0.0, (utc_now() - sent_at).total_seconds())
        polls = self.steps.polls()
        rested = 0.0
        while True:
            found = await self._one_of(await self._like([*self._lost, asked]))
            if found is not None:
                return found
            # List at least twice: lists may lag behind.
            if rested and waited + rested >= self.steps.settings.settling:
                return None
            pause = polls.next()
            await anyio.sleep(pause)
            rested += pause

    async def _like(self, wanted: Sequence[JobIn]) -> list[_Listed]:
        """Return the jobs that match any of `wanted`, and malformed ones."""

        async def list_jobs() -> list[_Listed]:
            async with aclosing(self.api.iter_listed(_around(self.run))) as jobs:
                return [
                    (job_id, job)
                    async for job_id, job in jobs
                    if job is None or any(matches(job, one) for one in wanted)
                ]

        return await self.steps.ask(list_jobs)

    async def _one_of(self, seen: Sequence[_Listed]) -> str | None:
        """Return the only job that can be ours, or None.

        Raises:
            AmbiguousLaunch: There are several candidates.
        """
        new = {job_id: job for job_id, job in seen if job_id not in self._before}
        if not new:
            return None
        claimed = await self.steps.journal.claimed(new.keys())
        ours = {job_id: job for job_id, job in new.items() if job_id not in claimed}
        # Finished ones were cancelled to resolve an ambiguity, if one is left.
        live = {job_id for job_id, job in ours.items() if job is None or not is_over(job)}
        choice = live or set(ours)
        if len(choice) > 1 or None in ours.values():
            raise AmbiguousLaunch(
                "The response to creating the job was lost, and any of these jobs may be the "
                f"created one: {', '.join(sorted(choice))}.",
                hint=_CLEAN_UP,
            )
        return next(iter(choice), None)


async def require_no_twin(api: MistralAPI, steps: Steps, run: TrainingRun, job: Job) -> None:
    """Check that a lost response did not create a second job.

    A duplicate may also have been created by someone else with the same account, so none is
    cancelled here.

    Raises:
        AmbiguousLaunch: There is another matching unstarted job, or another run uses this job.
    """

    async def nothing() -> JSONValue:
        return _Created().model_dump(mode="json")

    created = _Created.model_validate(await steps.remember(_CREATED, nothing))
    if not created.lost:
        return
    possible = created.twins(job)

    async def list_jobs() -> list[str]:
        async with aclosing(api.iter_listed(_around(run))) as jobs:
            return [
                job_id
                async for job_id, other in jobs
                if other is not None
                and job_id not in {job.id, *created.before}
                and any(same_job(other, twin) for twin in possible)
                and not is_over(other)
                and not has_started(other)
            ]

    twins = await steps.ask(list_jobs)
    claimed = await steps.journal.claimed([job.id, *twins])
    if job.id in claimed:
        raise AmbiguousLaunch(
            f"Another run also claims job {job.id}.",
            hint="No job was started. Launch again with another id.",
        )
    twins = [job_id for job_id in twins if job_id not in claimed]
    if twins:
        raise AmbiguousLaunch(
            f"A response was lost while creating job {job.id}, and there are other matching jobs "
            f"that were not started: {', '.join(twins)}.",
            hint=_CLEAN_UP,
        )


def _files(asked: JobIn) -> _Files:
    return _Files(
        train=tuple(file.file_id for file in asked.training_files),
        weights=tuple(file.weight for file in asked.training_files),
        validation=tuple(asked.validation_files or ()),
    )


def _around(run: TrainingRun) -> JobFilters:
    return JobFilters(created_after=run.created_at - CLOCK_SLACK, suffix=run.config.suffix)


def _duplicate(error: DuplicateRun, seen: Sequence[_Listed]) -> DuplicateRun:
    live = [job_id for job_id, job in seen if job is not None and not is_over(job)]
    other = error.other or next(iter(live), None)
    return DuplicateRun(
        f"The provider already has a similar job{f': {other}' if other else ''}; "
        "no second one was created.",
        other=other,
        hint="Wait for that job or cancel it, or change the data or a hyperparameter.",
    )
