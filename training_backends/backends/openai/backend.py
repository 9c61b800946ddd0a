"""The backend for servers of the OpenAI fine-tuning protocol."""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Final, Literal, Self, cast

import anyio.to_thread
from pydantic import BaseModel, SecretStr

from training_backends.backends.openai.api import OpenAIAPI, read_job
from training_backends.backends.openai.job_request import (
    HYPERPARAMETERS,
    RUN_KEY,
    config_of,
    issues_of,
)
from training_backends.backends.openai.job_state import JobLog, Position, moment, state_of
from training_backends.backends.openai.launch import OpenAILaunch
from training_backends.backends.openai.settings import (
    CLOCK_SLACK,
    OpenAIOptions,
    OpenAISettings,
    Variant,
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
from training_backends.core.concurrency import run_all
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.estimate import CostItem, Estimate, PriceSource
from training_backends.core.persist import ensure
from training_backends.core.run import (
    LogRecord,
    Observation,
    RunState,
    TrainingRun,
    ValidationReport,
    utc_now,
)
from training_backends.core.settings import SectionSettings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.datasets.provider_formats import OPENAI
from training_backends.http.backend import server_health
from training_backends.http.client import HttpClient
from training_backends.http.download import new_directory, within
from training_backends.protocols.openai.errors import error_from_answer
from training_backends.protocols.openai.requests import MAX_SUFFIX, MAX_SUFFIX_AZURE
from training_backends.protocols.openai.results import read_results
from training_backends.protocols.openai.status import to_status
from training_backends.protocols.openai.wire import FineTuningJob, FineTuningJobEvent
from training_backends.tokens import count_tokens
from training_backends.tokens.counts import SAMPLE_NOTE

__all__ = ["OpenAIBackend"]

_SUFFIXES: Mapping[Variant, SuffixRule] = MappingProxyType(
    {
        "openai": SuffixRule(max_length=MAX_SUFFIX),
        "azure": SuffixRule(
            max_length=MAX_SUFFIX_AZURE, alphabet=f"{string.ascii_letters}{string.digits}-_"
        ),
        "nebius": SuffixRule(max_length=MAX_SUFFIX),
    }
)
"""Nebius documents no limit."""
_FEW: Final = 3
"""Up to this many runs are requested one by one."""


class OpenAIBackend(TrainingBackend):
    """Trains on a server of the OpenAI fine-tuning protocol.

    OpenAI's own service accepts no new jobs from 2027-01-06 on; Azure, Nebius and
    `training-backends serve` speak the same protocol.
    """

    name: ClassVar[str] = "openai"
    summary: ClassVar[str] = "The OpenAI fine-tuning protocol: OpenAI, Azure, Nebius or your own."
    options_model: ClassVar[type[BaseModel]] = OpenAIOptions
    settings_model: ClassVar[type[SectionSettings] | None] = OpenAISettings

    def __init__(
        self, *, credentials: CredentialSource, settings: OpenAISettings | None = None
    ) -> None:
        self._credentials = credentials
        self._settings = settings or load_settings(OpenAISettings)
        self._opened: OpenAIAPI | None = None
        self._capabilities = _capabilities(self._settings)

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from the settings in section `openai`."""
        settings = cast("OpenAISettings | None", context.settings)
        return cls(credentials=context.credentials, settings=settings)

    @property
    def api(self) -> OpenAIAPI:
        """The client of the protocol, with one connection pool.

        Raises:
            ConfigError: The key would travel unencrypted to another host.
        """
        if self._opened is None:
            http = HttpClient(
                self._settings.base_url,
                key=self._key,
                key_header=self._settings.header,
                query=tuple(self._settings.query.items()),
                decode_error=_decode_error,
                policy=self._settings.policy(),
                backend=self.name,
            )
            self._opened = OpenAIAPI(http)
        return self._opened

    async def _key(self) -> SecretStr:
        return await self._credentials.get("openai", self._settings.profile)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the protocol's variant."""
        return self._capabilities

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Return the polling interval from the settings."""
        return self._settings.poll_interval

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Validate options and values; the server checks the data after the job is created."""
        del dataset
        return ValidationReport(issues=tuple(issues_of(config, self._settings)))

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Count the tokens; the cost is known if the settings have a price for the model."""
        count = await anyio.to_thread.run_sync(partial(count_tokens, dataset, config.base_model))
        epochs, batch = config.hyperparameters.epochs, config.hyperparameters.batch_size
        notes = [*count.notes, *([SAMPLE_NOTE] if count.basis == "sampled" else [])]
        trained = steps = None
        if count.data_tokens is None:
            notes.append(f"Token count unknown: {count.reason}.")
        elif epochs is None:
            notes.append("Trained tokens unknown: the server chooses the number of epochs.")
        else:
            trained = math.ceil(count.data_tokens * epochs)
        if epochs is None or batch is None:
            notes.append("Steps unknown: the server chooses epochs or batch size.")
        else:
            steps = math.ceil(sum(file.rows for file in dataset.train) / batch * epochs)
        cost = self._settings.cost(config.base_model, trained)
        costs: tuple[CostItem, ...] = ()
        if cost is not None:
            source = PriceSource(name="setting openai.prices", as_of=utc_now().date())
            costs = (CostItem(name="training", amount=cost, source=source),)
        elif trained is None:
            notes.append("Cost unknown, because trained tokens are unknown.")
        else:
            notes.append(
                "Cost unknown: the protocol has no quote, and the setting `openai.prices` has no "
                f"price for {config.base_model}."
            )
        notes.append("Duration unknown: the server does not report it in advance.")
        return Estimate(
            train_tokens=trained,
            data_tokens=count.data_tokens,
            steps=steps,
            epochs=epochs,
            costs=costs,
            basis=count.basis,
            interval=count.interval,
            notes=tuple(notes),
        )

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Upload the files and create the job, which starts by itself."""
        launch = OpenAILaunch(api=self.api, settings=self._settings, run=run, journal=journal)
        return await launch.launch()

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Retrieve the job, its new events and, if there is news, its checkpoints."""
        log = JobLog(Position.read(after), started_at=run.started_at)
        job = await self.api.get_job(self.job_id(run))
        records = list(log.records(await self._new_events(job.id, log.position)))
        if job.status == "succeeded" and job.result_files and not log.position.has_metrics:
            records += await self._result_records(job, log)
        has_news = records or to_status(job.status).is_terminal
        checkpoints = await self.api.checkpoints(job.id) if has_news else []
        state = log.add_to(state_of(job, checkpoints))
        cost = self._settings.cost(run.config.base_model, job.trained_tokens)
        state = state.model_copy(update={"cost": cost})
        cursor = str(log.position) if records else after
        return Observation(state, tuple(records), cursor)

    async def _new_events(self, job_id: str, position: Position) -> list[FineTuningJobEvent]:
        """Return the events after a position, oldest first."""
        found: list[FineTuningJobEvent] = []
        async with aclosing(self.api.events(job_id)) as events:
            async for event in events:
                if not position.is_before(event):
                    break
                found.append(event)
        return found[::-1]

    async def _result_records(self, job: FineTuningJob, log: JobLog) -> list[LogRecord]:
        """Return the metrics of the result file, for servers whose events have none."""
        try:
            rows = read_results(await self.api.read_file(job.result_files[0]))
        except (TrainingBackendError, RunNotFound):
            return []  # the file may have been deleted; the state does not depend on it
        return list(log.results(rows, moment(job.finished_at or job.created_at)))

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Look up many runs in the job list, a hundred jobs per request."""
        wanted = {run.remote_id: run for run in runs if run.remote_id is not None}
        found: dict[str, RunState] = {}

        def meet(job: FineTuningJob, run: TrainingRun) -> None:
            state = RunState(status=to_status(job.status), raw_status=job.status, remote_id=job.id)
            if not state.status.is_terminal or state.status is run.status:
                found[run.id] = state  # otherwise the client asks for the result

        async def ask(job_id: str, run: TrainingRun) -> None:
            try:
                meet(await self.api.get_job(job_id), run)
            except RunNotFound:
                return

        if len(wanted) <= _FEW:
            await run_all((partial(ask, *each) for each in wanted.items()), at_once=_FEW)
            return found
        earliest = (min(run.created_at for run in runs) - CLOCK_SLACK).timestamp()
        async with aclosing(self.api.jobs()) as entries:
            async for entry in entries:
                job = read_job(entry) if entry.get("id") in wanted else None
                if job is not None:
                    meet(job, wanted.pop(job.id))
                created = entry.get("created_at")
                if not wanted or (isinstance(created, int | float) and created < earliest):
                    break
        return found

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Cancel the job; the protocol saves no checkpoint."""
        del save_checkpoint
        await self._act(run, "cancel", lambda status: status.is_terminal)

    async def pause(self, run: TrainingRun) -> None:
        """Pause a running job; it may take minutes."""
        paused = {TrainingStatus.PAUSED, TrainingStatus.STOPPING}
        await self._act(run, "pause", lambda status: status in paused or status.is_terminal)

    async def unpause(self, run: TrainingRun) -> None:
        """Let a paused job continue."""
        await self._act(run, "resume", lambda status: status is not TrainingStatus.PAUSED)

    async def _act(
        self,
        run: TrainingRun,
        action: Literal["cancel", "pause", "resume"],
        reached: Callable[[TrainingStatus], bool],
    ) -> None:
        """Request a change of the job's status, unless it is reached."""
        if action != "cancel" and not self._capabilities.pauses:
            raise self.unsupported("pause runs")
        job_id = self.job_id(run)

        async def has_reached() -> bool:
            return reached(to_status((await self.api.get_job(job_id)).status))

        async def act() -> None:
            try:
                await self.api.act(job_id, action)
            except RunNotFound as error:
                # The job exists, as just seen, but not the operation.
                raise self.unsupported(f"{action} a job on this server") from error

        await ensure(has_reached, act)

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List all jobs; those that do not match the protocol are skipped."""
        found: list[RemoteRun] = []
        async with aclosing(self.api.jobs()) as entries:
            async for entry in entries:
                job = read_job(entry)
                if job is not None and _passes(job, filters):
                    found.append(_remote_run(job))
        return found

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Download the files of the newest checkpoint to the directory `target` (Nebius)."""
        if not self._capabilities.downloads:
            raise self.unsupported("download the trained model", "The provider keeps the weights.")
        checkpoints = await self.api.checkpoints(self.job_id(run))
        newest = max(
            (point for point in checkpoints if point.result_files),
            key=lambda point: point.step_number,
            default=None,
        )
        if newest is None:
            raise self.unsupported("download a model whose checkpoints have no files")
        async with new_directory(target) as directory:
            for file_id in newest.result_files:
                name = (await self.api.get_file(file_id)).filename
                await self.api.download_file(file_id, within(directory, name))
        return target

    async def health(self) -> Health:
        """Request one job from the list."""

        async def probe() -> HttpClient:
            await self.api.probe()
            return self.api.http

        # The default server without a key: not configured.
        chosen = not self._settings.is_hosted or self._settings.profile is not None
        return await server_health(probe, configured=chosen)

    async def aclose(self) -> None:
        """Close the connections."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened.http.aclose()


def _capabilities(settings: OpenAISettings) -> Capabilities:
    """Return the capabilities of the protocol's variant, with this server's limits."""
    variant = settings.variant or "openai"
    is_nebius = variant == "nebius"
    return Capabilities(
        methods=frozenset({"sft"} if is_nebius else {"sft", "dpo"}),
        tunings=frozenset({"full", "lora"} if is_nebius else ()),
        hyperparameters=frozenset({*HYPERPARAMETERS[variant], "seed"}),
        data=frozenset({"file", "remote"}),
        max_train_files=1,
        validation_files=True,
        suffix=_SUFFIXES[variant],
        # OpenAI has the key, from its dashboard. Nebius takes it in the job, in a form that its
        # reference does not show; Azure documents no integration.
        integrations=frozenset({"wandb"} if variant == "openai" else ()),
        integration_fields=frozenset({"project", "name", "run_name", "entity", "tags"}),
        pauses=not is_nebius,
        resumes="anew",
        downloads=is_nebius,
        lists_remote=True,
        provider_format=replace(OPENAI, max_file_bytes=settings.max_file_bytes),
    )


def _passes(job: FineTuningJob, filters: RemoteFilters) -> bool:
    return (
        filters.status in {None, to_status(job.status)}
        and (filters.model is None or job.model.startswith(filters.model))
        and filters.suffix in {None, job.user_provided_suffix or job.suffix}
    )


def _remote_run(job: FineTuningJob) -> RemoteRun:
    return RemoteRun(
        remote_id=job.id,
        model=job.model,
        state=state_of(job),
        created_at=moment(job.created_at),
        run_id=(job.metadata or {}).get(RUN_KEY),
        config=config_of(job),
    )


def _decode_error(status: int, headers: Mapping[str, str], body: bytes) -> TrainingBackendError:
    return error_from_answer(status, headers, body, backend=OpenAIBackend.name)
