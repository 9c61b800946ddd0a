"""A complete training backend in one module, for servers of the OpenAI fine-tuning API."""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self, TypeVar

import anyio
from pydantic import BaseModel, ValidationError

from training_backends.plugins import (
    PROVIDER_FORMATS,
    BackendContext,
    Capabilities,
    ConfigError,
    CredentialNotFound,
    Dataset,
    Estimate,
    Failure,
    FileUpload,
    Health,
    HttpClient,
    HttpPolicy,
    Issue,
    Journal,
    KeySource,
    LogRecord,
    Observation,
    ProtocolError,
    Query,
    RemoteFilters,
    RemoteRun,
    RunNotFound,
    RunState,
    SectionSettings,
    SuffixRule,
    TrainingBackend,
    TrainingBackendError,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    ValidationReport,
    after_last,
    hash_file,
    paged,
    path_segment,
)
from training_backends.protocols.openai.errors import error_from_answer
from training_backends.protocols.openai.events import read_metrics
from training_backends.protocols.openai.status import to_status
from training_backends.protocols.openai.wire import (
    FileObject,
    FineTuningJob,
    FineTuningJobEvent,
)

_M = TypeVar("_M", bound=BaseModel)
_JOBS: Final = "/fine_tuning/jobs"
_LISTINGS: Final = 5
"""How often to look for the job of a create request without a response."""
_ENDED: Final = {status for status in TrainingStatus if status.is_terminal}
_PAUSED: Final = {TrainingStatus.PAUSED, TrainingStatus.STOPPING}
_LEVELS: Final[Mapping[str, Literal["warning", "error"]]] = {"warn": "warning", "error": "error"}


class TinySettings(SectionSettings):
    """The settings: `TRAINING_BACKENDS_TINY__BASE_URL`, or `[tiny]` in the settings file."""

    section: ClassVar[str] = "tiny"

    base_url: str = "http://127.0.0.1:8000/v1"
    settle_timeout: float = 30.0
    """Seconds until a created job is listed."""
    poll_min: float = 0.5
    page_size: int = 100
    attempts: int = 5
    read_timeout: float = 30.0


class TinyBackend(TrainingBackend):
    """Runs fine-tuning jobs on a server of the OpenAI API."""

    name: ClassVar[str] = "tiny"
    summary: ClassVar[str] = "Servers of the OpenAI fine-tuning API."
    settings_model: ClassVar[type[SectionSettings]] = TinySettings

    def __init__(self, settings: TinySettings, key: KeySource) -> None:
        self.settings = settings
        policy = HttpPolicy(attempts=settings.attempts, read_timeout=settings.read_timeout)
        self._http = HttpClient(
            settings.base_url,
            key=key,
            decode_error=self.decode_error,
            policy=policy,
            backend=self.name,
        )

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        assert isinstance(context.settings, TinySettings)
        return cls(context.settings, lambda: context.credentials.get(cls.name))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            hyperparameters=frozenset({"epochs", "batch_size", "seed"}),
            max_train_files=1,
            validation_files=True,
            suffix=SuffixRule(max_length=64),
            pauses=True,
            resumes="anew",
            deletes=True,
            lists_remote=True,
            provider_format=PROVIDER_FORMATS["openai"],
        )

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        return timedelta(seconds=self.settings.poll_min), timedelta(seconds=10)

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        epochs = config.hyperparameters.epochs
        if epochs is None or epochs == int(epochs):
            return ValidationReport()
        field, fix = "hyperparameters.epochs", "round it"
        issue = Issue(code="whole_epochs", message="not a whole number", field=field, fix=fix)
        return ValidationReport(issues=(issue,))

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        return Estimate(notes=("The server reports neither prices nor durations.",))

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        body = await self._request(run, journal)
        job_id = str(
            await journal.step(
                "create", lambda: self._create(body), lambda: self._find_job(body["metadata"])
            )
        )
        # Before the next request, so that an interrupted launch does not lose the job.
        await journal.record(RunState(status=run.status, remote_id=job_id))
        state = self._state(await self._job(job_id))
        await journal.record(state)
        return state

    async def _create(self, body: dict[str, Any]) -> str:
        return (await self._ask(FineTuningJob, "POST", _JOBS, body=body)).id

    async def _find_job(self, metadata: Mapping[str, str]) -> str | None:
        """Return the id of the job with this metadata; lists may lag behind."""
        query = [(f"metadata[{name}]", value) for name, value in metadata.items()]
        for _ in range(_LISTINGS):
            async with aclosing(self._list(FineTuningJob, _JOBS, query)) as jobs:
                async for job in jobs:
                    return job.id
            await anyio.sleep(self.settings.settle_timeout / _LISTINGS)
        return None

    async def _request(self, run: TrainingRun, journal: Journal) -> dict[str, Any]:
        """Upload the files and return the body of the create request."""
        # The run id alone is unique in one store only, not in the provider's account.
        metadata = {"run": run.id, "token": await journal.token("job")}
        config, values = run.config, run.config.hyperparameters
        numbers = {
            "n_epochs": None if values.epochs is None else int(values.epochs),
            "batch_size": values.batch_size,
        }
        chosen = {name: value for name, value in numbers.items() if value is not None}
        body = {
            "model": config.model,
            "training_file": await self._file_id(config.data.train[0].local_path, journal),
            "suffix": config.suffix,
            "seed": values.seed,
            "metadata": metadata,
            "method": {"type": "supervised", "supervised": {"hyperparameters": chosen}},
        }
        for source in config.data.validation:
            body["validation_file"] = await self._file_id(source.local_path, journal)
        return {name: value for name, value in body.items() if value is not None}

    async def _file_id(self, path: Path, journal: Journal) -> str:
        """Return the provider's id of a file; each content is uploaded once."""
        hashed = await hash_file(path)
        # The name contains the hash, so that a file found by name has the right content.
        filename = f"{hashed.sha256[:32]}.jsonl"

        async def upload() -> str:
            fields = {"purpose": "fine-tune"}
            form = FileUpload(path, fields=fields, filename=filename, hashed=hashed)
            return self._parsed(FileObject, await self._http.upload("/files", form)).id

        return await journal.upload(
            self.settings.base_url,
            hashed.sha256,
            do=upload,
            find=lambda: self._find_file(filename, hashed.size),
            has=self._has_file,
        )

    async def _find_file(self, filename: str, size: int) -> str | None:
        async with aclosing(self._list(FileObject, "/files")) as files:
            async for file in files:
                if file.filename == filename and file.bytes == size:
                    return file.id
        return None

    async def _has_file(self, file_id: str) -> bool:
        try:
            await self._ask(FileObject, "GET", f"/files/{path_segment(file_id)}")
        except RunNotFound:
            return False
        return True

    async def status(self, run: TrainingRun) -> RunState:
        return self._state(await self._job(self.job_id(run)))

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        job = await self._job(self.job_id(run))
        found: list[LogRecord] = []  # newest first, as the server lists events
        async with aclosing(self._list(FineTuningJobEvent, self._path(job.id, "events"))) as events:
            async for event in events:
                if event.id == after:
                    break
                found.append(self._record(event))
            else:
                if after is not None:
                    raise ConfigError(f"{after!r} is not a cursor of run {run.id}.")
        records = tuple(reversed(found))
        return Observation(self._state(job), records, records[-1].cursor if records else after)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        await self._act(run, "cancel", _ENDED)

    async def pause(self, run: TrainingRun) -> None:
        await self._act(run, "pause", _PAUSED)

    async def unpause(self, run: TrainingRun) -> None:
        await self._act(run, "resume", set(TrainingStatus) - _PAUSED)

    async def _act(self, run: TrainingRun, action: str, done: Collection[TrainingStatus]) -> None:
        """Ask for a change; the server rejects one that has already happened."""
        job_id = self.job_id(run)
        try:
            await self._ask(FineTuningJob, "POST", self._path(job_id, action))
        except ConfigError:
            if (await self.status(run)).status not in done:
                raise

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        return await self.launch(new_run, journal)

    async def delete(self, run: TrainingRun) -> None:
        if run.result_model is not None:
            await self._http.json("DELETE", f"/models/{path_segment(run.result_model)}")

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        async with aclosing(self._list(FineTuningJob, _JOBS)) as jobs:
            return [
                RemoteRun(
                    remote_id=job.id,
                    model=job.model,
                    state=self._state(job),
                    created_at=_time(job.created_at),
                    run_id=(job.metadata or {}).get("run"),
                )
                async for job in jobs
                if filters.status in {None, to_status(job.status)}
                and filters.model in {None, job.model}
                and filters.suffix in {None, job.user_provided_suffix}
            ]

    async def health(self) -> Health:
        try:
            await self._http.json("GET", "/models")
        except TrainingBackendError as error:
            configured = not isinstance(error, CredentialNotFound)
            return Health(ok=False, message=error.message, hint=error.hint, configured=configured)
        return Health(ok=True, message=f"{self.settings.base_url} answers")

    async def aclose(self) -> None:
        await self._http.aclose()

    # -- requests ----------------------------------------------------------------------

    def decode_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> TrainingBackendError:
        return error_from_answer(status, headers, body, backend=self.name)

    async def _ask(self, model: type[_M], method: str, path: str, **call: Any) -> _M:
        return self._parsed(model, await self._http.json(method, path, **call))

    def _parsed(self, model: type[_M], document: dict[str, Any]) -> _M:
        try:
            return model.model_validate(document)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            message = f"The server's {model.__name__} is invalid at {place!r}."
            raise ProtocolError(message, backend=self.name) from None

    async def _list(
        self, model: type[_M], path: str, query: Query = ()
    ) -> AsyncGenerator[_M, None]:
        """Yield the items of all pages, newest first."""
        asked = [("limit", str(self.settings.page_size)), *query]
        items = paged(self._http, path, query=asked, next_page=after_last())
        async with aclosing(items):
            async for item in items:
                yield self._parsed(model, item)

    async def _job(self, job_id: str) -> FineTuningJob:
        return await self._ask(FineTuningJob, "GET", self._path(job_id))

    def _path(self, job_id: str, *rest: str) -> str:
        return "/".join((_JOBS, path_segment(job_id), *rest))

    # -- translation -------------------------------------------------------------------

    def _state(self, job: FineTuningJob) -> RunState:
        failure = None
        if job.error is not None:
            said = job.error.message or job.error.code or "no reason given"
            failure = Failure(kind="provider", message=said)
        return RunState(
            status=to_status(job.status),
            raw_status=job.status,
            remote_id=job.id,
            failure=failure,
            finished_at=None if job.finished_at is None else _time(job.finished_at),
            result_model=job.fine_tuned_model,
        )

    def _record(self, event: FineTuningJobEvent) -> LogRecord:
        metrics = read_metrics(event)
        return LogRecord(
            at=_time(event.created_at),
            level=_LEVELS.get(event.level, "info"),
            message=event.message,
            source="event" if metrics is None else "metrics",
            step=metrics and metrics.step,
            fields=metrics.values() if metrics else {},
            cursor=event.id,
        )


def _time(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
