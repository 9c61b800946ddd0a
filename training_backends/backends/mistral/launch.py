"""One launch: upload, create, wait for the quote, start; each step once, whatever breaks."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

import anyio

from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.backends.mistral.polling import Pace, ask_patiently
from training_backends.backends.mistral.requests import make_job, matches, read_options
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.backends.mistral.states import has_started, quote_of, state_of
from training_backends.core.backend import CredentialSource, Journal, JSONValue
from training_backends.core.errors import (
    AmbiguousLaunch,
    BackendUnavailable,
    BudgetExceeded,
    DuplicateRun,
    ProtocolError,
    RunNotFound,
    TrainingBackendError,
    WaitTimeout,
)
from training_backends.core.estimate import Estimate
from training_backends.core.run import RunState, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.mistral.status import to_status
from training_backends.mistral.wire import DetailedJob, Job, JobIn
from training_backends.net.multipart import hash_file

__all__ = ["Launch"]

_WINDOW: Final = timedelta(days=1)
"""How far our clock and the server's may be apart when a lost job is looked for."""


@dataclass(slots=True, kw_only=True)
class Launch:
    """Everything that one launch needs.

    Attributes:
        reuse: A job whose files are trained on again, where the server still has them.
        notes: Said with the quote.
    """

    api: MistralAPI
    settings: MistralSettings
    credentials: CredentialSource
    run: TrainingRun
    journal: Journal
    reuse: Job | None = None
    notes: tuple[str, ...] = ()
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._pace = Pace(self.settings.poll_min, self.settings.longest_poll)

    async def go(self) -> RunState:
        """Bring the run to where it is started, from wherever it stands."""
        job_id = self.run.remote_id
        if job_id is None:
            # Says that the service has ended before anything is uploaded to it.
            await self.api.list_jobs(page=0, page_size=1)
            job_id = await self._create()
            await self.journal.record(RunState(status=TrainingStatus.PENDING, remote_id=job_id))
        return await self.start(job_id)

    async def start(self, job_id: str) -> RunState:
        """Wait until the job is checked, let the quote be judged, and start it."""
        job = await self._until_checked(job_id)
        if job.status != "VALIDATED":
            return state_of(job)  # started already, or over
        await self._agree_on_quote(job)
        await self._surely("start", *self._starting(job_id))
        return state_of(await self.api.get_job(job_id))

    # -- files -------------------------------------------------------------------------

    async def _files(self) -> tuple[list[str], list[str]]:
        data = self.run.config.data
        old = await self._old_files()
        if old is not None:
            return old
        train = [await self._file(source.path) for source in data.train]
        return train, [await self._file(source.path) for source in data.validation]

    async def _old_files(self) -> tuple[list[str], list[str]] | None:
        """Return the files of the job that is done again, if all are still there."""
        if self.reuse is None:
            return None
        train, validation = self.reuse.training_files, self.reuse.validation_files or []
        data = self.run.config.data
        if (len(train), len(validation)) != (len(data.train), len(data.validation)):
            return None
        for file_id in (*train, *validation):
            if not await self._exists(file_id):
                return None
        return train, validation

    async def _file(self, path: Path) -> str:
        """Return the server's id of a file, uploaded now if it has to be."""
        sha256, size = await hash_file(path)
        # The name says what is inside, so a file found by it can be trusted, and the
        # server keeps one copy for all runs.
        filename = f"{path.stem[:80]}-{sha256[:16]}.jsonl"
        for attempt in range(1, 4):
            fresh = False

            async def find() -> JSONValue:
                return await self._find_file(filename, size)

            async def do() -> JSONValue:
                nonlocal fresh
                fresh = True
                return await find() or await self._upload(path, filename, sha256)

            name = f"upload:{sha256}" + (f"#{attempt}" if attempt > 1 else "")
            file_id = str(await self._surely(name, do, find))
            if fresh or await self._exists(file_id):
                return file_id
        raise ProtocolError(f"The server keeps losing the uploaded file {filename}.")

    async def _upload(self, path: Path, filename: str, sha256: str) -> str:
        def progress(done: int, total: int) -> None:
            self.journal.progress(f"upload {path.name}", done, total)

        found = await self.api.upload_file(
            path, filename=filename, sha256=sha256, on_progress=progress
        )
        return found.id

    async def _find_file(self, filename: str, size: int) -> str | None:
        async with aclosing(self.api.iter_files(search=filename, purpose="fine-tune")) as files:
            async for file in files:
                if file.filename == filename and file.bytes in {None, size}:
                    return file.id
        return None

    async def _exists(self, file_id: str) -> bool:
        try:
            return not (await self.api.retrieve_file(file_id)).deleted
        except RunNotFound:
            return False

    # -- create ------------------------------------------------------------------------

    async def _create(self) -> str:
        train, validation = await self._files()
        wanted = await make_job(self.run.config, train, validation, self.credentials)

        just_looked = False

        async def look() -> JSONValue:
            nonlocal just_looked
            just_looked = True
            return {"jobs": await self._matching(wanted)}

        # Jobs that were there before ours can only be somebody else's.
        before = await self.journal.step("before create", look, repeatable=True)
        known = frozenset(before["jobs"]) if isinstance(before, dict) else frozenset()

        async def find() -> JSONValue:
            return await self._find_job(wanted, known)

        async def do() -> JSONValue:
            seen = known if just_looked else known.union(await self._matching(wanted))
            try:
                return (await self.api.create_job(wanted)).id
            except DuplicateRun as error:
                mine = await self._find_job(wanted, seen)
                if mine is None:
                    raise self._duplicate(error, seen) from error
                return mine

        return str(await self._surely("create", do, find))

    async def _matching(self, wanted: JobIn) -> list[str]:
        filters = JobFilters(
            created_after=self.run.created_at - _WINDOW, suffix=self.run.config.suffix
        )
        async with aclosing(self.api.iter_jobs(filters)) as jobs:
            return [job.id async for job in jobs if matches(job, wanted)]

    async def _find_job(self, wanted: JobIn, known: frozenset[str]) -> str | None:
        """Return the job that an earlier create made, or None.

        Raises:
            AmbiguousLaunch: Several jobs could be it.
        """
        for look in range(3):
            found = [job for job in await self._matching(wanted) if job not in known]
            if len(found) > 1:
                raise AmbiguousLaunch(
                    f"An earlier try to create a job may have made any of {', '.join(found)}.",
                    hint="Look at these jobs at the provider and cancel all but one, or all; "
                    "then launch under another id.",
                )
            if found:
                return found[0]
            if look < 2:  # a list may lag behind what was created
                await anyio.sleep(self.settings.poll_min)
        return None

    def _duplicate(self, error: DuplicateRun, known: frozenset[str]) -> DuplicateRun:
        other = error.other or next(iter(sorted(known)), None)
        return DuplicateRun(
            f"The provider runs a similar job already{f': {other}' if other else ''}; "
            "a second one was not created.",
            other=other,
            hint="Wait for that one or cancel it, or change the data or a hyperparameter.",
        )

    # -- quote and start ---------------------------------------------------------------

    async def _until_checked(self, job_id: str) -> DetailedJob:
        """Look at the job until it has left validation, one way or another."""
        limit = read_options(self.run.config).validate_timeout
        word = None
        with anyio.move_on_after(limit):
            while True:
                job = await ask_patiently(lambda: self.api.get_job(job_id), self._pace, limit)
                status = to_status(job.status)
                if job.status != word:
                    word = job.status
                    self._pace.quicken()
                    await self.journal.record(state_of(job))
                if (
                    status in {TrainingStatus.READY, TrainingStatus.STOPPING}
                    or status.is_terminal
                    or has_started(job)
                ):
                    return job
                await self._pace.rest()
        raise WaitTimeout(
            f"The provider has not checked job {job_id} within {limit:g} s; it says {word}.",
            hint=f"`training-backends launch --id {self.run.id}` with the same configuration "
            "goes on from here; options.validate_timeout sets how long to wait.",
        )

    async def _agree_on_quote(self, job: DetailedJob) -> None:
        quote = quote_of(job, hosted=self.settings.is_hosted) or Estimate(
            basis="quote", notes=("The server gave no quote.",)
        )
        quote = quote.model_copy(update={"notes": (*self.notes, *quote.notes)})
        try:
            await self.journal.quote(quote)
        except BudgetExceeded as refusal:
            await self._cancel(job.id, refusal)
            raise

    async def _cancel(self, job_id: str, refusal: BudgetExceeded) -> None:
        """Take back a job that must not be started; until then it costs nothing."""
        try:
            await self.journal.record(state_of(await self.api.cancel_job(job_id)))
        except TrainingBackendError as error:
            refusal.add_note(
                f"Job {job_id} was not started, but could not be cancelled either: {error}"
            )

    def _starting(
        self, job_id: str
    ) -> tuple[Callable[[], Awaitable[JSONValue]], Callable[[], Awaitable[JSONValue]]]:
        async def find() -> JSONValue:
            job = await self.api.get_job(job_id)
            over = to_status(job.status).is_terminal or job.status == "CANCELLATION_REQUESTED"
            return job.status if over or has_started(job) else None

        async def do() -> JSONValue:
            try:
                return (await self.api.start_job(job_id)).status
            except BackendUnavailable:
                raise
            except TrainingBackendError:
                # Refused, perhaps because it has been started meanwhile.
                status = await find()
                if status is None:
                    raise
                return status

        return do, find

    async def _surely(
        self,
        name: str,
        do: Callable[[], Awaitable[JSONValue]],
        find: Callable[[], Awaitable[JSONValue]],
    ) -> JSONValue:
        """Take a step; if its answer is lost, look once whether it happened and go on."""
        try:
            return await self.journal.step(name, do, find)
        except (BackendUnavailable, ProtocolError) as error:
            if isinstance(error, BackendUnavailable) and not error.sent:
                raise
            await self._pace.rest()
            return await self.journal.step(name, do, find)
