"""Routes of the OpenAI API, over the same files, jobs and models as the Mistral API."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from training_backends.gateway.errors import OPENAI_PREFIX, HTTPProblem, problem
from training_backends.gateway.files import OPENAI_UPLOAD, RESULTS_PURPOSE
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.keys import Principal
from training_backends.gateway.openai_ids import FILE, JOB, PART, UPLOAD, internal_id, wire_id
from training_backends.gateway.openai_jobs import (
    list_openai_jobs,
    openai_checkpoints,
    openai_events,
    openai_job,
)
from training_backends.gateway.part_uploads import FoundUpload
from training_backends.gateway.repetition import Repetition
from training_backends.gateway.routes import Caller, Opened, SmallBody, list_response
from training_backends.gateway.routes_files import FILE_BYTES, send_file
from training_backends.protocols.mistral.status import ENDED
from training_backends.protocols.mistral.wire import FileSchema, LegacyJobMetadataOut, ModelCard
from training_backends.protocols.openai.errors import (
    ErrorAnswer,
    no_file,
    no_job,
    no_model,
    no_upload,
    wrong_state,
)
from training_backends.protocols.openai.requests import (
    CompleteUploadIn,
    FineTuningJobIn,
    UploadIn,
)
from training_backends.protocols.openai.wire import (
    FileDeleted,
    FileObject,
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    ListPage,
    ModelDeleted,
    ModelObject,
    UploadObject,
    UploadPart,
)

__all__ = ["openai_router"]


class _OpenAIErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    """An error response."""

    error: _OpenAIErrorBody


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIProblem} for status in (400, 401, 403, 408, 413, 431)
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": OpenAIProblem}}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(OPENAI_UPLOAD.purposes)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": 3600,
                            "maximum": 2_592_000,
                        },
                    },
                }
            }
        },
    }
}

_PART_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
_SHOWN_PURPOSES = {*OPENAI_UPLOAD.purposes, RESULTS_PURPOSE}
_LONGEST_KEY = 255

openai_router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"], responses=_ERRORS)


async def _repetition(request: Request) -> Repetition:
    """Return whether this request may repeat another: the official clients count their retries."""
    count = request.headers.get("x-stainless-retry-count", "")
    key = request.headers.get("idempotency-key")
    if key is not None and len(key) > _LONGEST_KEY:
        message = f"The Idempotency-Key is too long; the limit is {_LONGEST_KEY} characters."
        raise problem(ErrorAnswer(status=400, message=message, code="idempotency_error"))
    return Repetition(
        is_retry=count.isascii() and count.isdigit() and int(count[:9]) > 0, key=key or None
    )


Repeated = Annotated[Repetition, Depends(_repetition)]


@contextmanager
def _missing(answer: ErrorAnswer) -> Iterator[None]:
    """Answer a 404 of the services in the words of the OpenAI API."""
    try:
        yield
    except HTTPProblem as refusal:
        raise (problem(answer) if refusal.status == 404 else refusal) from None


def _known_id(prefix: str, given: str, answer: ErrorAnswer) -> str:
    """Return an object's own id; any other text is the id of nothing."""
    known = internal_id(prefix, given)
    if known is None:
        raise problem(answer)
    return known


def _after(prefix: str, given: str | None) -> str | None:
    """Return the own id of the object after which a page begins; other text is kept."""
    return given and (internal_id(prefix, given) or given)


# -- files -----------------------------------------------------------------------------


@openai_router.post("/files", openapi_extra=_FORM, responses={507: {"model": OpenAIProblem}})
async def upload_openai_file(
    request: Request, gateway: Opened, caller: Caller, repetition: Repeated
) -> FileObject:
    """Upload a file; a retry of the same upload returns the same file."""
    length = request.headers.get("content-length", "")
    return _file(
        await gateway.files.upload(
            request.stream(),
            content_type=request.headers.get("content-type", ""),
            content_length=int(length) if length.isdigit() else None,
            caller=caller,
            rules=OPENAI_UPLOAD,
            repetition=repetition,
        )
    )


@openai_router.get("/files")
async def list_openai_files(
    gateway: Opened,
    caller: Caller,
    *,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> ListPage[FileObject]:
    """List files by time, newest first."""
    found, has_more = await gateway.files.page(
        caller,
        after=_after(FILE, after),
        limit=limit,
        descending=order == "desc",
        purpose=purpose,
    )
    page = _page([_file(file) for file in found], has_more=has_more)
    # The published schema does not allow null here.
    return page.model_copy(update={"first_id": page.first_id or "", "last_id": page.last_id or ""})


@openai_router.get("/files/{file_id}", responses=_MISSING)
async def retrieve_openai_file(file_id: str, gateway: Opened, caller: Caller) -> FileObject:
    """Return a file's metadata."""
    missing = no_file(file_id)
    with _missing(missing):
        return _file(await gateway.files.retrieve(_known_id(FILE, file_id, missing), caller))


@openai_router.delete("/files/{file_id}", responses=_MISSING)
async def delete_openai_file(file_id: str, gateway: Opened, caller: Caller) -> FileDeleted:
    """Delete a file; unfinished jobs that use it keep running."""
    missing = no_file(file_id)
    with _missing(missing):
        deleted = await gateway.files.delete(_known_id(FILE, file_id, missing), caller)
    return FileDeleted(id=wire_id(FILE, deleted.id))


@openai_router.get(
    "/files/{file_id}/content", response_class=Response, responses=FILE_BYTES | _MISSING
)
async def download_openai_file(
    request: Request, file_id: str, gateway: Opened, caller: Caller
) -> Response:
    """Return a file's content."""
    missing = no_file(file_id)
    with _missing(missing):
        stored = await gateway.files.stored(_known_id(FILE, file_id, missing), caller)
        return await send_file(gateway, stored, caller, request.headers)


def _file(file: FileSchema) -> FileObject:
    return FileObject(
        id=wire_id(FILE, file.id),
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        # The Mistral API has a purpose that the other one lacks.
        purpose=file.purpose if file.purpose in _SHOWN_PURPOSES else "user_data",
        status="processed",
    )


# -- uploads in parts ------------------------------------------------------------------


@openai_router.post(
    "/uploads",
    responses={429: {"model": OpenAIProblem}, 507: {"model": OpenAIProblem}},
    dependencies=[SmallBody],
)
async def create_openai_upload(
    upload: UploadIn, gateway: Opened, caller: Caller, repetition: Repeated
) -> UploadObject:
    """Begin to upload a file in parts, within an hour."""
    return _upload(await gateway.uploads.create(upload, caller, repetition))


@openai_router.post(
    "/uploads/{upload_id}/parts",
    openapi_extra=_PART_FORM,
    responses=_MISSING | {507: {"model": OpenAIProblem}},
)
async def add_openai_upload_part(
    upload_id: str, request: Request, gateway: Opened, caller: Caller, repetition: Repeated
) -> UploadPart:
    """Upload a part; the order is that of the completion."""
    missing = no_upload(upload_id)
    length = request.headers.get("content-length", "")
    with _missing(missing):
        part = await gateway.uploads.add(
            _known_id(UPLOAD, upload_id, missing),
            request.stream(),
            content_type=request.headers.get("content-type", ""),
            content_length=int(length) if length.isdigit() else None,
            caller=caller,
            repetition=repetition,
        )
    return UploadPart(
        id=wire_id(PART, part.id),
        created_at=part.created_at,
        upload_id=wire_id(UPLOAD, part.upload_id),
    )


@openai_router.post(
    "/uploads/{upload_id}/complete",
    responses=_MISSING | {507: {"model": OpenAIProblem}},
    dependencies=[SmallBody],
)
async def complete_openai_upload(
    upload_id: str, given: CompleteUploadIn, gateway: Opened, caller: Caller
) -> UploadObject:
    """Join the parts to a file; a repeated request returns the same file."""
    missing = no_upload(upload_id)
    with _missing(missing):
        known = _known_id(UPLOAD, upload_id, missing)
        return _upload(await gateway.uploads.complete(known, given, caller))


@openai_router.post("/uploads/{upload_id}/cancel", responses=_MISSING)
async def cancel_openai_upload(upload_id: str, gateway: Opened, caller: Caller) -> UploadObject:
    """Cancel an upload; its parts are deleted."""
    missing = no_upload(upload_id)
    with _missing(missing):
        known = _known_id(UPLOAD, upload_id, missing)
        return _upload(await gateway.uploads.cancel(known, caller))


def _upload(found: FoundUpload) -> UploadObject:
    row = found.row
    return UploadObject(
        id=wire_id(UPLOAD, row.id),
        bytes=row.bytes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        filename=row.filename,
        purpose=row.purpose,
        status=row.status,
        file=_file(found.file) if found.file else None,
    )


# -- jobs ------------------------------------------------------------------------------

After = Annotated[str | None, Query(max_length=200)]
_JOBS = "/fine_tuning/jobs"
_JOB: dict[int | str, dict[str, Any]] = {200: {"model": FineTuningJob}}


@openai_router.post(
    _JOBS,
    responses={
        200: {"model": FineTuningJob | LegacyJobMetadataOut},
        429: {"model": OpenAIProblem},
    },
    dependencies=[SmallBody],
)
async def create_openai_job(
    job: FineTuningJobIn,
    gateway: Opened,
    caller: Caller,
    repetition: Repeated,
    *,
    dry_run: bool = False,
) -> JSONResponse:
    """Create a job; a repeated request returns the job of the first one.

    With `dry_run`, which the service does not have, return the estimate of the Mistral API.
    """
    if dry_run:
        quote = await gateway.jobs.dry_run_openai(job, caller)
        return JSONResponse(quote.model_dump(mode="json"))
    return await _show(gateway, await gateway.jobs.create_openai(job, caller, repetition), caller)


@openai_router.get(_JOBS, responses={200: {"model": ListPage[FineTuningJob]}})
async def list_all_openai_jobs(
    request: Request,
    gateway: Opened,
    caller: Caller,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> JSONResponse:
    """List jobs, newest first; `metadata[key]=value` selects, `metadata=null` those without."""
    metadata = _metadata(request.query_params.multi_items())
    found, has_more = await gateway.store.aread(
        lambda c: list_openai_jobs(
            c,
            caller,
            gateway.settings.organization_id,
            after=_after(JOB, after),
            limit=limit,
            metadata=metadata,
        )
    )
    shown = [job.to_wire() for job in found]
    return JSONResponse({"object": "list", "data": shown, "has_more": has_more})


@openai_router.get(f"{_JOBS}/{{job_id}}", responses=_JOB | _MISSING)
async def retrieve_openai_job(job_id: str, gateway: Opened, caller: Caller) -> JSONResponse:
    """Return a job."""
    return await _show(gateway, job_id, caller)


@openai_router.post(f"{_JOBS}/{{job_id}}/cancel", responses=_JOB | _MISSING)
async def cancel_openai_job(job_id: str, gateway: Opened, caller: Caller) -> JSONResponse:
    """Cancel a job: immediately before its start, asynchronously while it runs."""
    missing = no_job(job_id)
    known = _known_id(JOB, job_id, missing)
    with _missing(missing):
        job = await gateway.jobs.get(known, caller)
        if job.status in ENDED:
            raise problem(wrong_state(f"Job {job_id} has finished; it cannot be cancelled."))
        await gateway.jobs.cancel(known, caller)
    return await _show(gateway, known, caller)


@openai_router.post(f"{_JOBS}/{{job_id}}/pause", responses=_JOB | _MISSING)
async def pause_openai_job(job_id: str, gateway: Opened, caller: Caller) -> JSONResponse:
    """Pause a running job."""
    with _missing(no_job(job_id)):
        await gateway.jobs.pause(_known_id(JOB, job_id, no_job(job_id)), caller)
    return await _show(gateway, job_id, caller)


@openai_router.post(f"{_JOBS}/{{job_id}}/resume", responses=_JOB | _MISSING)
async def resume_openai_job(job_id: str, gateway: Opened, caller: Caller) -> JSONResponse:
    """Resume a paused job."""
    with _missing(no_job(job_id)):
        await gateway.jobs.pause(_known_id(JOB, job_id, no_job(job_id)), caller, resume=True)
    return await _show(gateway, job_id, caller)


@openai_router.get(f"{_JOBS}/{{job_id}}/events", responses=_MISSING)
async def list_openai_events(
    job_id: str,
    gateway: Opened,
    caller: Caller,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> ListPage[FineTuningJobEvent]:
    """List a job's events, newest first, with the metrics of each step."""
    missing = no_job(job_id)
    known = _known_id(JOB, job_id, missing)
    with _missing(missing):
        found, has_more = await gateway.store.aread(
            lambda c: openai_events(c, known, caller, after=after, limit=limit)
        )
    return _page(found, has_more=has_more)


@openai_router.get(f"{_JOBS}/{{job_id}}/checkpoints", responses=_MISSING)
async def list_openai_checkpoints(
    job_id: str,
    gateway: Opened,
    caller: Caller,
    *,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
) -> ListPage[FineTuningJobCheckpoint]:
    """List a job's checkpoints, newest first."""
    missing = no_job(job_id)
    known = _known_id(JOB, job_id, missing)
    mine = gateway.settings.organization_id
    with _missing(missing):
        found, has_more = await gateway.store.aread(
            lambda c: openai_checkpoints(
                c,
                known,
                caller,
                mine,
                keeps=gateway.checkpoints.keeps,
                after=after,
                limit=limit,
            )
        )
    return _page(found, has_more=has_more)


async def _show(gateway: Gateway, job_id: str, caller: Principal) -> JSONResponse:
    missing = no_job(job_id)
    known = _known_id(JOB, job_id, missing)
    mine = gateway.settings.organization_id
    with _missing(missing):
        job = await gateway.store.aread(lambda c: openai_job(c, known, caller, mine))
    return JSONResponse(job.to_wire())


def _metadata(query: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    """Return the pairs to search for; empty for `metadata=null`, None without any."""
    pairs = {
        name.removeprefix("metadata[")[:-1]: value
        for name, value in query
        if name.startswith("metadata[") and name.endswith("]")
    }
    # The Node client sends null as an empty value.
    without = any(name == "metadata" and value in {"null", ""} for name, value in query)
    return pairs if pairs or without else None


# -- models ----------------------------------------------------------------------------


@openai_router.get("/models", response_model=ListPage[ModelObject])
async def list_openai_models(gateway: Opened, caller: Caller) -> Response:
    """List base models and fine-tuned models."""
    return await list_response(_models(gateway.models.pages(caller)), _ending)


async def _models(
    pages: AsyncGenerator[Sequence[ModelCard], None],
) -> AsyncGenerator[Sequence[ModelObject], None]:
    async with aclosing(pages):
        async for page in pages:
            yield [*map(_model, page)]


def _ending(ids: Sequence[str]) -> dict[str, object]:
    first_id, last_id = ids or (None, None)
    return {"has_more": False, "first_id": first_id, "last_id": last_id}


# Names with slashes arrive as %2F, which is decoded before the path is matched.
@openai_router.get("/models/{name:path}", responses=_MISSING)
async def retrieve_openai_model(name: str, gateway: Opened, caller: Caller) -> ModelObject:
    """Return one model."""
    with _missing(no_model(name)):
        return _model(await gateway.models.retrieve(name, caller))


@openai_router.delete("/models/{name:path}", responses=_MISSING)
async def delete_openai_model(name: str, gateway: Opened, caller: Caller) -> ModelDeleted:
    """Delete a fine-tuned model."""
    with _missing(no_model(name)):
        return ModelDeleted(id=(await gateway.models.delete(name, caller)).id)


def _model(card: ModelCard) -> ModelObject:
    return ModelObject(id=card.id, created=card.created, owned_by=card.owned_by)


def _page(found: Sequence[Any], *, has_more: bool) -> ListPage[Any]:
    return ListPage[Any](
        data=list(found),
        has_more=has_more,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )
