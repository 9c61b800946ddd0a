"""Routes of the files API."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from training_backends.gateway.errors import plain
from training_backends.gateway.files import FileFilters, StoredFile, UploadRules
from training_backends.gateway.gateway import Gateway
from training_backends.gateway.keys import Principal
from training_backends.gateway.routes import (
    Caller,
    FileProblem,
    Opened,
    Page,
    PageSize,
    answers,
)
from training_backends.protocols.mistral.wire import (
    DeleteFileOut,
    FileSignedURL,
    ListFilesOut,
    RetrieveFileOut,
    UploadFileOut,
)

__all__ = ["FILE_BYTES", "files_router", "links_router", "receive_file", "send_file"]

files_router = APIRouter(prefix="/v1/files", tags=["files"])
links_router = APIRouter(prefix="/files", tags=["files"])

Purpose = Literal["fine-tune", "batch", "ocr"]
SampleType = Literal["pretrain", "instruct", "batch_request", "batch_result", "batch_error"]
Source = Literal["upload", "repository", "mistral"]
Hours = Annotated[int, Query(ge=1, le=24 * 365, description="Hours until the URL expires.")]

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["fine-tune", "batch", "ocr"]},
                        "expiry": {"type": "integer", "minimum": 1, "description": "Hours."},
                        "visibility": {"type": "string", "enum": ["workspace"]},
                    },
                }
            }
        },
    }
}
FILE_BYTES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file's bytes.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@files_router.post(
    "", openapi_extra=_FORM, responses=answers(507, _422=FileProblem), name="upload_file"
)
async def upload(request: Request, gateway: Opened, caller: Caller) -> UploadFileOut:
    """Upload a file; uploading the same name and content again returns the same file."""
    return await receive_file(request, gateway, caller)


async def receive_file(
    request: Request, gateway: Gateway, caller: Principal, rules: UploadRules | None = None
) -> UploadFileOut:
    """Store the file of a form; see `FileService.upload`."""
    length = request.headers.get("content-length", "")
    return await gateway.files.upload(
        request.stream(),
        content_type=request.headers.get("content-type", ""),
        content_length=int(length) if length.isdigit() else None,
        caller=caller,
        rules=rules,
    )


@files_router.get("", responses=answers(), name="list_files")
async def list_files(
    *,
    gateway: Opened,
    caller: Caller,
    page: Page = 0,
    page_size: PageSize = 100,
    include_total: bool = True,
    sample_type: Annotated[list[SampleType] | None, Query()] = None,
    source: Annotated[list[Source] | None, Query()] = None,
    search: str | None = None,
    purpose: Purpose | None = None,
    mimetypes: Annotated[list[str] | None, Query()] = None,
) -> ListFilesOut:
    """List files, newest first."""
    filters = FileFilters(
        sample_type=sample_type,
        source=source,
        search=search,
        purpose=purpose,
        mimetypes=mimetypes,
    )
    return await gateway.files.list(
        filters, caller, page=page, page_size=page_size, include_total=include_total
    )


@files_router.get("/{file_id}", responses=answers(404), name="retrieve_file")
async def retrieve(file_id: UUID, gateway: Opened, caller: Caller) -> RetrieveFileOut:
    """Return a file's metadata."""
    return await gateway.files.retrieve(str(file_id), caller)


@files_router.delete("/{file_id}", responses=answers(404), name="delete_file")
async def delete(file_id: UUID, gateway: Opened, caller: Caller) -> DeleteFileOut:
    """Delete a file; unfinished jobs that use it keep running."""
    return await gateway.files.delete(str(file_id), caller)


@files_router.get(
    "/{file_id}/content",
    response_class=Response,
    responses=FILE_BYTES | answers(404),
    name="download_file",
)
async def download(request: Request, file_id: UUID, gateway: Opened, caller: Caller) -> Response:
    """Return a file's content."""
    file = await gateway.files.stored(str(file_id), caller)
    return await send_file(gateway, file, caller, request.headers)


@files_router.get("/{file_id}/url", responses=answers(404), name="get_signed_url")
async def signed_url(
    file_id: UUID, gateway: Opened, caller: Caller, expiry: Hours = 24
) -> FileSignedURL:
    """Return a signed URL of a file, which needs no API key."""
    file = await gateway.files.stored(str(file_id), caller)
    await gateway.store.awrite(lambda c: caller.record(c, "file.link", str(file_id)))
    if gateway.settings.presigned_urls and (url := await gateway.files.signed_url(file, expiry)):
        return FileSignedURL(url=url)
    # Never from the request's Host header, which the client controls.
    return FileSignedURL(url=gateway.public_url + gateway.links.path(str(file_id), expiry))


@links_router.get(
    "/{file_id}",
    response_class=Response,
    responses=FILE_BYTES | answers(403, 404),
    name="linked",
)
async def linked(
    request: Request, file_id: UUID, gateway: Opened, expires: int, signature: str
) -> Response:
    """Return the content of a file for a valid signed URL."""
    if not gateway.links.allows(str(file_id), expires, signature):
        raise plain(403, "The link is invalid or has expired.")
    state = request.state
    anybody = Principal("link", "", address=state.address, request_id=state.request_id)
    file = await gateway.files.linked(str(file_id))
    return await send_file(gateway, file, anybody, request.headers)


async def send_file(
    gateway: Gateway, file: StoredFile, caller: Principal, headers: Mapping[str, str]
) -> Response:
    """Return a file's content, which the audit log reports."""
    response = await gateway.files.content(file, headers)
    await gateway.store.awrite(lambda c: caller.record(c, "file.download", file.id))
    return response
