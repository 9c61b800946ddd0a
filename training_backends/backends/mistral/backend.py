"""The backend for servers of the Mistral fine-tuning protocol."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, Self, cast

import anyio.to_thread
from pydantic import BaseModel, SecretStr

from training_backends.backends.mistral.api import JobFilters, MistralAPI
from training_backends.backends.mistral.estimates import (
    count_epoch,
    estimate_from_count,
    sequence_length,
)
from training_backends.backends.mistral.job_log import LogReader
from training_backends.backends.mistral.job_request import config_of
from training_backends.backends.mistral.job_state import is_ending, moment, state_of
from training_backends.backends.mistral.launch import Launch
from training_backends.backends.mistral.list_status import FEW, StatusSweep
from training_backends.backends.mistral.settings import MistralOptions, MistralSettings
from training_backends.backends.mistral.validate import check_config, check_secrets, check_server
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    Health,
    Journal,
    JSONValue,
    RemoteFilters,
    RemoteRun,
    TrainingBackend,
)
from training_backends.core.capabilities import Capabilities, SuffixRule
from training_backends.core.config import Hyperparameters, TrainingConfig
from training_backends.core.data_rules import Level, ProviderFormat
from training_backends.core.dataset import Dataset
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.estimate import Estimate
from training_backends.core.persist import ensure
from training_backends.core.run import (
    Observation,
    Prompt,
    Reply,
    RunState,
    TrainingRun,
    ValidationReport,
)
from training_backends.core.settings import SectionSettings, load_settings
from training_backends.core.status import TrainingStatus
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.http.backend import server_health
from training_backends.http.client import HttpClient
from training_backends.http.download import new_directory
from training_backends.protocols.mistral.errors import error_from_answer
from training_backends.protocols.mistral.status import to_status, to_wire
from training_backends.protocols.mistral.wire import (
    MAX_SUFFIX,
    CompletionTrainingParametersIn,
    Job,
)
from training_backends.tokens import count_files
from training_backends.tokens.overlong import overlong_rows

__all__ = ["MistralAPIBackend"]

_BAD_ENDS: Final = frozenset({TrainingStatus.FAILED, TrainingStatus.CANCELLED})
_CAPABILITIES: Final = Capabilities(
    methods=frozenset({"sft", "classifier"}),
    hyperparameters=frozenset(
        {*Hyperparameters.model_fields} & {*CompletionTrainingParametersIn.model_fields}
    ),
    weights=True,
    validation_files=True,
    suffix=SuffixRule(max_length=MAX_SUFFIX),
    integrations=frozenset({"wandb"}),
    quotes=True,
    resumes="anew",
    lists_remote=True,
)


class MistralAPIBackend(TrainingBackend):
    """Trains on a server of the Mistral fine-tuning protocol.

    The hosted service has shut down fine-tuning; `training-backends serve` offers the same
    protocol on your own compute, and downloads of and chats with the trained models. The protocol
    has no resumable checkpoints: resuming a failed or cancelled run trains from the start on the
    files that are already uploaded.
    """

    name: ClassVar[str] = "mistral"
    summary: ClassVar[str] = "The Mistral fine-tuning protocol: your own server or the hosted one."
    options_model: ClassVar[type[BaseModel]] = MistralOptions
    settings_model: ClassVar[type[SectionSettings] | None] = MistralSettings

    def __init__(
        self, *, credentials: CredentialSource, settings: MistralSettings | None = None
    ) -> None:
        self._credentials = credentials
        self._settings = settings or load_settings(MistralSettings)
        self._opened: MistralAPI | None = None
        self._capabilities = _CAPABILITIES.model_copy(
            update={
                "provider_format": _provider_format(self._settings),
                # Operations of our gateway; other servers of the protocol have no more users.
                "downloads": not self._settings.is_hosted,
                "samples": not self._settings.is_hosted,
                "samples_chats": not self._settings.is_hosted,
            }
        )

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from the settings in section `mistral`."""
        settings = cast("MistralSettings | None", context.settings)
        return cls(credentials=context.credentials, settings=settings)

    @property
    def api(self) -> MistralAPI:
        """The client of the protocol, with one connection pool.

        Raises:
            ConfigError: The key would travel unencrypted to another host.
        """
        if self._opened is None:
            http = HttpClient(
                self._settings.base_url,
                key=self._key,
                decode_error=_decode_error,
                policy=self._settings.policy(),
                backend=self.name,
            )
            self._opened = MistralAPI(http)
        return self._opened

    async def _key(self) -> SecretStr:
        return await self._credentials.get("mistral", self._settings.profile)

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the protocol."""
        return self._capabilities

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Return the polling interval from the settings."""
        return self._settings.poll_interval

    def tolerated_bad_rows(self, config: TrainingConfig) -> float:
        """Return the fraction from the options; the server skips such rows."""
        return MistralOptions.model_validate(config.options).invalid_sample_skip_percentage

    def options_tolerating(self, fraction: float) -> dict[str, JSONValue]:
        """Return the option for the fraction."""
        return {"invalid_sample_skip_percentage": fraction}

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Validate; also ask the server whether it supports fine-tuning and the model.

        Raises:
            BackendRetired: The server has ended fine-tuning.
            ConfigError: The key would travel unencrypted to another host.
        """
        issues = check_config(config)
        issues += await check_secrets(config, self._credentials)
        overlong = partial(
            overlong_rows,
            dataset,
            config.base_model,
            sequence_length(config),
            fix="shorten them, or set seq_len; how the server handles longer rows is unknown",
        )
        if issue := await anyio.to_thread.run_sync(overlong):
            issues.append(issue)
        if not any(issue.severity == "error" for issue in issues):
            issues += await check_server(config, self.api, hosted=self._settings.is_hosted)
        return ValidationReport(issues=tuple(issues))

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Estimate from the data; the server's own quote follows during the launch."""
        count = partial(count_files, dataset, config.base_model, seq_len=sequence_length(config))
        once, epoch = count_epoch(dataset, await anyio.to_thread.run_sync(count))
        return estimate_from_count(config, once, epoch, hosted=self._settings.is_hosted)

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Upload the files, create the job, wait for the quote and start the job.

        Raises:
            WaitTimeout: The server did not check the data in time; repeat to continue.
        """
        with self.errors_of(run):
            return await self._launch(run, journal).launch()

    def _launch(self, run: TrainingRun, journal: Journal) -> Launch:
        return Launch(
            api=self.api,
            settings=self._settings,
            credentials=self._credentials,
            run=run,
            journal=journal,
        )

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """Look up many runs in lists by status, a hundred jobs per request."""
        if len(runs) <= FEW:
            return await super().statuses([run for run in runs if run.remote_id is not None])
        sweep = StatusSweep(self.api, runs)
        await sweep.run()
        return sweep.found

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Retrieve state and log with one request."""
        with self.errors_of(run):
            reader = LogReader.after(after)
            job = await self.api.get_job(self.job_id(run))
        records = tuple(reader.read(job))
        return Observation(self._state(job, run), records, reader.cursor)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Cancel the job; the protocol saves no checkpoint."""
        del save_checkpoint
        with self.errors_of(run):
            job_id = self.job_id(run)

            async def ending() -> bool:
                return is_ending(await self.api.get_job(job_id))

            await ensure(ending, partial(self.api.cancel_job, job_id))

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Start an unstarted job, or train again on the files of a failed or cancelled one.

        Raises:
            UnsupportedOperation: The run is in progress or completed.
        """
        del checkpoint
        with self.errors_of(new_run):
            launch = self._launch(new_run, journal)
            if new_run.remote_id is not None:
                launch.anew = new_run.remote_id != run.remote_id
                return await launch.launch()
            job = await self._old_job(run)
            status = run.status if job is None else to_status(job.status)
            if job is not None and status is TrainingStatus.READY:
                await journal.record(self._state(job))
                return await launch.start(job.id)
            if status not in _BAD_ENDS:
                raise self.unsupported(
                    f"resume a run that is {status}",
                    "Only failed and cancelled runs can be resumed.",
                )
            launch.anew = True
            launch.reuse = job if new_run.config.data == run.config.data else None
            return await launch.launch()

    async def _old_job(self, run: TrainingRun) -> Job | None:
        """Return the job of a run; None if a failed or cancelled run has none."""
        try:
            return await self.api.get_job(self.job_id(run))
        except RunNotFound:
            if run.status not in _BAD_ENDS:
                raise
            return None

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List all jobs on the server.

        `config` has what the server reports: data files are named `remote:<file id>`, and fields
        that the protocol does not report are omitted; None if that is not a valid configuration.
        Jobs that do not match the protocol are skipped.
        """
        wanted = filters.status
        # FAILED maps to two protocol statuses and UNKNOWN to any: filtered here.
        word = to_wire(wanted) if wanted and wanted is not TrainingStatus.FAILED else None
        asked = JobFilters(model=filters.model, suffix=filters.suffix, status=word)
        async with aclosing(self.api.iter_listed(asked)) as jobs:
            return [
                self._remote_run(job)
                async for _, job in jobs
                if job is not None and (wanted is None or to_status(job.status) is wanted)
            ]

    def _remote_run(self, job: Job) -> RemoteRun:
        return RemoteRun(
            remote_id=job.id,
            model=job.model,
            state=self._state(job),
            created_at=moment(job.created_at),
            config=config_of(job),
        )

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Download the weights, if the server is our gateway.

        Raises:
            UnsupportedOperation: It is another server, or does not have the weights.
        """
        with self._served(run, "download the trained model") as model:
            async with new_directory(target) as directory:
                await self.api.download_weights(model, directory)
        return target

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Ask the model on the server, if that is our gateway.

        Raises:
            UnsupportedOperation: It is another server, or the model cannot answer there.
        """
        with self._served(run, "ask the trained model") as model:
            return Reply(answer=await self.api.chat(model, prompt, max_tokens=max_tokens))

    @contextmanager
    def _served(self, run: TrainingRun, what: str) -> Iterator[str]:
        """Yield the model of a run, for an operation that not every server has."""
        model = run.result_model
        if self._settings.is_hosted or model is None:
            name = model or "the fine-tuned model"
            raise self.unsupported(
                what,
                f"The hosted service keeps the weights; use {name} there. Our gateway serves "
                "downloads and chats: set mistral.base_url to its address.",
            )
        with self.errors_of(run):
            try:
                yield model
            except RunNotFound as error:
                raise self.unsupported(what, f"The server says: {error.message}") from None

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

    def _state(self, job: Job, run: TrainingRun | None = None) -> RunState:
        state = state_of(job, hosted=self._settings.is_hosted)
        quoted = run and run.estimate and run.estimate.basis == "quote"
        return state.model_copy(update={"estimate": None}) if quoted else state


def _provider_format(settings: MistralSettings) -> ProviderFormat:
    """Return the provider format with this server's limits."""
    # The hosted service limits validation data; other servers may not.
    milder: dict[str, Level] = {} if settings.is_hosted else {"validation_too_large": "warning"}
    levels = {**MISTRAL.levels, **milder}
    return replace(MISTRAL, max_file_bytes=settings.max_file_bytes, levels=levels)


def _decode_error(status: int, headers: Mapping[str, str], body: bytes) -> TrainingBackendError:
    return error_from_answer(status, headers, body, backend=MistralAPIBackend.name)
