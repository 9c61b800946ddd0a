"""Typed client for the files and fine-tuning jobs of the OpenAI API."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from training_backends.core.errors import ProtocolError, RunNotFound
from training_backends.core.logging import get_logger
from training_backends.http.client import HttpClient
from training_backends.http.exchange import Query
from training_backends.http.paging import after_last, paged
from training_backends.http.upload import FileUpload
from training_backends.http.urls import path_segment
from training_backends.protocols.openai.wire import (
    FileObject,
    FineTuningJob,
    FineTuningJobCheckpoint,
    FineTuningJobEvent,
    UploadObject,
    UploadPart,
)

__all__ = ["Entry", "OpenAIAPI", "read_job"]

log = get_logger()

Entry = Mapping[str, Any]
"""An entry of a list, as received."""

_FILES: Final = "/files"
_UPLOADS: Final = "/uploads"
_JOBS: Final = "/fine_tuning/jobs"
_LIMIT: Final = ("limit", "100")
"""Entries per page of jobs, events and checkpoints; maxima are not documented."""

_M = TypeVar("_M", bound=BaseModel)


class OpenAIAPI:
    """The operations over one HTTP client; has no other state.

    Every method raises the errors of `error_from_answer`, and `ProtocolError` for a response
    that does not match the protocol.
    """

    def __init__(self, http: HttpClient) -> None:
        self.http = http

    # -- files -------------------------------------------------------------------------

    async def upload_file(self, upload: FileUpload) -> FileObject:
        """Upload a file; each request creates a new one."""
        return _read(FileObject, await self.http.upload(_FILES, upload))

    async def get_file(self, file_id: str) -> FileObject:
        """Retrieve a file's metadata."""
        return _read(FileObject, await self.http.json("GET", f"{_FILES}/{path_segment(file_id)}"))

    async def find_file(self, filename: str, size: int) -> FileObject | None:
        """Return the newest training file with this name and size."""
        # Without a limit: its default of 10,000 is the largest (openai-python 3.57.0).
        async with aclosing(self._entries(_FILES, [("purpose", "fine-tune")])) as files:
            async for entry in files:
                if entry.get("filename") == filename and entry.get("bytes") in {None, size}:
                    return _read(FileObject, entry)
        return None

    async def begin_upload(self, filename: str, size: int) -> UploadObject:
        """Begin an upload in parts, which expires if it is not completed."""
        body = {
            "filename": filename,
            "bytes": size,
            "purpose": "fine-tune",
            "mime_type": "application/jsonl",
        }
        return _read(UploadObject, await self.http.json("POST", _UPLOADS, body=body))

    async def upload_part(self, upload_id: str, part: FileUpload) -> UploadPart:
        """Upload a part; repeated, the upload has a second one, which is not used."""
        path = f"{_UPLOADS}/{path_segment(upload_id)}/parts"
        return _read(UploadPart, await self.http.upload(path, part, repeatable=True))

    async def complete_upload(self, upload_id: str, part_ids: Sequence[str]) -> UploadObject:
        """Join the parts, in this order, to a file."""
        path = f"{_UPLOADS}/{path_segment(upload_id)}/complete"
        document = await self.http.json("POST", path, body={"part_ids": list(part_ids)})
        return _read(UploadObject, document)

    async def cancel_upload(self, upload_id: str) -> None:
        """Discard an upload and its parts."""
        path = f"{_UPLOADS}/{path_segment(upload_id)}/cancel"
        await self.http.json("POST", path, repeatable=True)

    async def read_file(self, file_id: str) -> bytes:
        """Return the content of a small file, such as a result."""
        path = f"{_FILES}/{path_segment(file_id)}/content"
        return (await self.http.send("GET", path, headers={"Accept": "*/*"})).body

    async def download_file(self, file_id: str, target: Path) -> Path:
        """Download the content of a file to `target`, atomically."""
        path = f"{_FILES}/{path_segment(file_id)}/content"
        return await self.http.download(path, target, follow=True)

    # -- jobs --------------------------------------------------------------------------

    async def probe(self) -> None:
        """Request one job from the list, to check that the server serves jobs."""
        await self.http.json("GET", _JOBS, query=[("limit", "1")])

    def jobs(self, metadata: Mapping[str, str] | None = None) -> AsyncGenerator[Entry, None]:
        """Yield jobs, newest first.

        Args:
            metadata: Ask only for jobs with these pairs; a server may ignore it.
        """
        pairs = [(f"metadata[{name}]", value) for name, value in (metadata or {}).items()]
        return self._entries(_JOBS, [*pairs, _LIMIT])

    async def create_job(self, body: Mapping[str, Any]) -> FineTuningJob:
        """Create a job. Not retried once it may have arrived.

        Raises:
            BackendUnavailable: `sent` tells whether the job may exist.
        """
        return _read(FineTuningJob, await self.http.json("POST", _JOBS, body=dict(body)))

    async def get_job(self, job_id: str) -> FineTuningJob:
        """Retrieve a job."""
        return _read(FineTuningJob, await self.http.json("GET", f"{_JOBS}/{path_segment(job_id)}"))

    async def act(self, job_id: str, action: Literal["cancel", "pause", "resume"]) -> None:
        """Cancel, pause or resume a job; a repeated request has no further effect."""
        await self.http.json("POST", f"{_JOBS}/{path_segment(job_id)}/{action}", repeatable=True)

    async def events(self, job_id: str) -> AsyncGenerator[FineTuningJobEvent, None]:
        """Yield the events of a job, newest first."""
        path = f"{_JOBS}/{path_segment(job_id)}/events"
        async with aclosing(self._entries(path, [_LIMIT])) as entries:
            async for entry in entries:
                yield _read(FineTuningJobEvent, entry)

    async def checkpoints(self, job_id: str) -> list[FineTuningJobCheckpoint]:
        """Return the checkpoints of a job; none if the server does not list any."""
        path = f"{_JOBS}/{path_segment(job_id)}/checkpoints"
        try:
            async with aclosing(self._entries(path, [_LIMIT])) as entries:
                return [_read(FineTuningJobCheckpoint, entry) async for entry in entries]
        except RunNotFound:
            return []

    async def _entries(self, path: str, query: Query = ()) -> AsyncGenerator[Entry, None]:
        """Yield the entries of a list, each once."""
        async with aclosing(paged(self.http, path, query=query, next_page=after_last())) as entries:
            async for entry in entries:
                if isinstance(entry, Mapping):
                    yield entry


def read_job(entry: Entry) -> FineTuningJob | None:
    """Parse a listed job; None if it does not match the protocol."""
    try:
        return FineTuningJob.model_validate(entry)
    except ValidationError:
        log.warning("listed job is malformed", job=str(entry.get("id"))[:80])
        return None


def _read(model: type[_M], document: Entry) -> _M:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        places = "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            for detail in error.errors(
                include_input=False, include_url=False, include_context=False
            )
        )
        raise ProtocolError(
            f"The server's response does not match the protocol: {places[:400]}."
        ) from None
