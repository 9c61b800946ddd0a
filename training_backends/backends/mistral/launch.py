"""One launch: upload, create, wait for the quote, start; each step exactly once."""

from dataclasses import dataclass, field
from typing import Final

import anyio

from training_backends.backends.mistral.api import MistralAPI
from training_backends.backends.mistral.create_once import Creation, require_no_twin
from training_backends.backends.mistral.job_request import make_job, read_options
from training_backends.backends.mistral.job_state import (
    has_started,
    is_ending,
    is_over,
    quote_of,
    state_of,
)
from training_backends.backends.mistral.retry import Steps
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.backends.mistral.uploads import Uploads
from training_backends.core.backend import CredentialSource, Journal, JSONValue
from training_backends.core.errors import (
    BudgetExceeded,
    DatasetError,
    ProtocolError,
    TrainingBackendError,
    WaitTimeout,
    may_have_happened,
)
from training_backends.core.estimate import Estimate
from training_backends.core.persist import TRIES, asked_pause, may_pass
from training_backends.core.run import RunState, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.protocols.mistral.status import to_status
from training_backends.protocols.mistral.wire import DetailedJob, Job, TrainingFile

__all__ = ["Launch"]

_REPEAT_NOTES: Final = (
    "The server keeps no checkpoints: training starts again on the same files.",
)


@dataclass(slots=True, kw_only=True)
class Launch:
    """One launch.

    Attributes:
        anew: Whether it repeats an earlier run, which its quote then notes.
        reuse: The earlier run's job, whose files are used if the server still has them.
    """

    api: MistralAPI
    settings: MistralSettings
    credentials: CredentialSource
    run: TrainingRun
    journal: Journal
    anew: bool = False
    reuse: Job | None = None
    _steps: Steps = field(init=False)
    _uploads: Uploads = field(init=False)
    _quoted: bool = field(init=False)

    def __post_init__(self) -> None:
        self._steps = Steps(journal=self.journal, settings=self.settings)
        self._uploads = Uploads(api=self.api, steps=self._steps)
        self._quoted = self.run.estimate is not None and self.run.estimate.basis == "quote"

    async def launch(self) -> RunState:
        """Launch the run, continuing after the last completed step."""
        job_id = self.run.remote_id
        if job_id is None:
            # Fails if the service has ended fine-tuning, before any upload.
            await self.api.probe()
            job_id = await self._create()
            await self.journal.record(RunState(status=TrainingStatus.PENDING, remote_id=job_id))
        return await self.start(job_id)

    async def start(self, job_id: str) -> RunState:
        """Wait for validation, have the quote approved, and start the job."""
        job = await self._until_checked(job_id)
        if job.status != "VALIDATED":
            return self._state(job)  # already started, or finished
        await require_no_twin(self.api, self._steps, self.run, job)
        await self._agree_on_quote(job)
        # Check again: approving the price may have taken long.
        await require_no_twin(self.api, self._steps, self.run, job)
        word = str(await self._start(job_id))
        try:
            return self._state(await self._fetch_job(job_id))
        except TrainingBackendError:
            # The job is started, so this must not fail the launch.
            return RunState(status=to_status(word), raw_status=word, remote_id=job_id)

    # -- create ------------------------------------------------------------------------

    async def _create(self) -> str:
        train, validation = await self._files()
        wanted = await make_job(self.run.config, train, validation, self.credentials)
        return await Creation(api=self.api, steps=self._steps, run=self.run).create(wanted)

    async def _files(self) -> tuple[list[TrainingFile], list[str]]:
        old = await self._old_files()
        if old is not None:
            return old
        data = self.run.config.data
        try:
            train = [
                TrainingFile(file_id=file_id, weight=source.weight)
                for source in data.train
                for file_id in await self._uploads.file_ids(source)
            ]
            validation = [await self._uploads.file_id(source) for source in data.validation]
        except DatasetError as error:
            if not self.anew:
                raise
            raise DatasetError(
                f"The server no longer has the files of the earlier run. {error.message}",
                issues=error.issues,
                hint="Restore the files, or launch a new run with other files.",
            ) from error
        return train, validation

    async def _old_files(self) -> tuple[list[TrainingFile], list[str]] | None:
        """Return the files of the repeated job if the server still has all of them."""
        if self.reuse is None:
            return None
        train, validation = self.reuse.training_files, self.reuse.validation_files or []
        data = self.run.config.data
        weights = [source.weight for source in data.train]
        if len(train) > len(weights) and len(set(weights)) == 1:
            weights = weights[:1] * len(train)  # some were uploaded in parts
        if (len(train), len(validation)) != (len(weights), len(data.validation)):
            return None
        for file_id in (*train, *validation):
            if not await self._uploads.has(file_id):
                return None
        files = zip(train, weights, strict=True)
        return [TrainingFile(file_id=name, weight=weight) for name, weight in files], validation

    # -- quote -------------------------------------------------------------------------

    async def _until_checked(self, job_id: str) -> DetailedJob:
        """Poll the job until validation has ended, through outages of the server."""
        limit = read_options(self.run.config).validate_timeout
        polls = self._steps.polls()
        word = None
        unreadable = 0
        with anyio.move_on_after(limit):
            while True:
                asked = 0.0
                try:
                    job = await self.api.get_job(job_id)
                except TrainingBackendError as error:
                    unreadable = unreadable + 1 if isinstance(error, ProtocolError) else 0
                    if not may_pass(error) or unreadable == TRIES:
                        raise
                    asked = asked_pause(error)
                else:
                    unreadable = 0
                    if job.status != word:
                        word = job.status
                        polls.reset()
                        await self.journal.record(self._state(job))
                    if job.status == "VALIDATED" or is_ending(job) or has_started(job):
                        return job
                await anyio.sleep(max(polls.next(), asked))
        found = f"its status is {word}" if word else "its status was not read"
        raise WaitTimeout(
            f"Timed out: the provider did not validate job {job_id} within {limit:g} s; {found}.",
            hint=f"Run `training-backends launch --id {self.run.id}` with the same configuration "
            "to continue; options.validate_timeout sets the timeout.",
        )

    async def _fetch_job(self, job_id: str) -> DetailedJob:
        return await self._steps.ask(lambda: self.api.get_job(job_id))

    async def _agree_on_quote(self, job: DetailedJob) -> None:
        quote = self._quote(job) or self._noted(
            Estimate(basis="quote", notes=("The server returned no quote.",))
        )
        try:
            await self.journal.quote(quote)
        except BudgetExceeded as refusal:
            await self._cancel_unstarted(job.id, refusal)
            raise
        self._quoted = True

    def _quote(self, job: Job) -> Estimate | None:
        quote = quote_of(job, hosted=self.settings.is_hosted)
        return None if quote is None else self._noted(quote)

    def _noted(self, quote: Estimate) -> Estimate:
        return (
            quote.model_copy(update={"notes": (*_REPEAT_NOTES, *quote.notes)})
            if self.anew
            else quote
        )

    def _state(self, job: Job) -> RunState:
        """Translate a job; the quote is reported once, with its notes."""
        quote = None if self._quoted else self._quote(job)
        state = state_of(job, hosted=self.settings.is_hosted)
        return state.model_copy(update={"estimate": quote})

    async def _cancel_unstarted(self, job_id: str, refusal: BudgetExceeded) -> None:
        """Cancel an unstarted job, which costs nothing."""
        try:
            job = await self._steps.ask(lambda: self._cancel(job_id))
        except TrainingBackendError as error:
            note = (
                f"Job {job_id} was not started, so it costs nothing, but cancelling it may have "
                f"failed ({error.message})."
            )
            refusal.hint = f"{refusal.hint} {note}" if refusal.hint else note
        else:
            await self.journal.record(self._state(job))

    async def _cancel(self, job_id: str) -> Job:
        try:
            job: Job = await self.api.cancel_job(job_id)
        except TrainingBackendError as error:
            if may_have_happened(error):
                raise
            job = await self.api.get_job(job_id)  # rejected, perhaps because it has finished
            if not is_over(job):
                raise
        if not is_ending(job):
            raise ProtocolError(f"the status is {job.status}")
        return job

    # -- start -------------------------------------------------------------------------

    async def _start(self, job_id: str) -> JSONValue:
        async def find() -> JSONValue:
            job = await self.api.get_job(job_id)
            return job.status if is_ending(job) or has_started(job) else None

        async def do() -> JSONValue:
            try:
                return (await self.api.start_job(job_id)).status
            except TrainingBackendError as error:
                if may_have_happened(error):
                    raise
                # Rejected, perhaps because it is already started.
                status = await find()
                if status is None:
                    raise
                return status

        return await self._steps.surely("start", do, find)
