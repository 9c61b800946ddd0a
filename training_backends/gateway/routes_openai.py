"""Routes of the OpenAI API, over the same files, jobs and models as the Mistral API."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import FileResponse

from training_backends.gateway.errors import OPENAI_PREFIX, HTTPProblem, problem
from training_backends.gateway.files import OPENAI_UPLOAD
from training_backends.gateway.routes import Caller, Opened
from training_backends.gateway.routes_files import FILE_BYTES, send_file
from training_backends.protocols.mistral.wire import FileSchema
from training_backends.protocols.openai.errors import ErrorAnswer, no_file
from training_backends.protocols.openai.wire import FileDeleted, FileObject, ListPage

__all__ = ["openai_router"]

REPEATS_FOR: Final = 600.0
"""Seconds within which a repeated request is answered with the object of the first one."""


class _ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIProblem(BaseModel):
    """An error response."""

    error: _ErrorBody


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

openai_router = APIRouter(prefix=OPENAI_PREFIX, tags=["openai"], responses=_ERRORS)


def _repeats(request: Request) -> bool:
    """Return whether an official client sends a request again."""
    count = request.headers.get("x-stainless-retry-count", "")
    return count.isascii() and count.isdigit() and int(count[:9]) > 0


@contextmanager
def _missing(answer: ErrorAnswer) -> Iterator[None]:
    """Answer a 404 of the services in the words of the OpenAI API."""
    try:
        yield
    except HTTPProblem as refusal:
        raise (problem(answer) if refusal.status == 404 else refusal) from None


def _known_id(given: str, answer: ErrorAnswer) -> str:
    """Return an id in canonical form; any other text is the id of nothing."""
    try:
        return str(UUID(given))
    except ValueError:
        raise problem(answer) from None


# -- files -----------------------------------------------------------------------------


@openai_router.post("/files", openapi_extra=_FORM, responses={507: {"model": OpenAIProblem}})
async def upload_openai_file(request: Request, gateway: Opened, caller: Caller) -> FileObject:
    """Upload a file; a retry of the same upload returns the same file."""
    length = request.headers.get("content-length", "")
    return _file(
        await gateway.files.upload(
            request.stream(),
            content_type=request.headers.get("content-type", ""),
            content_length=int(length) if length.isdigit() else None,
            caller=caller,
            rules=OPENAI_UPLOAD,
            reuse_for=REPEATS_FOR if _repeats(request) else 0.0,
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
        caller, after=after, limit=limit, descending=order == "desc", purpose=purpose
    )
    return _page([_file(file) for file in found], has_more=has_more)


@openai_router.get("/files/{file_id}", responses=_MISSING)
async def retrieve_openai_file(file_id: str, gateway: Opened, caller: Caller) -> FileObject:
    """Return a file's metadata."""
    missing = no_file(file_id)
    with _missing(missing):
        return _file(await gateway.files.retrieve(_known_id(file_id, missing), caller))


@openai_router.delete("/files/{file_id}", responses=_MISSING)
async def delete_openai_file(file_id: str, gateway: Opened, caller: Caller) -> FileDeleted:
    """Delete a file; unfinished jobs that use it keep running."""
    missing = no_file(file_id)
    with _missing(missing):
        deleted = await gateway.files.delete(_known_id(file_id, missing), caller)
    return FileDeleted(id=deleted.id)


@openai_router.get(
    "/files/{file_id}/content", response_class=FileResponse, responses=FILE_BYTES | _MISSING
)
async def download_openai_file(file_id: str, gateway: Opened, caller: Caller) -> FileResponse:
    """Return a file's content."""
    missing = no_file(file_id)
    with _missing(missing):
        return await send_file(await gateway.files.stored(_known_id(file_id, missing), caller))


def _file(file: FileSchema) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
        status="processed",
    )


def _page(found: Sequence[Any], *, has_more: bool) -> ListPage[Any]:
    return ListPage[Any](
        data=list(found),
        has_more=has_more,
        first_id=found[0].id if found else None,
        last_id=found[-1].id if found else None,
    )
