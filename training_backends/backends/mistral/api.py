"""Typed client for the Mistral files, fine-tuning and models API."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import msgspec
from pydantic import BaseModel, SecretStr, ValidationError

from training_backends.core.errors import ProtocolError, RunNotFound
from training_backends.core.logging import get_logger, redact
from training_backends.http.client import HttpClient
from training_backends.http.upload import FileUpload, HashedFile, Progress
from training_backends.protocols.mistral import wire

__all__ = ["PAGE_SIZE", "JobFilters", "JobHead", "MistralAPI"]

log = get_logger()

PAGE_SIZE: Final = 100
"""Entries per page; the specification's default."""
_MOST_PAGES: Final = 1000
"""Maximum pages of a list, in case a server never ends it."""

_FILES: Final = "/v1/files"
_JOBS: Final = "/v1/fine_tuning/jobs"
_TUNED: Final = "/v1/fine_tuning/models"
_MODELS: Final = "/v1/models"

_M = TypeVar("_M")
_T = TypeVar("_T")
_QueryValue = str | int | float | bool | datetime | Sequence[str] | None


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
    """The operations of the specification over one HTTP client; has no other state.

    Every method raises the errors of `error_from_answer`, and `ProtocolError` for a response
    that does not match the specification.
    """

    def __init__(self, http: HttpClient) -> None:
        self._http = http

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # -- files -------------------------------------------------------------------------

    async def upload_file(
        self,
        path: Path,
        *,
        purpose: str | None = "fine-tune",
        filename: str | None = None,
        expiry: int | None = None,
        visibility: str | None = None,
        hashed: HashedFile | None = None,
        on_progress: Progress | None = None,
    ) -> wire.UploadFileOut:
        """Upload a file as a stream; the same name and content returns the same file.

        Args:
            expiry: Hours until the server deletes it.
            hashed: Expected content, verified before the upload is complete.
            on_progress: Called with the bytes read and the total.

        Raises:
            DatasetError: The file cannot be read, is empty or changed during the upload.
        """
        given = {"expiry": expiry, "visibility": visibility, "purpose": purpose}
        fields = {name: str(value) for name, value in given.items() if value is not None}
        upload = FileUpload(
            path, fields=fields, filename=filename, hashed=hashed, on_progress=on_progress
        )
        return _read(wire.UploadFileOut.model_validate, await self._http.upload(_FILES, upload))

    async def list_files(
        self,
        *,
        page: int | None = None,
        page_size: int | None = None,
        include_total: bool | None = None,
        sample_type: Sequence[str] | None = None,
        source: Sequence[str] | None = None,
        search: str | None = None,
        purpose: str | None = None,
        mimetypes: Sequence[str] | None = None,
    ) -> wire.ListFilesOut:
        """Return one page of files; pages count from 0."""
        query = _query(
            page=page,
            page_size=page_size,
            include_total=include_total,
            sample_type=sample_type,
            source=source,
            search=search,
            purpose=purpose,
            mimetypes=mimetypes,
        )
        return _read(
            wire.ListFilesOut.model_validate, await self._http.json("GET", _FILES, query=query)
        )

    async def iter_files(
        self,
        *,
        sample_type: Sequence[str] | None = None,
        source: Sequence[str] | None = None,
        search: str | None = None,
        purpose: str | None = None,
        mimetypes: Sequence[str] | None = None,
    ) -> AsyncGenerator[wire.FileSchema, None]:
        """Yield every file, page by page, each once."""

        async def fetch(page: int) -> tuple[list[wire.FileSchema], int]:
            found = await self.list_files(
                page=page,
                page_size=PAGE_SIZE,
                include_total=False,
                sample_type=sample_type,
                source=source,
                search=search,
                purpose=purpose,
                mimetypes=mimetypes,
            )
            return found.data, found.total or 0

        async with aclosing(_paged(fetch, lambda file: file.id)) as pages:
            async for files in pages:
                for file in files:
                    yield file

    async def retrieve_file(self, file_id: str) -> wire.RetrieveFileOut:
        """Retrieve a file's metadata."""
        document = await self._http.json("GET", f"{_FILES}/{_segment(file_id)}")
        return _read(wire.RetrieveFileOut.model_validate, document)

    async def download_file(
        self, file_id: str, target: Path, *, on_progress: Progress | None = None
    ) -> Path:
        """Download a file's content to `target`, atomically."""
        path = f"{_FILES}/{_segment(file_id)}/content"
        return await self._http.download(path, target, on_progress=on_progress)

    async def get_signed_url(self, file_id: str, *, expiry: int | None = None) -> str:
        """Return a signed URL of a file, valid for `expiry` hours (default 24)."""
        path = f"{_FILES}/{_segment(file_id)}/url"
        document = await self._http.json("GET", path, query=_query(expiry=expiry))
        return _read(wire.FileSignedURL.model_validate, document).url

    async def delete_file(self, file_id: str) -> wire.DeleteFileOut:
        """Delete a file."""
        document = await self._http.json("DELETE", f"{_FILES}/{_segment(file_id)}")
        return _read(wire.DeleteFileOut.model_validate, document)

    # -- jobs --------------------------------------------------------------------------

    async def list_jobs(
        self,
        filters: JobFilters | None = None,
        *,
        page: int | None = None,
        page_size: int | None = None,
    ) -> wire.JobsOut:
        """Return one page of jobs, without their events and checkpoints.

        Raises:
            ValueError: A time of `filters` has no zone.
        """
        return _read(wire.JobsOut.model_validate, await self._jobs_page(filters, page, page_size))

    @property
    def clock_offset(self) -> timedelta | None:
        """How far the server's clock was ahead at the last response; None if unknown."""
        return self._http.clock_offset

    async def probe(self) -> None:
        """Request one job from the list, to check that the server serves jobs."""
        await self._jobs_page(None, 0, 1)

    async def integrations(self) -> frozenset[str] | None:
        """Return the integrations that the server supports; None if unknown.

        The protocol has no operation for this; our gateway reports it at its health endpoint.
        """
        found = (await self._http.json("GET", "/health")).get("integrations")
        return frozenset(map(str, found)) if isinstance(found, list) else None

    async def _jobs_page(
        self, filters: JobFilters | None, page: int | None, page_size: int | None
    ) -> dict[str, Any]:
        chosen = (filters or JobFilters()).model_dump()
        query = _query(page=page, page_size=page_size, **chosen)
        return await self._http.json("GET", _JOBS, query=query)

    async def iter_jobs(self, filters: JobFilters | None = None) -> AsyncGenerator[wire.Job, None]:
        """Yield every job, a hundred a request, each once."""

        async def fetch(page: int) -> tuple[Sequence[wire.Job], int]:
            found = await self.list_jobs(filters, page=page, page_size=PAGE_SIZE)
            return found.data, found.total

        async with aclosing(_paged(fetch, lambda job: job.id)) as pages:
            async for jobs in pages:
                for job in jobs:
                    yield job

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
            document = await self._jobs_page(filters, page, PAGE_SIZE)
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
        return _read(wire.read_job, await self._create(job))

    async def dry_run_job(self, job: wire.JobIn) -> wire.LegacyJobMetadataOut:
        """Estimate a job without creating it."""
        return _read(
            wire.LegacyJobMetadataOut.model_validate, await self._create(job, dry_run=True)
        )

    async def _create(self, job: wire.JobIn, *, dry_run: bool | None = None) -> dict[str, Any]:
        secrets = [SecretStr(entry.api_key) for entry in job.integrations or ()]
        secrets += [SecretStr(entry.token) for entry in job.repositories or ()]
        return await self._http.json(
            "POST",
            _JOBS,
            query=_query(dry_run=dry_run),
            body=job.to_wire(),
            repeatable=bool(dry_run),
            secrets=secrets,
        )

    async def get_job(self, job_id: str) -> wire.DetailedJob:
        """Retrieve a job with its events and checkpoints."""
        document = await self._http.json("GET", f"{_JOBS}/{_segment(job_id)}")
        return _read(wire.read_detailed_job, document)

    async def start_job(self, job_id: str) -> wire.DetailedJob:
        """Start a validated job. Not retried once it may have arrived."""
        document = await self._http.json("POST", f"{_JOBS}/{_segment(job_id)}/start")
        return _read(wire.read_detailed_job, document)

    async def cancel_job(self, job_id: str) -> wire.DetailedJob:
        """Cancel a job; safe to repeat."""
        path = f"{_JOBS}/{_segment(job_id)}/cancel"
        return _read(wire.read_detailed_job, await self._http.json("POST", path, repeatable=True))

    # -- models ------------------------------------------------------------------------

    async def list_models(
        self, *, provider: str | None = None, model: str | None = None
    ) -> wire.ModelList:
        """List all models that the key may use."""
        query = _query(provider=provider, model=model)
        return _read(
            wire.ModelList.model_validate, await self._http.json("GET", _MODELS, query=query)
        )

    async def retrieve_model(self, model_id: str) -> wire.ModelCard:
        """Retrieve a model."""
        document = await self._http.json("GET", f"{_MODELS}/{_segment(model_id)}")
        return _read(wire.read_model_card, document)

    async def delete_model(self, model_id: str) -> wire.DeleteModelOut:
        """Delete a fine-tuned model."""
        document = await self._http.json("DELETE", f"{_MODELS}/{_segment(model_id)}")
        return _read(wire.DeleteModelOut.model_validate, document)

    async def update_model(self, model_id: str, changes: wire.UpdateFTModelIn) -> wire.FTModel:
        """Update a fine-tuned model's name or description; only set fields are sent."""
        document = await self._http.json(
            "PATCH",
            f"{_TUNED}/{_segment(model_id)}",
            body=changes.model_dump(mode="json", exclude_unset=True),
            repeatable=True,
        )
        return _read(wire.read_ft_model, document)

    async def archive_model(self, model_id: str) -> wire.ArchiveFTModelOut:
        """Archive a fine-tuned model; safe to repeat."""
        path = f"{_TUNED}/{_segment(model_id)}/archive"
        document = await self._http.json("POST", path, repeatable=True)
        return _read(wire.ArchiveFTModelOut.model_validate, document)

    async def unarchive_model(self, model_id: str) -> wire.UnarchiveFTModelOut:
        """Unarchive a fine-tuned model; safe to repeat."""
        path = f"{_TUNED}/{_segment(model_id)}/archive"
        document = await self._http.json("DELETE", path, repeatable=True)
        return _read(wire.UnarchiveFTModelOut.model_validate, document)


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
    for page in range(_MOST_PAGES):
        found, total = await fetch(page)
        fresh = {identify(entry): entry for entry in found if identify(entry) not in seen}
        seen.update(fresh)
        yield list(fresh.values())
        # A server without paging returns the same page again: no new entries, the end.
        if not fresh or (len(found) < PAGE_SIZE and len(seen) >= total):
            return
    raise ProtocolError(
        f"The server's list is too long: {_MOST_PAGES} pages, {len(seen)} entries.",
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
    """Return query parameters; None is omitted, a list repeats its key."""
    query: list[tuple[str, str]] = []
    for name, value in values.items():
        if value is None:
            continue
        entries = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
        query += [(name, _text(entry)) for entry in entries]
    return query


def _text(value: str | float | datetime) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("times in filters need a time zone")
        return value.isoformat()
    return str(value)


def _segment(identifier: str) -> str:
    """Quote an id for a path; `ft:a:b` is not escaped, as in the official client."""
    if identifier.strip("./ ") == "":
        # An empty id would address the collection, perhaps to delete it.
        raise RunNotFound(f"Invalid id {identifier!r}.")
    return quote(identifier, safe=":")


def _read(reader: Callable[[Mapping[str, Any]], _M], document: Mapping[str, Any]) -> _M:
    try:
        return reader(document)
    except ValidationError as error:
        places = "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            for detail in error.errors(
                include_input=False, include_url=False, include_context=False
            )
        )
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
