"""Typed client for the Mistral files, fine-tuning and models API."""

import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import msgspec
from pydantic import BaseModel, SecretStr, ValidationError

from training_backends.core.errors import BackendUnavailable, ProtocolError, validation_issues
from training_backends.core.logging import get_logger, redact
from training_backends.core.run import Prompt
from training_backends.http.client import HttpClient
from training_backends.http.download import unpack
from training_backends.http.upload import FileUpload, HashedFile, Progress
from training_backends.http.urls import path_segment
from training_backends.protocols.mistral import wire

__all__ = ["MAX_PAGES", "PAGE_SIZE", "JobFilters", "JobHead", "MistralAPI"]

log = get_logger()

PAGE_SIZE: Final = 100
"""Entries per page; the specification's default."""
MAX_PAGES: Final = 1000
"""Maximum pages of a list, in case a server never ends it."""

_FILES: Final = "/v1/files"
_JOBS: Final = "/v1/fine_tuning/jobs"
_MODELS: Final = "/v1/models"
_CHAT: Final = "/v1/chat/completions"
_THINKS: Final = 600.0
"""Seconds that a model may take between two words, or to be loaded."""

_M = TypeVar("_M")
_T = TypeVar("_T")
_QueryValue = str | float | datetime | None


class JobFilters(BaseModel):
    """Which jobs to list; None does not filter.

    Attributes:
        created_after: With a time zone; otherwise the server would assume its own.
        created_by_me: Only jobs created with the same key.
        status: A protocol status, for example `RUNNING`.
    """

    model: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    created_by_me: bool | None = None
    status: str | None = None
    wandb_project: str | None = None
    wandb_name: str | None = None
    suffix: str | None = None


class JobHead(msgspec.Struct, frozen=True, gc=False):
    """The fields for a sweep over many jobs; parsing complete jobs takes ten times as long."""

    id: str
    status: str
    modified_at: int


class MistralAPI:
    """The operations that the backend uses, over one HTTP client; has no other state.

    Every method raises the errors of `error_from_answer`, and `ProtocolError` for a response
    that does not match the specification.
    """

    def __init__(self, http: HttpClient) -> None:
        self.http = http

    # -- files -------------------------------------------------------------------------

    async def upload_file(
        self,
        path: Path,
        *,
        filename: str | None = None,
        hashed: HashedFile | None = None,
        on_progress: Progress | None = None,
    ) -> wire.UploadFileOut:
        """Upload a file as a stream; the same name and content returns the same file.

        Args:
            hashed: Expected content, verified before the upload is complete.
            on_progress: Called with the bytes read and the total.

        Raises:
            DatasetError: The file cannot be read, is empty or changed during the upload.
        """
        upload = FileUpload(
            path,
            fields={"purpose": "fine-tune"},
            filename=filename,
            hashed=hashed,
            on_progress=on_progress,
        )
        return _read(wire.UploadFileOut.model_validate, await self.http.upload(_FILES, upload))

    async def iter_files(
        self, *, search: str | None = None, purpose: str | None = None
    ) -> AsyncGenerator[wire.FileSchema, None]:
        """Yield every file, page by page, each once.

        Args:
            search: Part of the name.
        """

        async def fetch(page: int) -> tuple[list[wire.FileSchema], int]:
            query = _query(
                page=page, page_size=PAGE_SIZE, include_total=False, search=search, purpose=purpose
            )
            document = await self.http.json("GET", _FILES, query=query)
            found = _read(wire.ListFilesOut.model_validate, document)
            return found.data, found.total or 0

        async with aclosing(_paged(fetch, lambda file: file.id)) as pages:
            async for files in pages:
                for file in files:
                    yield file

    async def retrieve_file(self, file_id: str) -> wire.RetrieveFileOut:
        """Retrieve a file's metadata."""
        document = await self.http.json("GET", f"{_FILES}/{path_segment(file_id)}")
        return _read(wire.RetrieveFileOut.model_validate, document)

    # -- jobs --------------------------------------------------------------------------

    async def probe(self) -> None:
        """Request one job from the list, to check that the server serves jobs."""
        await self._jobs_page(JobFilters(), 0, 1)

    async def integrations(self) -> frozenset[str] | None:
        """Return the integrations that the server supports; None if unknown.

        The protocol has no operation for this; our gateway reports it at its health endpoint.
        """
        found = (await self.http.json("GET", "/health")).get("integrations")
        return frozenset(map(str, found)) if isinstance(found, list) else None

    async def _jobs_page(self, filters: JobFilters, page: int, page_size: int) -> dict[str, Any]:
        query = _query(page=page, page_size=page_size, **filters.model_dump())
        return await self.http.json("GET", _JOBS, query=query)

    async def iter_listed(
        self, filters: JobFilters | None = None
    ) -> AsyncGenerator[tuple[str, wire.Job | None], None]:
        """Yield every job id with its job, or None if the job does not match the protocol."""
        async with aclosing(self._entries(filters)) as pages:
            async for entries in pages:
                for entry in entries:
                    yield str(entry.get("id")), _job(entry)

    async def job_heads(
        self, filters: JobFilters | None = None
    ) -> AsyncGenerator[list[JobHead], None]:
        """Yield the heads of jobs page by page; jobs that do not match the protocol are skipped."""
        async with aclosing(self._entries(filters)) as pages:
            async for entries in pages:
                try:
                    yield msgspec.convert(entries, list[JobHead], strict=False)
                except msgspec.ValidationError:
                    yield [head for entry in entries if (head := _head(entry))]

    def _entries(
        self, filters: JobFilters | None
    ) -> AsyncGenerator[Sequence[Mapping[str, Any]], None]:
        async def fetch(page: int) -> tuple[Sequence[Mapping[str, Any]], int]:
            document = await self._jobs_page(filters or JobFilters(), page, PAGE_SIZE)
            data, total = document.get("data"), document.get("total")
            if not isinstance(data, list):
                raise ProtocolError(
                    "The server's job list is malformed.", excerpt=_excerpt(document)
                )
            found = [entry for entry in data if isinstance(entry, Mapping)]
            return found, total if isinstance(total, int) else 0

        return _paged(fetch, lambda entry: str(entry.get("id")))

    async def create_job(self, job: wire.JobIn) -> wire.Job:
        """Create a job. Not retried once it may have arrived.

        Raises:
            BackendUnavailable: `sent` tells whether the job may exist.
        """
        secrets = [SecretStr(entry.api_key) for entry in job.integrations or ()]
        secrets += [SecretStr(entry.token) for entry in job.repositories or ()]
        document = await self.http.json("POST", _JOBS, body=job.to_wire(), secrets=secrets)
        return _read(wire.read_job, document)

    async def get_job(self, job_id: str) -> wire.DetailedJob:
        """Retrieve a job with its events and checkpoints."""
        document = await self.http.json("GET", f"{_JOBS}/{path_segment(job_id)}")
        return _read(wire.read_detailed_job, document)

    async def start_job(self, job_id: str) -> wire.DetailedJob:
        """Start a validated job. Not retried once it may have arrived."""
        document = await self.http.json("POST", f"{_JOBS}/{path_segment(job_id)}/start")
        return _read(wire.read_detailed_job, document)

    async def cancel_job(self, job_id: str) -> wire.DetailedJob:
        """Cancel a job; safe to repeat."""
        path = f"{_JOBS}/{path_segment(job_id)}/cancel"
        return _read(wire.read_detailed_job, await self.http.json("POST", path, repeatable=True))

    # -- models ------------------------------------------------------------------------

    async def list_models(self) -> wire.ModelList:
        """List all models that the key may use."""
        return _read(wire.ModelList.model_validate, await self.http.json("GET", _MODELS))

    async def download_weights(self, model: str, directory: Path) -> None:
        """Write the weights of a fine-tuned model into an empty directory.

        An operation of our gateway only.
        """
        archive = directory / f".{secrets.token_hex(4)}.tar"
        path = f"{_MODELS}/{path_segment(model)}/weights"
        await self.http.download(path, archive, headers={"Accept": "application/x-tar"})
        await unpack(archive, directory)
        await anyio.Path(archive).unlink()

    async def chat(self, model: str, prompt: Prompt, *, max_tokens: int) -> str:
        """Return a model's answer to a user message or a conversation."""
        said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        body = {
            "model": model,
            "messages": said,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        text = ""
        async with aclosing(self.http.events(_CHAT, body=body, silence=_THINKS)) as events:
            async for event in events:
                if event.data == "[DONE]":
                    return text
                text += _content(event.data)
        raise BackendUnavailable("The answer of the model was cut.")


def _content(data: str) -> str:
    """Return the text of a chunk of an answer."""
    try:
        chunk = json.loads(data)
        (choice,) = chunk["choices"]
        return str(choice["delta"].get("content") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError("The server's answer is malformed.", excerpt=redact(data)) from None


async def _paged(
    fetch: Callable[[int], Awaitable[tuple[Sequence[_T], int]]], identify: Callable[[_T], str]
) -> AsyncGenerator[list[_T], None]:
    """Yield pages from 0 on, without entries of earlier pages.

    A page that is not full is the last one, unless the server reports a higher total: it may
    limit the page size.

    Raises:
        ProtocolError: There are more than a thousand pages.
    """
    seen: set[str] = set()
    for page in range(MAX_PAGES):
        found, total = await fetch(page)
        fresh = {identify(entry): entry for entry in found if identify(entry) not in seen}
        seen.update(fresh)
        yield list(fresh.values())
        # A server without paging returns the same page again: no new entries, the end.
        if not fresh or (len(found) < PAGE_SIZE and len(seen) >= total):
            return
    raise ProtocolError(
        f"The server's list is too long: {MAX_PAGES} pages, {len(seen)} entries.",
        hint="Check that the base URL is that of a server of this protocol.",
    )


def _job(entry: Mapping[str, Any]) -> wire.Job | None:
    try:
        return wire.read_job(entry)
    except ValidationError:
        log.warning("listed job is malformed", job=str(entry.get("id"))[:80])
        return None


def _head(entry: Mapping[str, Any]) -> JobHead | None:
    try:
        return msgspec.convert(entry, JobHead, strict=False)
    except msgspec.ValidationError:
        return None


def _query(**values: _QueryValue) -> list[tuple[str, str]]:
    """Return query parameters; None is omitted."""
    return [(name, _text(value)) for name, value in values.items() if value is not None]


def _text(value: str | float | datetime) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("times in filters need a time zone")
        return value.isoformat()
    return str(value)


def _read(reader: Callable[[Mapping[str, Any]], _M], document: Mapping[str, Any]) -> _M:
    try:
        return reader(document)
    except ValidationError as error:
        places = "; ".join(str(issue) for issue in validation_issues(error))
        raise ProtocolError(
            f"The server's response does not match the protocol: {places[:400]}.",
            excerpt=_excerpt(document),
        ) from None


def _excerpt(document: Mapping[str, Any]) -> str:
    """Serialize a document without secrets that a server may have repeated."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {name: without(inner) for name, inner in value.items()}
            return {name: kept[name] for name in kept if name not in {"api_key", "token"}}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return redact(json.dumps(without(document), ensure_ascii=False))
