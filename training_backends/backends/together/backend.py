"""The backend for Together AI."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

import anyio.to_thread
from pydantic import BaseModel, SecretStr

from training_backends.backends.together.api import ERRORS, TogetherAPI
from training_backends.backends.together.job_log import FineTuneLog, FineTunePosition, state_of
from training_backends.backends.together.job_request import (
    HYPERPARAMETERS,
    LONGEST_OWN_SUFFIX,
    config_issues,
    limit_issues,
    make_body,
    saves_adapter,
    users_suffix,
)
from training_backends.backends.together.launch import (
    TogetherLaunch,
    file_name,
    price_estimate,
    require_allowed,
    wandb_fields,
)
from training_backends.backends.together.settings import TogetherOptions, TogetherSettings
from training_backends.backends.together.status import to_status
from training_backends.backends.together.wire import (
    LARGEST_FILE,
    FineTune,
    FineTuneEvent,
    JobPrice,
)
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    Health,
    Journal,
    RemoteFilters,
    RemoteRun,
    TrainingBackend,
)
from training_backends.core.capabilities import Capabilities, SuffixRule
from training_backends.core.config import DataSource, TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    BudgetExceeded,
    ConfigError,
    CredentialNotFound,
    Issue,
    RunNotFound,
    TrainingBackendError,
    VaultLocked,
)
from training_backends.core.estimate import Estimate
from training_backends.core.persist import ensure
from training_backends.core.run import Observation, RunState, TrainingRun, ValidationReport
from training_backends.core.settings import SectionSettings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.datasets.provider_formats import TOGETHER
from training_backends.http.backend import server_health
from training_backends.http.client import HttpClient
from training_backends.tokens import count_tokens

__all__ = ["TogetherBackend"]

_CAPABILITIES: Final = Capabilities(
    methods=frozenset({"sft", "dpo"}),
    tunings=frozenset({"lora", "full"}),
    hyperparameters=frozenset(HYPERPARAMETERS),
    data=frozenset({"file", "remote"}),
    max_train_files=1,
    validation_files=True,
    suffix=SuffixRule(max_length=LONGEST_OWN_SUFFIX),
    integrations=frozenset({"wandb"}),
    integration_fields=frozenset({"project", "name", "run_name", "entity", "credential"}),
    quotes=True,
    resumes="checkpoint",
    downloads=True,
    deletes=True,
    lists_remote=True,
    provider_format=replace(TOGETHER, max_file_bytes=LARGEST_FILE),
)
_QUIET: Final = frozenset({TrainingStatus.PENDING, TrainingStatus.READY})
"""Statuses in which a job has neither progress nor log."""
_SNAPSHOT_ATTEMPTS: Final = 5
"""How often events and metrics are fetched until no event came in between."""


class TogetherBackend(TrainingBackend):
    """Trains at Together AI, with its price before the start and a download afterwards."""

    name: ClassVar[str] = "together"
    summary: ClassVar[str] = "Together AI: price before the start, weights to download."
    options_model: ClassVar[type[BaseModel]] = TogetherOptions
    settings_model: ClassVar[type[SectionSettings] | None] = TogetherSettings

    def __init__(
        self, *, credentials: CredentialSource, settings: TogetherSettings | None = None
    ) -> None:
        self._credentials = credentials
        self._settings = settings or load_settings(TogetherSettings)
        self._opened: TogetherAPI | None = None

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from the settings in section `together`."""
        settings = cast("TogetherSettings | None", context.settings)
        return cls(credentials=context.credentials, settings=settings)

    @property
    def api(self) -> TogetherAPI:
        """The client, with one connection pool.

        Raises:
            ConfigError: The key would travel unencrypted to another host.
        """
        if self._opened is None:
            http = HttpClient(
                self._settings.base_url,
                key=self._key,
                decode_error=ERRORS,
                policy=self._settings.policy(),
                backend=self.name,
            )
            self._opened = TogetherAPI(http)
        return self._opened

    async def _key(self) -> SecretStr:
        return await self._credentials.get("together", self._settings.profile)

    @property
    def capabilities(self) -> Capabilities:
        """What Together supports; epochs are whole, and learning rates absolute."""
        return _CAPABILITIES

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Return the polling interval from the settings."""
        return self._settings.poll_interval

    # -- before a launch ---------------------------------------------------------------

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Validate; also ask for the model's limits, and whether the account may pay.

        The latter is known only if the data was uploaded before.
        """
        issues = list(config_issues(config, dataset))
        try:
            await wandb_fields(config, self._credentials)
        except (CredentialNotFound, VaultLocked) as error:
            issues.append(_issue("no_credential", error, "integrations.0.credential"))
        if not any(issue.severity == "error" for issue in issues):
            try:
                issues += await self._server_issues(config, dataset)
            except TrainingBackendError as error:
                issue = _issue("server_not_asked", error, None)
                issues.append(replace(issue, severity="warning"))
        return ValidationReport(issues=tuple(issues))

    async def _server_issues(self, config: TrainingConfig, dataset: Dataset) -> list[Issue]:
        try:
            limits = await self.api.limits(config.base_model)
        except (RunNotFound, ConfigError) as error:
            return [_issue("unknown_model", error, "model")]
        issues = list(limit_issues(config, limits))
        if issues:
            return issues
        price = await self._known_price(config, dataset)
        try:
            if price is not None:
                require_allowed(price)
        except BudgetExceeded as error:
            return [_issue("over_account_limit", error, None)]
        return []

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Count tokens here, and ask for the price if the data was uploaded before."""
        hyper = config.hyperparameters
        count = await anyio.to_thread.run_sync(
            partial(count_tokens, dataset, config.base_model, seq_len=hyper.seq_len)
        )
        notes = [*count.notes]
        if count.data_tokens is None:
            notes.append(f"Token count unknown: {count.reason}.")
        epochs = hyper.epochs or 1.0
        own = Estimate(
            train_tokens=None if count.data_tokens is None else round(count.data_tokens * epochs),
            data_tokens=count.data_tokens,
            epochs=epochs,
            basis=count.basis,
            interval=count.interval,
        )
        notes.append("Steps and duration unknown: they depend on Together.")
        try:
            price = await self._known_price(config, dataset)
        except TrainingBackendError as error:
            price = None
            notes.append(f"Could not ask Together for the price: {error.message}")
        if price is None:
            notes.append(
                "Cost unknown: Together prices uploaded files only. The launch uploads the data "
                "and asks for consent before it creates the job."
            )
            return own.model_copy(update={"notes": tuple(notes)})
        quote = price_estimate(price)
        return own.model_copy(
            update={
                "train_tokens": quote.train_tokens or own.train_tokens,
                "costs": quote.costs,
                "cost": quote.cost,
                "price_source": quote.price_source,
                "notes": (*notes, *quote.notes),
            }
        )

    async def _known_price(self, config: TrainingConfig, dataset: Dataset) -> JobPrice | None:
        """Return the price of a run whose files Together already has; else None."""
        sources = (*config.data.train[:1], *config.data.validation[:1])
        ids = [await self._known_file(source, dataset) for source in sources]
        if not ids or None in ids:
            return None
        train, validation = str(ids[0]), str(ids[1]) if ids[1:] else None
        body = make_body(config, training_file=train, validation_file=validation)
        return await self.api.price(body)

    async def _known_file(self, source: DataSource, dataset: Dataset) -> str | None:
        if source.remote_id is not None:
            return source.remote_id
        for file in dataset.files:
            if file.path == source.path and file.sha256 is not None:
                return await self.api.find_file(file_name(file.path, file.sha256), file.size)
        return None

    # -- runs --------------------------------------------------------------------------

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Upload the files, get the price and consent, and create the job.

        Raises:
            DatasetError: Together rejected a file.
            WaitTimeout: Together did not check a file in time; repeat to continue.
        """
        with self.errors_of(run):
            return await self._launch(run, journal)

    async def _launch(
        self, run: TrainingRun, journal: Journal, from_checkpoint: str | None = None
    ) -> RunState:
        launch = TogetherLaunch(
            api=self.api,
            settings=self._settings,
            credentials=self._credentials,
            run=run,
            journal=journal,
            from_checkpoint=from_checkpoint,
        )
        return await launch.launch()

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Fetch the job, then its events, metrics and checkpoints."""
        with self.errors_of(run):
            start = FineTunePosition.read(after)
            job = await self.api.job(self.job_id(run))
            quiet = to_status(job.status) in _QUIET
            events, metrics = await self._snapshot(job, start)
            log = FineTuneLog(
                events=events,
                metrics=metrics,
                checkpoints=() if quiet else await self.api.checkpoints(job.id),
            )
        records = tuple(log.records(start))
        cursor = records[-1].cursor if records else after
        return Observation(state_of(job, log), records, cursor)

    async def _snapshot(
        self, job: FineTune, start: FineTunePosition
    ) -> tuple[Sequence[FineTuneEvent], Sequence[Mapping[str, Any]]]:
        """Fetch events and metrics as they were at one moment, for the same order in each reading.

        An event that precedes new metrics may have been added between the two requests.
        """
        events = await self.api.events(job.id)
        status = to_status(job.status)
        if status in _QUIET:
            return events, ()
        for _ in range(_SNAPSHOT_ATTEMPTS):
            metrics = await self.api.metrics(job.id)
            if status.is_terminal or len(metrics) <= start.metrics:
                break
            before, events = events, await self.api.events(job.id)
            if len(before) == len(events):
                break
        return events, metrics

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Look up waiting and finished runs in the list of jobs; running ones have progressed."""
        jobs = {job.id: job for job in await self.api.jobs()}
        found = {}
        for run in runs:
            job = jobs.get(run.remote_id or "")
            if job is None or to_status(job.status) is not run.status:
                continue
            if run.status in _QUIET or run.status.is_terminal:
                found[run.id] = state_of(job).model_copy(update={"failure": run.failure})
        return found

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Cancel the job; whether Together keeps its last checkpoint is not documented."""
        del save_checkpoint
        with self.errors_of(run):
            job_id = self.job_id(run)
            await ensure(partial(self._is_ending, job_id), partial(self.api.cancel, job_id))

    async def _is_ending(self, job_id: str) -> bool:
        status = to_status((await self.api.job(job_id)).status)
        return status.is_terminal or status is TrainingStatus.STOPPING

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Create a job that continues from a checkpoint of a finished one.

        Args:
            checkpoint: A step, such as `120`.

        Raises:
            ConfigError: The run has no such checkpoint.
            UnsupportedOperation: The run is in progress or has no checkpoint.
        """
        with self.errors_of(new_run):
            if new_run.remote_id is not None:
                return await self._launch(new_run, journal)
            job = await self.api.job(self.job_id(run))
            if not to_status(job.status).is_terminal:
                raise self.unsupported("resume a run in progress", "Stop it, or wait for its end.")
            steps = [str(each.step) for each in await self.api.checkpoints(job.id)]
            if not steps:
                raise self.unsupported(
                    "resume a run without checkpoints", "Launch it again with a new id."
                )
            step = (checkpoint or steps[-1]).removeprefix("step-")
            if step not in steps:
                raise ConfigError(
                    f"Run {run.id} has no checkpoint {checkpoint!r}.",
                    hint=f"Choose one of: {', '.join(steps)}.",
                )
            return await self._launch(new_run, journal, f"{job.id}:{step}")

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List all jobs of the account."""
        found = []
        for job in await self.api.jobs():
            model, suffix = job.model or job.from_checkpoint or "unknown", job.suffix or ""
            if filters.status not in {None, to_status(job.status)}:
                continue
            if filters.model not in {None, model}:
                continue
            if filters.suffix not in {None, suffix, users_suffix(suffix)}:
                continue
            found.append(
                RemoteRun(
                    remote_id=job.id, model=model, state=state_of(job), created_at=job.created_at
                )
            )
        return found

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Download the adapter, or the model of full fine-tuning, as an archive in `target`."""
        with self.errors_of(run):
            job = await self.api.job(self.job_id(run))
            kind = "adapter" if saves_adapter(job.training_type) else "model_output_path"
            return await self.api.download(job.id, kind, target / f"{kind}.tar.zst")

    async def delete(self, run: TrainingRun) -> None:
        """Delete the job and its model at Together."""
        with self.errors_of(run):
            job = await self.api.job(self.job_id(run))
            with suppress(RunNotFound):  # deleted, and the response was lost
                await self.api.delete(job.id)

    async def health(self) -> Health:
        """Request the list of jobs."""

        async def probe() -> HttpClient:
            await self.api.jobs()
            return self.api.http

        return await server_health(probe, configured=False)

    async def aclose(self) -> None:
        """Close the connections."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.http.aclose()


def _issue(code: str, error: TrainingBackendError, field: str | None) -> Issue:
    return Issue(code=code, message=error.message, field=field, fix=error.hint)
