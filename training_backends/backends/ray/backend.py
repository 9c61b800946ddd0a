"""Train on a Ray cluster, which need not have this package installed.

A run is a directory on storage that the cluster and its clients share, as that of a local run, and
a Ray job with the run's id that trains it. The directory is the truth: it outlives the job, the
cluster's head and the client. Ray is asked only whether the job still lives.
"""

import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Final, Self, cast

from anyio import to_thread
from pydantic import BaseModel, SecretStr

from training_backends.backends.local.backend import LocalBackend, require_same
from training_backends.backends.local.checkpoint_copy import (
    reporting_disk,
    require_ended,
    require_space,
)
from training_backends.backends.local.process import Hub
from training_backends.backends.local.spec import resolved_values
from training_backends.backends.local.state import START_PATIENCE, read_ending
from training_backends.backends.ray.api import ERRORS, RayAPI, RayJob
from training_backends.backends.ray.objects import ObjectStorage
from training_backends.backends.ray.package import package_zip
from training_backends.backends.ray.resources import Workers, resource_issues
from training_backends.backends.ray.settings import RayOptions, RaySettings
from training_backends.core.backend import (
    BackendContext,
    CredentialSource,
    Health,
    Journal,
    JSONValue,
    RemoteFilters,
    RemoteRun,
)
from training_backends.core.capabilities import Capabilities
from training_backends.core.config import TINY_MODEL, DataSource, TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import (
    CredentialNotFound,
    DuplicateRun,
    Issue,
    TrainingBackendError,
)
from training_backends.core.files import make_private_directory, write_atomic
from training_backends.core.integrations import INTEGRATION_FIELDS
from training_backends.core.run import (
    Failure,
    Place,
    Prompt,
    Reply,
    RunState,
    TrainingRun,
    ValidationReport,
)
from training_backends.core.settings import SectionSettings, load_settings
from training_backends.http.backend import server_health
from training_backends.http.client import HttpClient
from training_backends.http.urls import is_loopback
from training_backends.objects.settings import ObjectSettings
from training_backends.objects.store import is_object_url, scheme_of
from training_backends.rundir.directory import ExitRecord, RunDir, RunSpec, TrainerExitCode

__all__ = ["RayBackend"]

_RUN: Final = "training_backends.created_at"
"""Key of a job's metadata: when its run was created, which tells it from an earlier one."""
_STOP_PATIENCE: Final = "600"
"""Seconds for a checkpoint before Ray kills a stopped job; its default of 3 would lose it."""
_FEW: Final = 3
"""Runs up to which each is asked for by itself; a list has all jobs of the cluster."""
_TAIL: Final = 2000
"""Characters of a driver's output in the message of a failure."""


class RayBackend(LocalBackend):
    """Fine-tuning on a Ray cluster, through its Jobs API; needs no Ray on this machine.

    Args:
        home: State of this program; contains the storage unless the settings name one.
    """

    name: ClassVar[str] = "ray"
    summary: ClassVar[str] = "Trains on a Ray cluster, on one node or many."
    options_model: ClassVar[type[BaseModel]] = RayOptions
    settings_model: ClassVar[type[SectionSettings] | None] = RaySettings

    def __init__(
        self,
        home: Path,
        *,
        credentials: CredentialSource,
        settings: RaySettings | None = None,
    ) -> None:
        self._settings = settings or load_settings(RaySettings)
        storage = self._settings.storage
        self._objects = None
        if storage is not None and is_object_url(storage):
            options = load_settings(ObjectSettings).options.get(scheme_of(storage))
            self._objects = ObjectStorage(storage, home / "ray-objects", options)
            place = self._objects.home
        else:
            place = Path(storage) if storage else home / "ray"
        super().__init__(place, hub=Hub(None, credentials))
        self._slots = None  # Ray has a queue of its own
        self._credentials = credentials
        self._api: RayAPI | None = None
        self._jobs: dict[str, RayJob | None] = {}

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend from the settings in section `ray`."""
        settings = cast("RaySettings | None", context.settings)
        return cls(context.home, credentials=context.credentials, settings=settings)

    async def api(self) -> RayAPI:
        """Return the client, with one connection pool; a cluster may need no token."""
        if self._api is None:
            try:
                await self._key()
                key = self._key
            except CredentialNotFound:
                key = None
            http = HttpClient(
                self._settings.base_url,
                key=key,
                decode_error=ERRORS,
                policy=self._settings.policy(),
                backend=self.name,
            )
            self._api = RayAPI(http)
        return self._api

    async def _key(self) -> SecretStr:
        return await self._credentials.get("ray", self._settings.profile)

    async def aclose(self) -> None:
        """Close the connection pool."""
        if self._api is not None:
            await self._api.http.aclose()

    @property
    def capabilities(self) -> Capabilities:
        """What this backend supports: that of the local one, on chosen resources."""
        return super().capabilities.model_copy(
            update={
                "resources": frozenset({"workers", "cpus", "gpus", "accelerator"}),
                # The cluster's environment has the keys: a job's data is shown to all of its users.
                "integration_fields": INTEGRATION_FIELDS - {"credential"},
            }
        )

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Return the polling interval from the settings."""
        chosen = self._settings
        return timedelta(seconds=chosen.poll_min), timedelta(seconds=chosen.longest_poll)

    # -- before a launch ---------------------------------------------------------------

    async def _require_trainer(self) -> None:
        """The libraries are the cluster's."""

    @property
    def _checked_interpreter(self) -> None:
        return None

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Validate; also ask the cluster whether it can have the workers."""
        report = await super().validate(config, dataset)
        issues = [*report.issues, *_worker_issues(config), *self._storage_issues(config)]
        if self._objects and (issue := await to_thread.run_sync(self._objects.issue)):
            issues.append(issue)
        if not any(issue.severity == "error" for issue in issues):
            try:
                nodes = await (await self.api()).nodes()
                scales = self._settings.autoscaling
                issues += resource_issues(config.resources, nodes, autoscaling=scales)
            except TrainingBackendError as error:
                message = f"the cluster was not asked: {error.message}"
                issues.append(Issue(code="server_not_asked", message=message, severity="warning"))
        return ValidationReport(issues=tuple(issues))

    def _storage_issues(self, config: TrainingConfig) -> list[Issue]:
        issues = []
        if self._settings.storage is None and not is_loopback(self._settings.base_url):
            issues.append(
                Issue(
                    code="no_shared_storage",
                    message=f"the cluster at {self._settings.base_url} does not share the "
                    f"directory {self._home}",
                    fix="set ray.storage to a directory that this machine and all nodes share",
                )
            )
        model = Path(config.base_model).expanduser()
        if config.base_model != TINY_MODEL and model.is_dir() and not self._is_shared(model):
            storage, fix = f"the shared storage, {self._home}", "copy it there, unless all nodes"
            if self._objects:
                storage, fix = "the Hub", "check that all nodes"
            issues.append(
                Issue(
                    code="not_shared",
                    message=f"{model} is not on {storage}",
                    field="model",
                    fix=f"{fix} have it under this path",
                    severity="warning",
                )
            )
        return issues

    def _is_shared(self, path: Path) -> bool:
        return not self._objects and path.resolve().is_relative_to(self._home.resolve())

    # -- launch ------------------------------------------------------------------------

    async def _begin(self, run: TrainingRun, directory: RunDir, spec: RunSpec) -> JSONValue:
        """Write the run directory and submit the job."""
        api = await self.api()
        workers = Workers.of(run.config.resources, await api.nodes())
        spec = spec.model_copy(update={"num_processes": workers.number})
        write = self._objects.create if self._objects else self._write
        await to_thread.run_sync(write, run, directory, spec)
        body = {
            "entrypoint": self._entrypoint(directory, workers, run.config),
            "submission_id": run.id,
            "metadata": {_RUN: _created(run)},
            "runtime_env": await self._runtime_env(api),
            "entrypoint_num_cpus": 0,
        }
        await api.submit(body)
        return {"submission_id": run.id}

    def _write(self, run: TrainingRun, directory: RunDir, spec: RunSpec) -> None:
        with reporting_disk(run):
            require_space(directory.path.parent)
            names = ("train", "validation")
            shared = {
                name: tuple(
                    self._shared(source, directory.path / "data" / f"{name}-{number}")
                    for number, source in enumerate(getattr(spec, name))
                )
                for name in names
            }
            spec = spec.model_copy(update=shared)
            if directory.spec.is_file():
                require_same(directory, spec, run)
            directory.write_spec(spec)

    def _shared(self, source: DataSource, target: Path) -> DataSource:
        """Copy a file to the storage unless it is there."""
        if source.path is None or self._is_shared(source.path):
            return source
        # The name's end tells whether the file is compressed.
        target = target.with_name(target.name + "".join(source.path.suffixes))
        if not target.is_file():
            _copy(source.path, target)
        return source.model_copy(update={"path": target})

    def _entrypoint(self, directory: RunDir, workers: Workers, config: TrainingConfig) -> str:
        options, scratch = RayOptions.model_validate(config.options), self._settings.scratch
        words = [
            *(self._settings.python, "-m", "training_backends.trainer", "ray"),
            self._objects.url_of(directory.path.name) if self._objects else str(directory.path),
            *("--cpus", f"{workers.cpus:g}"),
            *("--gpus", str(workers.gpus)),
            *("--max-failures", str(options.max_failures)),
            *(("--accelerator", workers.accelerator) if workers.accelerator else ()),
            *(("--scratch", str(scratch)) if self._objects and scratch else ()),
        ]
        return shlex.join(words)

    async def _runtime_env(self, api: RayAPI) -> dict[str, JSONValue]:
        # These variables are shown to every user of the cluster: no secrets here.
        env: dict[str, JSONValue] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_PATIENCE}}
        if self._settings.package == "send":
            name, content = await to_thread.run_sync(package_zip)
            if not await api.has_package(name):
                await api.put_package(name, content)
            env["working_dir"] = f"gcs://{name}"
        return env

    async def _find_begun(self, run: TrainingRun, directory: RunDir) -> JSONValue:
        del directory
        job = await (await self.api()).job(run.id)
        if job is None:
            return None
        if (job.metadata or {}).get(_RUN) != _created(run):
            raise DuplicateRun(
                f"The cluster has another job {run.id}.",
                other=run.id,
                hint="Choose another id, or delete the job.",
                backend=self.name,
                run_id=run.id,
            )
        return {"submission_id": run.id}

    # -- afterwards --------------------------------------------------------------------

    def _make_place(self) -> Place:
        return self._objects.place if self._objects else super()._make_place()

    def _known_place(self) -> Place | None:
        return self._objects.place if self._objects else super()._known_place()

    def sees(self, run: TrainingRun) -> bool:
        """Return whether the run is on this storage."""
        if self._objects is None:
            return super().sees(run)
        return run.place is None or run.place.id == self._objects.place.id

    def _here(self, state: RunState) -> RunState:
        state = super()._here(state)
        return self._objects.shown(state) if self._objects else state

    def _opened(self, path: Path) -> RunDir:
        job = self._jobs.get(path.name)
        # A job that was not asked for may live.
        return _JobDir(path, is_active=path.name not in self._jobs or _lives(job))

    async def _revive(self, runs: Sequence[TrainingRun]) -> None:
        """Ask Ray which jobs live, and record the end of those that could not.

        Asked before the copies are updated: what a job that has ended wrote is there then.
        """
        api = await self.api()
        if len(runs) <= _FEW:
            for run in runs:
                self._jobs[run.id] = await api.job(run.id)
        else:
            found = {job.submission_id: job for job in await api.jobs()}
            self._jobs.update((run.id, found.get(run.id)) for run in runs)
        if self._objects:
            await self._objects.update([self._directory(run) for run in runs])
        for run in runs:
            directory = self._directory(run)
            if await to_thread.run_sync(_is_cut_off, directory, self._jobs[run.id]):
                await self._record_end(api, directory, self._jobs[run.id])

    async def _record_end(self, api: RayAPI, directory: RunDir, job: RayJob | None) -> None:
        reason = "the cluster no longer has the job: its head was restarted"
        if job is not None:
            reason = f"{job.message or job.status}"
            output = (await api.logs(directory.path.name))[-_TAIL:].strip()
            reason += f"\n{output}" if output else ""
        failure = Failure(kind="lost", message=f"The job has ended: {reason}", retryable=True)
        record = _ending(directory, failure, job.ended_at if job else None)
        write = self._objects.write_end if self._objects else _write_end
        await to_thread.run_sync(write, directory, record)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """See `TrainingBackend.stop`."""
        await self._revive([run])
        await super().stop(run, save_checkpoint=save_checkpoint)
        job = self._jobs[run.id]
        if self._objects and _lives(job):
            await to_thread.run_sync(self._objects.request_stop, run, save_checkpoint)
        # A running job finds the request in its directory; a waiting one does not read it.
        if job is not None and job.status == "PENDING":
            await (await self.api()).stop(run.id)

    async def suspend(self) -> int:
        """Suspend nothing: the cluster outlives this process."""
        return 0

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """See `LocalBackend.resume`."""
        await self._revive([run])
        return await super().resume(run, new_run, journal, checkpoint=checkpoint)

    def _copy_checkpoint(
        self, run: TrainingRun, source: RunDir, target: RunDir, requested: str | None
    ) -> int:
        if self._objects is None:
            return super()._copy_checkpoint(run, source, target, requested)
        require_ended(run, source)
        return self._objects.copy_checkpoint(run, target.path.name, requested)

    async def delete(self, run: TrainingRun) -> None:
        """Remove the run directory of a finished run; Ray keeps its record of the job."""
        await self._revive([run])
        await super().delete(run)

    def _delete(self, run: TrainingRun) -> None:
        directory = self._existing(run)
        if self._objects and read_ending(directory):
            self._objects.remove(directory)
        else:
            super()._delete(run)

    def _download(self, run: TrainingRun, target: Path) -> Path:
        self._fetch_result(run, "download")
        return super()._download(run, target)

    def _fetch_result(self, run: TrainingRun, verb: str) -> None:
        directory = self._existing(run)
        self._result(directory, verb)
        if self._objects:
            self._objects.fetch_result(directory)

    async def download_checkpoint(self, run: TrainingRun, checkpoint: str, target: Path) -> Path:
        """Write a checkpoint as a model, on this machine."""
        await to_thread.run_sync(self.interpreter.require)
        if self._objects:
            directory = await to_thread.run_sync(self._existing, run)
            await to_thread.run_sync(self._objects.fetch_checkpoint, run, directory, checkpoint)
        return await super().download_checkpoint(run, checkpoint, target)

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Generate an answer on this machine, with the result of the storage."""
        await to_thread.run_sync(self.interpreter.require)
        await to_thread.run_sync(self._fetch_result, run, "prompt")
        return await super().sample(run, prompt, max_tokens=max_tokens)

    async def list_remote(self, filters: RemoteFilters) -> Sequence[RemoteRun]:
        """List the runs that have a directory on the storage."""
        jobs = await (await self.api()).jobs()
        self._jobs.update((job.submission_id, job) for job in jobs if job.submission_id)
        if self._objects is None:
            return await super().list_remote(filters)
        await self._objects.update_all(self._runs)
        found = await super().list_remote(filters)
        return [
            each.model_copy(update={"state": self._objects.shown(each.state)}) for each in found
        ]

    async def health(self) -> Health:
        """Report whether the cluster answers, if there is one to ask."""
        given = self._settings.model_fields_set & {"base_url", "storage"}
        if not given and not self._runs.is_dir():
            hint = "Set ray.base_url and ray.storage."
            return Health(ok=False, message="not set up (optional)", hint=hint, configured=False)

        async def probe() -> HttpClient:
            api = await self.api()
            await api.nodes()  # the version needs no token
            if self._objects:
                await to_thread.run_sync(self._objects.check)
            return api.http

        return await server_health(probe, configured=True)


def _worker_issues(config: TrainingConfig) -> Iterator[Issue]:
    batch_size = resolved_values(config)["batch_size"]
    if (config.resources.workers or 1) > batch_size:
        yield Issue(
            code="unsupported_field",
            message=f"more workers than the {batch_size:g} rows of a batch",
            field="resources.workers",
            fix=f"use {batch_size:g} or less, or a larger hyperparameters.batch_size",
        )


class _JobDir(RunDir):
    """The directory of a run whose liveness Ray knows."""

    def __init__(self, path: Path, *, is_active: bool) -> None:
        super().__init__(path)
        self._is_active = is_active

    def is_active(self) -> bool:
        """Return whether the job has not ended."""
        return self._is_active

    def signal_process(self, number: int) -> bool:
        """Return False: the process is on another machine."""
        del number
        return False


def _copy(source: Path, target: Path) -> None:
    make_private_directory(target.parent)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _lives(job: RayJob | None) -> bool:
    return job is not None and not job.has_ended


def _created(run: TrainingRun) -> str:
    return run.created_at.isoformat()


def _is_cut_off(directory: RunDir, job: RayJob | None) -> bool:
    """Return whether a job has ended without recording how."""
    if not directory.spec.is_file() or directory.exit.is_file():
        return False
    if job is None:  # it may not have been submitted yet
        return time.time() - directory.spec.stat().st_mtime > START_PATIENCE
    return job.has_ended


def _ending(directory: RunDir, failure: Failure, at: datetime | None) -> ExitRecord:
    if directory.stop.exists():
        record = ExitRecord(status="stopped", code=TrainerExitCode.STOPPED)
    else:
        record = ExitRecord(status="failed", code=TrainerExitCode.CRASHED, failure=failure)
    return record if at is None else record.model_copy(update={"at": at})


def _write_end(directory: RunDir, record: ExitRecord) -> None:
    step = max((state.step for _, state in directory.read_checkpoints()), default=0)
    record = record.model_copy(update={"step": step})
    # On network storage, the trainer's own record may exist and not be visible here yet.
    write_atomic(directory.exit, record.model_dump_json(indent=2), replace=False)
