"""Create, list, retrieve, start and cancel jobs for clients."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from pydantic import SecretStr

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import ConfigError, DatasetError, TrainingBackendError
from training_backends.core.tracing import trace_headers
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.cleanup import JobEnding, SecretKeeper
from training_backends.gateway.errors import HTTPProblem, invalid, plain, problem
from training_backends.gateway.files import (
    FileService,
    StoredFile,
    file_ids,
    names_by_path,
    tuned_path,
    use_files,
)
from training_backends.gateway.job_events import STATUS_EVENT
from training_backends.gateway.job_request import CheckedJob, check_job, make_config, secret_profile
from training_backends.gateway.jobstore import (
    DetailedJobOut,
    JobOut,
    accept_start,
    add_event,
    change_status,
    detailed_job,
    error_data,
    issue_data,
    load_job,
    quote,
    require_job,
    short_job,
    shown_notes,
)
from training_backends.gateway.keys import Principal
from training_backends.gateway.models import ModelService
from training_backends.gateway.openai_ids import FILE, internal_id
from training_backends.gateway.openai_requests import check_openai_job
from training_backends.gateway.projects import check_job_limits
from training_backends.gateway.repetition import Repetition
from training_backends.gateway.runner import JobRunner
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import COUNTED_AHEAD, GatewayStore, page_at
from training_backends.protocols.mistral.status import ENDED, UNSTARTED
from training_backends.protocols.mistral.wire import JobIn, JobsOut, LegacyJobMetadataOut
from training_backends.protocols.openai.errors import (
    answer_for,
    invalid_training_file,
    not_supported,
    wrong_state,
)
from training_backends.protocols.openai.requests import FineTuningJobIn
from training_backends.store.gateway_schema import IS_OPEN, jobs
from training_backends.store.job_counts import COUNTED, change_counts, count_jobs, find_rank

__all__ = ["JobQuery", "JobService"]

_RETRY_AFTER = "60"
"""Seconds."""
_CONFLICTING = (*UNSTARTED, "STARTED", "RUNNING")
_LISTED = [
    column for column in jobs.c if column.name not in {"blobs", "config", "history", "trace"}
]
"""Without what is large and not shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobQuery:
    """Which jobs to list; None does not filter. Times without a zone are UTC."""

    model: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    created_by: str | None = None
    status: str | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    suffix: str | None = None


class JobService:
    """The jobs of one gateway, as seen by its clients."""

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        files: FileService,
        runner: JobRunner,
        ending: JobEnding,
        *,
        models: ModelService,
        backend: str,
        catalogue: Catalogue,
        secrets: SecretKeeper,
        settings: GatewaySettings,
    ) -> None:
        self._store = store
        self._client = client
        self._files = files
        self._runner = runner
        self._ending = ending
        self._models = models
        self._backend = backend
        self._catalogue = catalogue
        self._secrets = secrets
        self._settings = settings

    async def list(
        self, filters: JobQuery, caller: Principal, *, page: int, page_size: int
    ) -> JobsOut:
        """Return one page of jobs, newest first, and the total number.

        No page counts or passes the jobs before it: maintained counts tell the total, and the day
        on which a page begins. With a filter on time, suffix or W&B, the total counts at most
        `COUNTED_AHEAD` jobs after the page.
        """
        return await self._store.aread(
            lambda connection: _page(connection, filters, caller, page * page_size, page_size)
        )

    async def create(self, request: JobIn, caller: Principal) -> JobOut:
        """Create a job; it is validated in the background and trained once started.

        Raises:
            HTTPProblem: The request is invalid, or a similar job is unfinished (409).
        """
        job = await self._check(request, caller)
        job_id = str(uuid4())
        await self._store_secret(job, job_id)
        try:
            row = await self._store.awrite(lambda c: self._insert(c, job, job_id, caller))
        except Exception:
            await self._delete_secret(job, job_id)
            raise
        self._runner.drive(job_id)
        return short_job(row)

    async def create_openai(
        self, request: FineTuningJobIn, caller: Principal, repetition: Repetition
    ) -> str:
        """Create and start a job of the OpenAI API, unless this repeats a request.

        Returns:
            The job's id.

        Raises:
            HTTPProblem: The request is invalid.
        """
        job = await self._check_openai(request, caller, key=repetition.key)
        new_id = str(uuid4())

        def work(connection: sa.Connection) -> str:
            assert job.openai is not None  # noqa: S101  # made above
            known = repetition.first(
                connection,
                jobs,
                mine=caller.made(jobs) & jobs.c.openai.is_not(None),
                same=jobs.c.openai["request"].as_string() == job.openai["request"],
                key=jobs.c.openai["idempotency_key"].as_string(),
            )
            if known is not None:
                return str(known.id)
            self._insert(connection, job, new_id, caller)
            return new_id

        job_id = await self._store.awrite(work)
        self._runner.drive(job_id)
        return job_id

    async def pause(self, job_id: str, caller: Principal, *, resume: bool = False) -> None:
        """Pause a running job, or resume a paused one.

        Raises:
            HTTPProblem: The job is not running, or the backend cannot pause or rejects it.
        """
        job = await self._store.aread(lambda c: require_job(c, job_id, caller))
        verb, action = ("resumed", "job.resume") if resume else ("paused", "job.pause")
        if not self._client.backend(job.backend).capabilities.pauses:
            raise problem(not_supported("This gateway's backend cannot pause a job."))
        if job.status != "RUNNING":
            raise problem(wrong_state(f"Only a running job can be {verb}."))
        try:
            await (self._client.unpause(job_id) if resume else self._client.pause(job_id))
        except TrainingBackendError as error:
            raise problem(answer_for(error)) from error
        await self._store.awrite(lambda c: caller.record(c, action, job_id))

    async def dry_run(self, request: JobIn, caller: Principal) -> LegacyJobMetadataOut:
        """Estimate a job without creating it.

        Raises:
            HTTPProblem: The request is invalid.
        """
        return await self._estimate(await self._check(request, caller), caller)

    async def dry_run_openai(
        self, request: FineTuningJobIn, caller: Principal
    ) -> LegacyJobMetadataOut:
        """Estimate a job of the OpenAI API without creating it.

        Raises:
            HTTPProblem: The request is invalid.
        """
        return await self._estimate(await self._check_openai(request, caller), caller)

    async def _estimate(self, job: CheckedJob, caller: Principal) -> LegacyJobMetadataOut:
        found = await self._store.aread(lambda c: self._find(c, job, caller))
        config = self._make_config(job, found, "dry-run")
        capabilities = self._client.backend(self._backend).capabilities
        if job.openai is not None and capabilities.inspects:
            config = await self._files.converted(config, capabilities.provider_format)
        names = {**names_by_path(found.values()), **tuned_path(job.offer.name, config)}
        try:
            report = await self._client.validate(config, backend=self._backend)
            if not report.ok:
                raise plain(422, issue_data(report.errors, names)["error"])
            estimate = await self._client.estimate(config, backend=self._backend)
        except (ConfigError, DatasetError) as error:
            raise plain(422, error_data(error, names)["error"]) from error
        except TrainingBackendError as error:
            raise plain(503, error_data(error, names)["error"]) from error
        passes = None
        if estimate.train_tokens and estimate.data_tokens:
            passes = round(estimate.train_tokens / estimate.data_tokens, 4)
        return LegacyJobMetadataOut(
            **quote(estimate).model_dump(),
            details=shown_notes([*job.notes, *estimate.notes], names)
            or "Dry run: no job was created.",
            epochs=config.hyperparameters.epochs or passes,
            training_steps=estimate.steps or config.hyperparameters.training_steps,
        )

    async def get(self, job_id: str, caller: Principal) -> DetailedJobOut:
        """Return a job with its events and checkpoints."""
        return await self._store.aread(lambda c: detailed_job(c, job_id, caller))

    async def start(self, job_id: str, caller: Principal) -> DetailedJobOut:
        """Start a validated job; no effect if it is already started.

        Raises:
            HTTPProblem: The job is not validated yet, or has finished.
        """

        def work(connection: sa.Connection) -> DetailedJobOut:
            job = require_job(connection, job_id, caller)
            under_way = job.started_at is not None and job.status not in ENDED
            if not under_way and not accept_start(connection, job_id):
                raise plain(422, f"Only a VALIDATED job can be started; this one is {job.status}.")
            if not under_way:
                caller.record(connection, "job.start", job_id)
            return detailed_job(connection, job_id, caller)

        started = await self._store.awrite(work)
        self._runner.drive(job_id)
        return started

    async def cancel(self, job_id: str, caller: Principal) -> DetailedJobOut:
        """Cancel a job: immediately before its start, asynchronously while it runs; safe to repeat.

        Raises:
            HTTPProblem: The job is running, and the backend cannot stop a run.
        """

        def work(connection: sa.Connection) -> tuple[DetailedJobOut, bool]:
            job = require_job(connection, job_id, caller)
            at_once = job.started_at is None and change_status(
                connection, job_id, "CANCELLED", only_from=UNSTARTED
            )
            if job.started_at is not None and job.status not in ENDED:
                if not self._client.backend(job.backend).capabilities.stops:
                    raise plain(422, "This gateway's backend cannot stop a started job.")
                change_status(
                    connection,
                    job_id,
                    "CANCELLATION_REQUESTED",
                    only_from=("QUEUED", "STARTED", "RUNNING"),
                )
            if job.status not in ENDED:
                caller.record(connection, "job.cancel", job_id)
            return detailed_job(connection, job_id, caller), at_once

        job, at_once = await self._store.awrite(work)
        if at_once:
            self._runner.drop(job_id)
        self._runner.drive(job_id)
        return job

    async def _check(self, request: JobIn, caller: Principal) -> CheckedJob:
        most = self._settings.max_training_steps
        if (request.hyperparameters.training_steps or 0) > most:
            place = ["body", "hyperparameters", "training_steps"]
            raise invalid(place, f"Input should be less than or equal to {most}", "less_than_equal")
        return check_job(
            request,
            await self._offered(request.model, caller),
            self._client.backend(self._backend).capabilities,
            default_epochs=self._settings.default_epochs,
        )

    async def _check_openai(
        self, request: FineTuningJobIn, caller: Principal, *, key: str | None = None
    ) -> CheckedJob:
        return check_openai_job(
            request,
            await self._offered(request.model, caller),
            self._client.backend(self._backend),
            default_epochs=self._settings.default_epochs,
            idempotency_key=key,
        )

    async def _offered(self, name: str, caller: Principal) -> Catalogue:
        """Return the catalogue, with the model of this name if it is a fine-tuned one."""
        if self._catalogue.get(name) is None:
            with suppress(ConfigError):  # a checkpoint that is gone
                if offer := await self._models.offer(name, caller):
                    return self._catalogue.extended(offer)
        return self._catalogue

    def _make_config(
        self, job: CheckedJob, files: Mapping[str, StoredFile], job_id: str
    ) -> TrainingConfig:
        backend = self._client.backend(self._backend)
        return make_config(
            job,
            {file_id: file.source for file_id, file in files.items()},
            job_id,
            backend.options_tolerating(job.tolerated) if job.tolerated else {},
            backend.capabilities,
            destination=self._settings.results,
        )

    def _find(
        self, connection: sa.Connection, job: CheckedJob, caller: Principal
    ) -> Mapping[str, StoredFile]:
        """Return the files of a job by the ids in its request.

        Only files of the job's own project count, even for a caller who can see others: every
        key of the project can read what the job reports about its files.
        """
        if job.openai is not None:
            return self._find_openai(connection, job, caller)
        places: dict[str, list[str | int]] = {}
        for index, entry in enumerate(job.training_files):
            places[entry["file_id"]] = ["body", "training_files", index, "file_id"]
        for index, file_id in enumerate(job.validation_files):
            places.setdefault(file_id, ["body", "validation_files", index])
        canonical = {file_id: _canonical(file_id, place) for file_id, place in places.items()}
        found = self._files.find(connection, list(canonical.values()), caller.project)
        for file_id, place in places.items():
            file = found.get(canonical[file_id])
            if file is None:
                raise invalid(place, f"File {file_id} not found.", "file_not_found")
            if file.purpose != "fine-tune":
                message = f"The file's purpose must be fine-tune, not {file.purpose}."
                raise invalid(place, message, "file_purpose")
        return {file_id: found[one] for file_id, one in canonical.items()}

    def _find_openai(
        self, connection: sa.Connection, job: CheckedJob, caller: Principal
    ) -> Mapping[str, StoredFile]:
        found = {}
        given = {
            "training_file": [entry["file_id"] for entry in job.training_files],
            "validation_file": job.validation_files,
        }
        for param, ids in given.items():
            for file_id in ids:
                own = internal_id(FILE, file_id) or ""
                known = self._files.find(connection, [own], caller.project).get(own)
                if known is None or known.purpose != "fine-tune":
                    raise problem(invalid_training_file(file_id, param))
                found[file_id] = known
        return found

    def _insert(
        self, connection: sa.Connection, job: CheckedJob, job_id: str, caller: Principal
    ) -> Any:
        found = self._find(connection, job, caller)
        similar = connection.execute(
            sa.select(jobs.c.id).where(
                jobs.c.fingerprint == job.fingerprint,
                IS_OPEN,
                jobs.c.project == caller.project,
                jobs.c.status.in_(_CONFLICTING),
            )
        ).scalar()
        if similar is not None and job.openai is None:  # the OpenAI API has no such rule
            raise plain(
                409,
                f"A similar job is queued, validated or running: {similar}.",
                job_id=similar,
            )
        _check_open_jobs(self._settings.max_open_jobs, connection, caller.key_id)
        check_job_limits(connection, caller.project, job.hyperparameters.get("training_steps"))
        config = self._make_config(job, found, job_id)
        now = time.time()
        connection.execute(
            jobs.insert().values(
                self._row(
                    job=job, found=found, config=config, job_id=job_id, caller=caller, now=now
                )
            )
        )
        row = load_job(connection, job_id)
        use_files(connection, file_ids(row))
        change_counts(connection, row, before=None, after=row.status)
        add_event(connection, job_id, STATUS_EVENT, {"status": "QUEUED"})
        caller.record(connection, "job.create", job_id)
        for note in job.notes:
            add_event(connection, job_id, "note", {"message": note})
        return row

    def _row(
        self,
        *,
        job: CheckedJob,
        found: Mapping[str, StoredFile],
        config: TrainingConfig,
        job_id: str,
        caller: Principal,
        now: float,
    ) -> dict[str, Any]:
        shown = {"type", "project", "name", "run_name"}
        integrations = [given.model_dump(include=shown) for given in job.integrations]
        wandb = integrations[0] if integrations else {}
        return {
            "id": job_id,
            "backend": self._backend,
            "model": job.offer.name,
            "context_length": job.offer.context_length,
            "job_type": job.job_type,
            "status": "QUEUED",
            "suffix": job.suffix,
            "auto_start": job.auto_start,
            "fingerprint": job.fingerprint,
            "created_at": now,
            "modified_at": now,
            "created_by": caller.key_id,
            "project": caller.project,
            "training_files": [
                {**entry, "file_id": found[entry["file_id"]].id} for entry in job.training_files
            ],
            "validation_files": [found[file_id].id for file_id in job.validation_files],
            "blobs": sorted({file.sha256 for file in found.values()}),
            "hyperparameters": job.hyperparameters,
            "classifier_targets": job.classifier_targets,
            "integrations": integrations,
            "wandb_project": wandb.get("project"),
            "wandb_name": wandb.get("name"),
            "config": config.model_dump_json(),
            "openai": job.openai,
            "trace": trace_headers() or None,
        }

    async def _store_secret(self, job: CheckedJob, job_id: str) -> None:
        for index, (given, key) in enumerate(zip(job.integrations, job.keys, strict=False)):
            try:
                profile = secret_profile(job_id)
                await self._secrets.set(given.type, SecretStr(key), profile)
            except TrainingBackendError as error:
                message = f"The gateway cannot store the key securely: {error.message}"
                raise invalid(["body", "integrations", index, "api_key"], message) from error

    async def _delete_secret(self, job: CheckedJob, job_id: str) -> None:
        for given in job.integrations:
            await self._ending.forget(given.type, job_id)


def _check_open_jobs(limit: int, connection: sa.Connection, key_id: str) -> None:
    """Reject a job if the key has reached its limit of unfinished jobs."""
    mine = jobs.c.created_by == key_id, jobs.c.status.not_in(ENDED), IS_OPEN
    found = connection.execute(sa.select(sa.func.count()).select_from(jobs).where(*mine))
    if found.scalar_one() >= limit:
        sentence = f"This API key has {limit} unfinished jobs; wait for one or cancel one."
        raise HTTPProblem(429, {"detail": sentence}, {"retry-after": _RETRY_AFTER})


def _canonical(file_id: str, place: list[str | int]) -> str:
    try:
        return str(UUID(file_id))
    except ValueError:
        raise invalid(place, "Input should be a valid UUID", "uuid_parsing") from None


def _page(
    connection: sa.Connection, filters: JobQuery, caller: Principal, first: int, size: int
) -> JobsOut:
    conditions = [caller.sees(jobs.c.project), *_conditions(filters)]
    counted = _counted(filters)
    if counted is not None:
        counted["project"] = None if caller.admin else caller.project
        total = count_jobs(connection, counted)
        place = (math.inf, first) if first == 0 else find_rank(connection, counted, first)
        if place is None:
            return JobsOut(data=[], total=total)
        before, skip = place
        if before < math.inf:
            conditions.append(jobs.c.created_at < before)
    else:
        ahead = sa.select(jobs.c.id).where(*conditions).limit(first + size + COUNTED_AHEAD)
        total = connection.execute(
            sa.select(sa.func.count()).select_from(ahead.subquery())
        ).scalar_one()
        skip = first
    order = jobs.c.created_at.desc(), jobs.c.id.desc()
    rows = page_at(connection, jobs, _LISTED, conditions, order, skip=skip, size=size)
    return JobsOut(data=[*map(short_job, rows)], total=total)


def _counted(filters: JobQuery) -> dict[str, Any] | None:
    """Return the filters by which jobs are counted; None if there are others."""
    given = {name: value for name, value in asdict(filters).items() if value is not None}
    return given if COUNTED.issuperset(given) else None


def _conditions(filters: JobQuery) -> list[sa.ColumnElement[bool]]:
    equal = {
        jobs.c.model: filters.model,
        jobs.c.created_by: filters.created_by,
        jobs.c.status: filters.status,
        jobs.c.wandb_project: filters.wandb_project,
        jobs.c.wandb_name: filters.wandb_name,
        jobs.c.suffix: filters.suffix,
    }
    conditions = [column == value for column, value in equal.items() if value is not None]
    if filters.created_after is not None:
        conditions.append(jobs.c.created_at >= _seconds(filters.created_after))
    if filters.created_before is not None:
        conditions.append(jobs.c.created_at <= _seconds(filters.created_before))
    return conditions


def _seconds(moment: datetime) -> float:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return aware.timestamp()
