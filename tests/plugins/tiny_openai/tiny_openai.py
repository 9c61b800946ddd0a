"""A training backend for servers of the OpenAI fine-tuning API."""

from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel

from training_backends import plugins as tb
from training_backends.plugins import TrainingStatus as Status

JOBS = "/fine_tuning/jobs"
STATUSES = {
    "validating_files": Status.VALIDATING,
    "queued": Status.PENDING,
    "running": Status.RUNNING,
    "pausing": Status.STOPPING,
    "paused": Status.PAUSED,
    "succeeded": Status.COMPLETED,
    "failed": Status.FAILED,
    "cancelled": Status.CANCELLED,
}
METRICS = {"train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"}


class File(BaseModel):
    id: str
    filename: str


class Error(BaseModel):
    message: str | None = None


class Job(BaseModel):
    id: str
    model: str
    status: str
    finished_at: tb.UtcDatetime | None = None
    fine_tuned_model: str | None = None
    user_provided_suffix: str | None = None
    metadata: dict[str, str] | None = None
    error: Error = Error()


class Event(BaseModel):
    id: str
    created_at: tb.UtcDatetime
    level: str
    message: str
    data: dict[str, Any]


def job_path(job_id: str) -> str:
    return f"{JOBS}/{tb.path_segment(job_id)}"


def without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class TinySettings(tb.ServerSettings):
    section: ClassVar[str] = "tiny"

    base_url: str = "http://127.0.0.1:8123/v1"


class TinyBackend(tb.ServerBackend):
    name = "tiny"
    summary = "Servers of the OpenAI fine-tuning API."
    settings_model = TinySettings
    probe_path = "/models"
    page_size = 100

    @property
    def capabilities(self) -> tb.Capabilities:
        return tb.Capabilities(
            hyperparameters=frozenset({"epochs", "batch_size", "seed"}),
            max_train_files=1,
            validation_files=True,
            suffix=tb.SuffixRule(max_length=64),
            pauses=True,
            resumes="anew",
            deletes=True,
            lists_remote=True,
            provider_format=tb.PROVIDER_FORMATS["openai"],
        )

    async def validate(self, config: tb.TrainingConfig, dataset: tb.Dataset) -> tb.ValidationReport:
        if (config.hyperparameters.epochs or 1) % 1 == 0:
            return tb.ValidationReport()
        field, fix = "hyperparameters.epochs", "round it"
        issue = tb.Issue(code="whole_epochs", message="not a whole number", field=field, fix=fix)
        return tb.ValidationReport(issues=(issue,))

    async def estimate(self, config: tb.TrainingConfig, dataset: tb.Dataset) -> tb.Estimate:
        return tb.Estimate(notes=("The server reports neither prices nor durations.",))

    def _list(self, path: str, shape: type[tb.Model]) -> AsyncGenerator[tb.Model, None]:
        query = [("limit", str(self.page_size))]
        return tb.paged(self.http, path, shape=shape, query=query, next_page=tb.after_last())

    async def launch(self, run: tb.TrainingRun, journal: tb.Journal) -> tb.RunState:
        body = await self._request(run, journal)
        create, find = partial(self._create, body), partial(self._find, body["metadata"])
        job_id = str(await journal.step("create", create, find))
        # Before the next request, so that an interrupted launch does not lose the job.
        await journal.record(tb.RunState(status=Status.PENDING, remote_id=job_id))
        return self._state(await self._job(job_id))

    async def _request(self, run: tb.TrainingRun, journal: tb.Journal) -> dict[str, Any]:
        config, values = run.config, run.config.hyperparameters
        files = [*config.data.train, *config.data.validation]
        train, *validation = [await self._file_id(file, journal) for file in files]
        epochs = None if values.epochs is None else int(values.epochs)
        chosen = without_none(n_epochs=epochs, batch_size=values.batch_size)
        return without_none(
            model=config.model,
            training_file=train,
            validation_file=validation[0] if validation else None,
            method={"type": "supervised", "supervised": {"hyperparameters": chosen}},
            suffix=config.suffix,
            seed=values.seed,
            # The run id is unique in one store only, not in the provider's account.
            metadata={"run": run.id, "token": await journal.token("job")},
        )

    async def _create(self, body: dict[str, Any]) -> str:
        return (await self.http.json("POST", JOBS, body=body, shape=Job)).id

    async def _find(self, metadata: dict[str, str]) -> str | None:
        async def look() -> str | None:
            job = await tb.first_match(self._list(JOBS, Job), lambda job: job.metadata == metadata)
            return None if job is None else job.id

        return await tb.settle(look, within=self.settings.settling)

    async def _file_id(self, source: tb.DataSource, journal: tb.Journal) -> str:
        path = source.local_path
        hashed = await tb.hash_file(path)
        name = f"{hashed.sha256}.jsonl"  # a file found by this name has the right content

        async def upload() -> str:
            purpose = {"purpose": "fine-tune"}
            form = tb.FileUpload(path, fields=purpose, filename=name, hashed=hashed)
            return (await self.http.upload("/files", form, shape=File)).id

        async def find() -> str | None:
            file = await tb.first_match(self._list("/files", File), lambda f: f.filename == name)
            return None if file is None else file.id

        scope = self.settings.scope
        return await journal.upload(scope, hashed.sha256, upload, find, self._has_file)

    async def _has_file(self, file_id: str) -> bool:
        return await self.http.exists(f"/files/{tb.path_segment(file_id)}")

    async def status(self, run: tb.TrainingRun) -> tb.RunState:
        return self._state(await self._job(self.job_id(run)))

    async def observe(self, run: tb.TrainingRun, *, after: str | None = None) -> tb.Observation:
        state = await self.status(run)  # first, so that the log of a finished run is complete
        events = self._list(f"{job_path(self.job_id(run))}/events", Event)
        records = (self._record(event) async for event in events)
        return await tb.Observation.from_newest(state, records, after)

    async def _job(self, job_id: str) -> Job:
        return await self.http.json("GET", job_path(job_id), shape=Job)

    def _state(self, job: Job) -> tb.RunState:
        reason = job.error.message
        return tb.RunState(
            status=STATUSES.get(job.status, Status.UNKNOWN),
            raw_status=job.status,
            remote_id=job.id,
            failure=tb.Failure(kind="provider", message=reason) if reason else None,
            finished_at=job.finished_at,
            result_model=job.fine_tuned_model,
        )

    def _record(self, event: Event) -> tb.LogRecord:
        metrics = {name: event.data[name] for name in METRICS & event.data.keys()}
        return tb.LogRecord(
            at=event.created_at,
            level="error" if event.level == "error" else "info",
            message=event.message,
            source="metrics" if metrics else "event",
            step=event.data.get("step"),
            fields=metrics,
            cursor=event.id,
        )

    async def stop(self, run: tb.TrainingRun, *, save_checkpoint: bool = True) -> None:
        await self._act(run, "cancel", lambda status: status.is_terminal)

    async def pause(self, run: tb.TrainingRun) -> None:
        await self._act(run, "pause", lambda status: status in {Status.PAUSED, Status.STOPPING})

    async def unpause(self, run: tb.TrainingRun) -> None:
        await self._act(run, "resume", lambda status: status is not Status.PAUSED)

    async def _act(self, run: tb.TrainingRun, action: str, ok: Callable[[Status], bool]) -> None:
        async def reached() -> bool:
            return ok((await self.status(run)).status)

        path = f"{job_path(self.job_id(run))}/{action}"
        await tb.ensure(reached, partial(self.http.json, "POST", path))

    async def delete(self, run: tb.TrainingRun) -> None:
        if run.result_model is not None:
            await self.http.json("DELETE", f"/models/{tb.path_segment(run.result_model)}")

    async def list_remote(self, filters: tb.RemoteFilters) -> Sequence[tb.RemoteRun]:
        found = []
        async for job in self._list(JOBS, Job):
            state, suffix = self._state(job), job.user_provided_suffix
            if filters.accept(status=state.status, model=job.model, suffix=suffix):
                run_id = (job.metadata or {}).get("run")
                run = tb.RemoteRun(remote_id=job.id, model=job.model, state=state, run_id=run_id)
                found.append(run)
        return found
