"""Creating a job exactly once over a protocol that cannot say "the same again".

A create whose answer is lost may have made a job, may have made none, or may make one later,
when a proxy or a slow server gets to it. So each try is a step of its own in the journal and
is sent once. Before it stands which jobs like it are there already: those are somebody
else's. After a lost answer the new jobs like it are looked for, for as long as a late one may
take: one is ours, several cannot be told apart, and with none another try is made. That an
answer was lost is remembered, and before the start it is looked once more for a late twin.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from pydantic import BaseModel

from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.backends.mistral.job_request import matches, same_job
from training_backends.backends.mistral.job_state import has_started, is_over
from training_backends.backends.mistral.retry import Steps, asked_pause, may_have_happened, may_pass
from training_backends.backends.mistral.settings import CLOCK_SLACK
from training_backends.core.backend import JSONValue
from training_backends.core.errors import AmbiguousLaunch, DuplicateRun, TrainingBackendError
from training_backends.core.run import TrainingRun, utc_now
from training_backends.protocols.mistral.wire import Job, JobIn, TrainingFile

__all__ = ["Creation", "require_no_twin"]

_CREATES: Final = 3
"""How often one launch sends a create that fails or is not answered."""
_CREATED: Final = "created"
"""Step that remembers how sure it is which job is ours."""
_CLEAN_UP: Final = (
    "Nothing was started. Cancel at the provider what nobody needs (a job that is not started "
    "costs nothing), then repeat the launch: it takes the one that is left."
)

_Listed = tuple[str, Job | None]
"""A job's id, and the job if it can be read."""


class _Files(BaseModel):
    """Ids of the files that a job is created with, and the weights of those to train on."""

    train: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    validation: tuple[str, ...] = ()


class _Before(BaseModel):
    """What is remembered of the moment before a create is sent.

    Attributes:
        jobs: Like the one to be created, and there already.
        at: When that was seen.
        files: With which it is created.
    """

    jobs: tuple[str, ...] = ()
    at: datetime | None = None
    files: _Files | None = None

    def request(self, wanted: JobIn) -> JobIn:
        """Return `wanted` with the files as they were then."""
        if self.files is None:
            return wanted
        # Another limit may have cut the files into other parts since.
        weights = self.files.weights or [file.weight for file in wanted.training_files]
        train = [
            TrainingFile(file_id=file_id, weight=weight)
            for file_id, weight in zip(self.files.train, weights, strict=True)
        ]
        validation = list(self.files.validation) or None
        return wanted.model_copy(update={"training_files": train, "validation_files": validation})


class _Created(BaseModel):
    """How sure it is which job is ours.

    Attributes:
        before: Jobs like it that were there before.
        lost: The files of each create whose answer was lost on the way to it.
    """

    before: tuple[str, ...] = ()
    lost: tuple[_Files, ...] = ()

    def twins(self, job: Job) -> list[Job]:
        """Return what the lost creates made, if they made anything."""
        return [
            job.model_copy(
                update={"training_files": files.train, "validation_files": files.validation}
            )
            for files in self.lost
        ]


@dataclass(slots=True, kw_only=True)
class Creation:
    """Creates the job of one launch, or finds the one that an earlier try has made."""

    api: MistralAPI
    steps: Steps
    run: TrainingRun
    _lost: list[JobIn] = field(default_factory=list)
    """Creates that may have made a job, or may make one still."""
    _before: frozenset[str] = frozenset()
    _trouble: TrainingBackendError | None = None
    """What went wrong with the present try."""

    async def create(self, wanted: JobIn) -> str:
        """Return the id of the one job that answers to `wanted`.

        Raises:
            AmbiguousLaunch: Several jobs could be the one that an earlier try made.
            DuplicateRun: The server has a similar job, which is not ours.
        """
        number, left = 0, _CREATES
        while True:
            number += 1
            job_id = await self._try("" if number == 1 else f"#{number}", wanted)
            if job_id is not None:
                return job_id
            if self._trouble is None:
                continue  # nothing was sent now: this is what an earlier launch did
            left -= 1
            if not left or not may_pass(self._trouble):
                raise self._trouble
            await self.steps.pace().rest(asked_pause(self._trouble))

    async def _try(self, tag: str, wanted: JobIn) -> str | None:
        """Send one create, or learn what came of it earlier; None: no job that we know of."""
        fresh = False
        self._trouble = None

        async def look() -> JSONValue:
            nonlocal fresh
            fresh = True
            seen = await self._like([*self._lost, wanted])
            return _Before(
                jobs=tuple(job_id for job_id, _ in seen),
                at=utc_now(),
                files=_files(wanted),
            ).model_dump(mode="json")

        before = _Before.model_validate(await self.steps.remember(f"before create{tag}", look))
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
                # What others have made since we looked would pass for ours: look again.
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
            # New and like ours: a proxy sent it twice, or an earlier try has come through.
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
        """Look for the job of a create that was not answered, until it must be there.

        Args:
            sent_at: When it was sent; None: just now.
        """
        waited = 0.0 if sent_at is None else max(0.0, (utc_now() - sent_at).total_seconds())
        pace = self.steps.pace()
        rested = 0.0
        while True:
            found = await self._one_of(await self._like([*self._lost, asked]))
            if found is not None:
                return found
            # Two looks at least: a list may lag behind what was created.
            if rested and waited + rested >= self.steps.settings.settling:
                return None
            rested += await pace.rest()

    async def _like(self, wanted: Sequence[JobIn]) -> list[_Listed]:
        """Return the jobs that could be any of `wanted`, and those that cannot be read."""

        async def look() -> list[_Listed]:
            async with aclosing(self.api.iter_listed(_around(self.run))) as jobs:
                return [
                    (job_id, job)
                    async for job_id, job in jobs
                    if job is None or any(matches(job, one) for one in wanted)
                ]

        return await self.steps.ask(look)

    async def _one_of(self, seen: Sequence[_Listed]) -> str | None:
        """Return the job that can only be ours, or None.

        Raises:
            AmbiguousLaunch: Several could be.
        """
        new = {job_id: job for job_id, job in seen if job_id not in self._before}
        if not new:
            return None
        claimed = await self.steps.journal.claimed(new.keys())
        ours = {job_id: job for job_id, job in new.items() if job_id not in claimed}
        # Those that are over were cancelled to leave one, if one is left.
        live = {job_id for job_id, job in ours.items() if job is None or not is_over(job)}
        choice = live or set(ours)
        if len(choice) > 1 or None in ours.values():
            raise AmbiguousLaunch(
                "The answer to creating the job was lost, and it cannot be told which of these "
                f"it made: {', '.join(sorted(choice))}.",
                hint=_CLEAN_UP,
            )
        return next(iter(choice), None)


async def require_no_twin(api: MistralAPI, steps: Steps, run: TrainingRun, job: Job) -> None:
    """Make sure, if an answer was lost on the way to a job, that it did not make two.

    A twin may as well be what somebody else made with the same account at the same time, so
    none is cancelled here: whoever can tell decides.

    Raises:
        AmbiguousLaunch: There is another job like it that nobody has started, or another run
            has taken the same job.
    """

    async def nothing() -> JSONValue:
        return _Created().model_dump(mode="json")

    created = _Created.model_validate(await steps.remember(_CREATED, nothing))
    if not created.lost:
        return
    possible = created.twins(job)

    async def look() -> list[str]:
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

    twins = await steps.ask(look)
    claimed = await steps.journal.claimed([job.id, *twins])
    if job.id in claimed:
        raise AmbiguousLaunch(
            f"Another run has taken the job {job.id} as its own, and one of both is wrong.",
            hint="Nothing was started. Launch again under another id.",
        )
    twins = [job_id for job_id in twins if job_id not in claimed]
    if twins:
        raise AmbiguousLaunch(
            f"An answer was lost while the job {job.id} was created, and there is another one "
            f"like it that nobody has started: {', '.join(twins)}.",
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
        f"The provider runs a similar job already{f': {other}' if other else ''}; "
        "a second one was not created.",
        other=other,
        hint="Wait for that one or cancel it, or change the data or a hyperparameter.",
    )
