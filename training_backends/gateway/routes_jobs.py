"""Routes of the fine-tuning API."""

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter

from training_backends.gateway.jobs import JobQuery
from training_backends.gateway.routes import (
    Caller,
    Conflict,
    Opened,
    Page,
    PageSize,
    SmallBody,
    answers,
)
from training_backends.protocols.mistral.status import JobStatus
from training_backends.protocols.mistral.wire import (
    ClassifierDetailedJobOut,
    ClassifierJobOut,
    CompletionDetailedJobOut,
    CompletionJobOut,
    JobIn,
    JobsOut,
    LegacyJobMetadataOut,
)

__all__ = ["jobs_router"]

jobs_router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

DetailedJobOut = CompletionDetailedJobOut | ClassifierDetailedJobOut


@jobs_router.get("", responses=answers(), name="list_jobs")
async def list_jobs(
    *,
    gateway: Opened,
    caller: Caller,
    page: Page = 0,
    page_size: PageSize = 100,
    model: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    created_by_me: bool = False,
    status: JobStatus | None = None,
    wandb_project: str | None = None,
    wandb_name: str | None = None,
    suffix: str | None = None,
) -> JobsOut:
    """List jobs, newest first."""
    filters = JobQuery(
        model=model,
        created_after=created_after,
        created_before=created_before,
        created_by=caller.key_id if created_by_me else None,
        status=status,
        wandb_project=wandb_project,
        wandb_name=wandb_name,
        suffix=suffix,
    )
    return await gateway.jobs.list(filters, caller, page=page, page_size=page_size)


@jobs_router.post(
    "", responses=answers(429, 503, _409=Conflict), name="create_job", dependencies=[SmallBody]
)
async def create_job(
    *,
    job: JobIn,
    gateway: Opened,
    caller: Caller,
    dry_run: bool | None = None,
) -> CompletionJobOut | ClassifierJobOut | LegacyJobMetadataOut:
    """Create a job, or estimate it with `dry_run`."""
    if dry_run:
        return await gateway.jobs.dry_run(job, caller)
    return await gateway.jobs.create(job, caller)


@jobs_router.get("/{job_id}", responses=answers(404), name="get_job")
async def get_job(job_id: UUID, gateway: Opened, caller: Caller) -> DetailedJobOut:
    """Return a job with its events and checkpoints."""
    return await gateway.jobs.get(str(job_id), caller)


@jobs_router.post("/{job_id}/start", responses=answers(404), name="start_job")
async def start_job(job_id: UUID, gateway: Opened, caller: Caller) -> DetailedJobOut:
    """Start a VALIDATED job; no effect if it is already started."""
    return await gateway.jobs.start(str(job_id), caller)


@jobs_router.post("/{job_id}/cancel", responses=answers(404), name="cancel_job")
async def cancel_job(job_id: UUID, gateway: Opened, caller: Caller) -> DetailedJobOut:
    """Cancel a job; no effect if it has finished."""
    return await gateway.jobs.cancel(str(job_id), caller)
