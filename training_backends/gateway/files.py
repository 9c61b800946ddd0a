"""Uploaded files."""

import errno
import re
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import anyio
import sqlalchemy as sa
from anyio import to_thread
from pydantic import ValidationError
from starlette.responses import Response

from training_backends.core.config import DataSource, TrainingConfig
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.logging import get_logger
from training_backends.gateway.errors import HTTPProblem, invalid, misfit, not_found, plain
from training_backends.gateway.keys import Principal
from training_backends.gateway.projects import check_bytes
from training_backends.gateway.repetition import Repetition
from training_backends.gateway.store import (
    COUNTED_AHEAD,
    GatewayStore,
    page_at,
    page_of,
    present,
)
from training_backends.gateway.uploads import (
    FORM_OVERHEAD,
    BlobStore,
    FileFacts,
    Incoming,
    MinimumSpeed,
    Upload,
    read_facts,
    read_openai_facts,
    receive,
    too_large,
)
from training_backends.protocols.mistral.status import ENDED
from training_backends.protocols.mistral.wire import (
    FILE_PURPOSES,
    FILE_VISIBILITIES,
    DeleteFileOut,
    FileSchema,
    ListFilesOut,
    RetrieveFileOut,
    UploadFileOut,
)
from training_backends.protocols.openai.requests import ExpiresAfterIn
from training_backends.protocols.openai.wire import FILE_PURPOSES as OPENAI_PURPOSES
from training_backends.store.gateway_schema import IS_OPEN, files, jobs

__all__ = [
    "OPENAI_UPLOAD",
    "RESULTS_PURPOSE",
    "Exclusive",
    "FileFilters",
    "FileService",
    "StoredFile",
    "UploadRules",
    "clean_name",
    "file_ids",
    "names_by_path",
    "one_of",
    "tuned_path",
    "use_files",
]

log = get_logger()

RESULTS_PURPOSE: Final = "fine-tune-results"
"""Of the files that the gateway writes; the Mistral API does not list them."""
SWEEP_EVERY = 3600.0
"""Seconds between two removals of expired files."""
_EXPIRED: Final = 200
"""Files that are deleted in one transaction."""
_MAX_EXPIRY_HOURS = 24 * 365 * 10
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFilters:
    """Which files to list; None does not filter."""

    sample_type: Sequence[str] | None = None
    source: Sequence[str] | None = None
    search: str | None = None
    purpose: str | None = None
    mimetypes: Sequence[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRules:
    """What an API accepts as an upload.

    Attributes:
        default_purpose: None: the form must name one.
        lifetime: Returns the seconds until the file expires; None: never.
        read_facts: Checks the received file for its purpose.
    """

    purposes: Sequence[str]
    default_purpose: str | None
    lifetime: Callable[[Mapping[str, str]], int | None]
    read_facts: Callable[[Path, str], FileFacts]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as seen by downloads and jobs."""

    id: str
    filename: str
    purpose: str
    sha256: str
    source: DataSource


_Freed = list[tuple[str, int]]
Exclusive = Callable[[str], AbstractAsyncContextManager[object]]
"""Excludes all other gateways from a block, by the name of what it changes."""


class FileService:
    """Receives, lists, serves and deletes files.

    Args:
        exclusive: For blobs that other gateways share.
    """

    def __init__(
        self,
        store: GatewayStore,
        blobs: BlobStore,
        *,
        limit: int,
        pace: MinimumSpeed,
        exclusive: Exclusive,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._limit = limit
        self._pace = pace
        self._exclusive = exclusive
        self._lock = anyio.Lock()

    async def open(self) -> None:
        """Create the directories and clean up after a crash."""
        await to_thread.run_sync(self._blobs.prepare)
        if not self._blobs.is_shared:
            await self.collect_leftovers()

    def check(self) -> None:
        """Check that files can be read. Blocking.

        Raises:
            FileStorageUnavailable: The object store cannot be used.
            OSError: The directory cannot be read.
        """
        self._blobs.check()

    async def collect_leftovers(self) -> None:
        """Remove what crashes of gateways left behind."""
        known = await self._store.aread(_known)
        await to_thread.run_sync(self._blobs.collect, known)

    @asynccontextmanager
    async def _alone(self, sha256: str) -> AsyncGenerator[None, None]:
        """Change a blob together with the rows that refer to it."""
        if self._blobs.is_shared:
            async with self._exclusive(f"blob:{sha256}"):
                yield
            return
        async with self._lock:
            with ExitStack() as held:
                await to_thread.run_sync(held.enter_context, self._blobs.alone())
                yield

    async def upload(
        self,
        chunks: AsyncIterator[bytes],
        *,
        content_type: str,
        content_length: int | None,
        caller: Principal,
        rules: UploadRules | None = None,
        repetition: Repetition | None = None,
    ) -> UploadFileOut:
        """Receive a file; uploading the same name and content again returns the same file.

        Args:
            rules: Default: those of the Mistral API.
            repetition: What alone makes an upload refer to the same file; None: nothing else.

        Raises:
            HTTPProblem: The file is too large, too slow, invalid, or does not fit on the disk.
        """
        async with self.receiving(content_length, self._limit) as incoming:
            form = await receive(chunks, content_type, incoming, limit=self._limit, pace=self._pace)
            return await self.accept(
                form, incoming, caller, rules or _MISTRAL_UPLOAD, repetition=repetition
            )

    @asynccontextmanager
    async def receiving(self, length: int | None, limit: int) -> AsyncIterator[Incoming]:
        """Yield a new temporary file, deleted at the end unless it was kept.

        Args:
            length: Bytes that will arrive, if known.
            limit: Maximum bytes of the file.

        Raises:
            HTTPProblem: It is too large, or does not fit on the disk.
        """
        if length is not None:
            if length > limit + FORM_OVERHEAD:
                raise too_large(limit)
            if length > await to_thread.run_sync(self._blobs.free):
                raise _disk_full()
        try:
            async with self._temporary() as incoming:
                yield incoming
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            log.error("disk full during upload", reason=str(error))  # noqa: TRY400
            raise _disk_full() from error

    @asynccontextmanager
    async def _temporary(self) -> AsyncIterator[Incoming]:
        incoming = await to_thread.run_sync(self._blobs.receive)
        try:
            yield incoming
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(incoming.discard)

    async def accept(
        self,
        form: Upload,
        incoming: Incoming,
        caller: Principal,
        rules: UploadRules,
        *,
        repetition: Repetition | None = None,
        also: Callable[[sa.Connection, str], object] | None = None,
    ) -> UploadFileOut:
        """Check a received file and store it.

        Args:
            form: Its name and purpose.
            repetition: As for `upload`.
            also: Called in the same transaction with the id of the file.

        Raises:
            HTTPProblem: It is invalid.
        """
        row = _new_row(form, incoming, caller, rules)
        facts = await to_thread.run_sync(rules.read_facts, incoming.path, row["purpose"])
        row.update(num_lines=facts.num_lines, sample_type=facts.sample_type)
        row["idempotency_key"] = repetition.key if repetition else None

        def work(connection: sa.Connection) -> Any:
            found = _uploaded_before(connection, row, caller, repetition)
            if found is None:
                check_bytes(connection, caller.project, row["bytes"])
                connection.execute(files.insert().values(row))
                caller.record(connection, "file.create", row["id"])
                mine = sa.select(files).where(files.c.id == row["id"])
                found = connection.execute(mine).first()
            else:
                use_files(connection, [found.id])
            if also is not None:
                also(connection, found.id)
            return found

        async with self._alone(incoming.sha256):
            await to_thread.run_sync(self._blobs.keep, incoming)
            return UploadFileOut(**_wire(await self._store.awrite(work)))

    async def list(
        self,
        filters: FileFilters,
        caller: Principal,
        *,
        page: int,
        page_size: int,
        include_total: bool,
    ) -> ListFilesOut:
        """Return one page of files, newest first.

        The total counts at most `COUNTED_AHEAD` files after the page.
        """
        mine = caller.sees(files.c.project), files.c.purpose != RESULTS_PURPOSE
        conditions = [*present(), *mine, *_conditions(filters)]
        order = files.c.created_at.desc(), files.c.id.desc()
        skip = page * page_size
        found = sa.select(files.c.id).where(*conditions).order_by(*order)
        ahead = found.limit(skip + page_size + COUNTED_AHEAD).subquery()

        def work(connection: sa.Connection) -> ListFilesOut:
            total = None
            if include_total:
                counting = sa.select(sa.func.count()).select_from(ahead)
                total = connection.execute(counting).scalar_one()
            rows = page_at(
                connection, files, [*files.c], conditions, order, skip=skip, size=page_size
            )
            data = [FileSchema(**_wire(row)) for row in rows]
            return ListFilesOut(data=data, total=total)

        return await self._store.aread(work)

    async def page(
        self,
        caller: Principal,
        *,
        after: str | None,
        limit: int,
        descending: bool = True,
        purpose: str | None = None,
    ) -> tuple[Sequence[FileSchema], bool]:
        """Return the files that follow `after`, by time, and whether there are more.

        Args:
            after: Id of a file, which may be deleted by now.

        Raises:
            HTTPProblem: No file ever had the id `after`.
        """
        mine = caller.sees(files.c.project)
        conditions = [*present(), mine, *_conditions(FileFilters(purpose=purpose))]

        def work(connection: sa.Connection) -> Sequence[Any]:
            query = sa.select(files).where(*conditions)
            return page_of(
                connection,
                query,
                files,
                visible=mine,
                after=after,
                limit=limit,
                descending=descending,
            )

        rows = await self._store.aread(work)
        return [FileSchema(**_wire(row)) for row in rows[:limit]], len(rows) > limit

    async def retrieve(self, file_id: str, caller: Principal) -> RetrieveFileOut:
        """Return a file's metadata."""
        return RetrieveFileOut(**_wire(await self._row(file_id, caller)))

    async def stored(self, file_id: str, caller: Principal) -> StoredFile:
        """Return a file with its path."""
        return self._stored(await self._row(file_id, caller))

    async def linked(self, file_id: str) -> StoredFile:
        """Return the file of a signed URL, whatever its project."""
        return await self.stored(file_id, Principal("link", admin=True))

    def find(
        self, connection: sa.Connection, file_ids: Sequence[str], project: str
    ) -> dict[str, StoredFile]:
        """Return the files that exist in the project, by id."""
        mine = files.c.id.in_(file_ids), files.c.project == project
        query = sa.select(files).where(*mine, *present())
        return {row.id: self._stored(row) for row in connection.execute(query)}

    async def delete(self, file_id: str, caller: Principal) -> DeleteFileOut:
        """Delete a file; its content is kept while another file or an unfinished job needs it."""
        row = await self._row(file_id, caller)
        gone = files.update().where(files.c.id == file_id).values(deleted_at=time.time())

        def work(connection: sa.Connection) -> None:
            connection.execute(gone)
            caller.record(connection, "file.delete", file_id)

        async with self._alone(row.sha256):
            await self._store.awrite(work)
        await self.collect([row.sha256])
        return DeleteFileOut(id=file_id)

    async def sweep(self) -> None:
        """Delete expired files periodically; runs until cancelled."""
        while True:
            await anyio.sleep(SWEEP_EVERY)
            try:
                await self.collect(await self._store.awrite(_delete_expired))
                if self._blobs.is_shared:
                    await self.collect_leftovers()
            except Exception:  # must not stop the gateway
                log.exception("expired files not removed")

    async def collect(self, digests: Iterable[str]) -> set[str]:
        """Remove those of the given blobs that nothing refers to, and return them."""
        removed = set()
        for digest in set(digests):
            async with self._alone(digest):
                if digest not in await self._store.aread(partial(_needed, digests={digest})):
                    await to_thread.run_sync(self._blobs.remove, digest)
                    removed.add(digest)
        return removed

    async def used(self, job: Any) -> None:
        """Record that a job has used its files until now."""
        await self._store.awrite(lambda c: use_files(c, file_ids(job)))

    async def expire(
        self, project: str, before: float, actor: Principal, *, dry_run: bool = False
    ) -> Sequence[tuple[str, int]]:
        """Delete the files of a project that were not used since a time.

        A file of an unfinished job is in use.

        Args:
            before: In seconds since the epoch.
            actor: Who deletes, for the audit log.
            dry_run: Change nothing.

        Returns:
            The id of each file, and the bytes that its deletion frees: none while its content is
            needed otherwise.
        """
        expired = _Freed()
        place = (0.0, "")
        while True:

            def work(connection: sa.Connection, after: tuple[float, str] = place) -> Any:
                page = _unused(connection, project, before, after)
                busy = _ids_in_use(connection)
                rows = [row for row in page if row.id not in busy]
                if not dry_run:
                    ids = [row.id for row in rows]
                    gone = files.update().where(files.c.id.in_(ids))
                    connection.execute(gone.values(deleted_at=time.time()))
                    for file_id in ids:
                        actor.record(connection, "file.expire", file_id)
                return page, rows

            page, rows = await (self._store.aread(work) if dry_run else self._store.awrite(work))
            if not page:
                return expired
            place = page[-1].created_at, page[-1].id
            sizes = {row.sha256: row.bytes for row in rows}
            if dry_run:
                ids = {row.id for row in rows}
                kept = await self._store.aread(partial(_needed, digests={*sizes}, without=ids))
                freed = sizes.keys() - kept
            else:
                freed = await self.collect(sizes)
            for row in rows:
                expired.append((row.id, row.bytes if row.sha256 in freed else 0))
                freed.discard(row.sha256)  # once for all files of the same content

    async def add(
        self,
        content: bytes,
        *,
        file_id: str,
        filename: str,
        purpose: str,
        mimetype: str,
        owner: Any,
    ) -> None:
        """Store a file that the gateway itself has written; no effect if the id exists.

        Args:
            owner: Row of the job that it belongs to.

        Raises:
            OSError: The disk is full.
        """
        row = {
            "id": file_id,
            "filename": filename,
            "bytes": len(content),
            "purpose": purpose,
            "sample_type": "instruct",
            "source": "mistral",  # the word for the service itself
            "mimetype": mimetype,
            "visibility": "workspace",
            "created_at": time.time(),
            "created_by": owner.created_by,
            "project": owner.project,
        }

        def work(connection: sa.Connection) -> None:
            mine = sa.select(files.c.id).where(files.c.id == file_id)
            if connection.execute(mine).first() is None:
                connection.execute(files.insert().values(row))

        async with self._temporary() as incoming:
            await to_thread.run_sync(incoming.write, content)
            await to_thread.run_sync(incoming.finish)
            row["sha256"] = incoming.sha256
            async with self._alone(incoming.sha256):
                await to_thread.run_sync(self._blobs.keep, incoming)
                await self._store.awrite(work)

    def _stored(self, row: Any) -> StoredFile:
        source = self._blobs.source(row.sha256)
        return StoredFile(row.id, row.filename, row.purpose, row.sha256, source)

    async def content(self, file: StoredFile, headers: Mapping[str, str]) -> Response:
        """Return the response with a file's content.

        Args:
            headers: Those of the request, which may ask for a range.
        """
        response = await self._blobs.response(file.sha256, file.filename, headers)
        if response is None:
            raise not_found("file")
        return response

    async def signed_url(self, file: StoredFile, hours: int) -> str | None:
        """Return a URL of the object store for a file; None: the gateway has to make one."""
        return await to_thread.run_sync(
            partial(self._blobs.sign, file.sha256, seconds=hours * 3600, filename=file.filename)
        )

    async def names(self, job: Any) -> dict[str, str]:
        """Return the names of a job's files, including deleted ones, and of its model, by path.

        Other files of the same content have the same path, and are not this job's business.
        """
        ids = file_ids(job)
        query = sa.select(files).where(files.c.id.in_(ids))
        rows = await self._store.aread(lambda connection: connection.execute(query).all())
        rows = sorted(rows, key=lambda row: ids.index(row.id))
        names = names_by_path(self._stored(row) for row in rows)
        for row in rows:
            for place in await to_thread.run_sync(self._blobs.conversions, row.sha256):
                names[place] = names[str(self._blobs.source(row.sha256))]
        return names | tuned_path(job.model, TrainingConfig.model_validate_json(job.config))

    async def converted(
        self, config: TrainingConfig, provider_format: ProviderFormat
    ) -> TrainingConfig:
        """Return a job's configuration with its data in a provider's format.

        Rows that have no such form are left as they are, for the validation to report.

        Raises:
            DatasetError: A file cannot be read.
        """

        def work() -> TrainingConfig:
            parts = {
                name: tuple(
                    self._blobs.convert(source, provider_format)
                    for source in getattr(config.data, name)
                )
                for name in ("train", "validation")
            }
            return config.model_copy(update={"data": config.data.model_copy(update=parts)})

        return await to_thread.run_sync(work)

    async def _row(self, file_id: str, caller: Principal) -> Any:
        visible = *present(), caller.sees(files.c.project)
        query = sa.select(files).where(files.c.id == file_id, *visible)
        row = await self._store.aread(lambda connection: connection.execute(query).first())
        if row is None:
            raise not_found("file")
        return row


def _uploaded_before(
    connection: sa.Connection,
    row: Mapping[str, Any],
    caller: Principal,
    repetition: Repetition | None,
) -> Any:
    """Return the row of the file that an upload repeats, or None."""
    alike = ("project", "filename", "sha256", "purpose")
    same = sa.and_(*(files.c[name] == row[name] for name in alike))
    if repetition is None:
        return connection.execute(sa.select(files).where(same, *present())).first()
    mine = sa.and_(caller.made(files), *present())
    return repetition.first(connection, files, mine=mine, same=same, key=files.c.idempotency_key)


def tuned_path(name: str, config: TrainingConfig) -> dict[str, str]:
    """Return the path and the name of the fine-tuned model that a job starts from, if it does."""
    return {config.model: name} if config.model and name.startswith("ft:") else {}


def names_by_path(found: Iterable[StoredFile]) -> dict[str, str]:
    """Return the names of files by path; files with the same content share a path."""
    names: dict[str, dict[str, None]] = {}
    for file in found:
        names.setdefault(str(file.source), {})[file.filename] = None
    return {path: " / ".join(shared) for path, shared in names.items()}


def _new_row(
    form: Upload, incoming: Incoming, caller: Principal, rules: UploadRules
) -> dict[str, Any]:
    """Validate a form's fields and return the file's row."""
    if form.filename is None:
        raise invalid(["body", "file"], "Field required", "missing")
    if incoming.size == 0:
        raise invalid(["body", "file"], "The file is empty.")
    purpose = form.fields.get("purpose") or rules.default_purpose
    if purpose is None:
        raise invalid(["body", "purpose"], "Field required", "missing")
    visibility = form.fields.get("visibility") or "workspace"
    one_of("purpose", purpose, rules.purposes)
    one_of("visibility", visibility, FILE_VISIBILITIES)
    if visibility == "user":
        raise invalid(
            ["body", "visibility"],
            "Private files are not supported: every key of a project can see the project's files. "
            "Omit visibility, or use a key of a separate project.",
        )
    now = time.time()
    lifetime = rules.lifetime(form.fields)
    return {
        "id": str(uuid4()),
        "filename": clean_name(form.filename),
        "sha256": incoming.sha256,
        "bytes": incoming.size,
        "purpose": purpose,
        "source": "upload",
        "mimetype": _mimetype(purpose, form.content_type),
        "visibility": visibility,
        "created_at": now,
        "created_by": caller.key_id,
        "project": caller.project,
        "expires_at": None if lifetime is None else now + lifetime,
    }


def one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    """Reject a value that is none of those allowed."""
    if value not in allowed:
        wanted = " or ".join(repr(word) for word in allowed)
        raise invalid(["body", field], f"Input should be {wanted}", "enum")


def _hours(fields: Mapping[str, str]) -> int | None:
    hours = fields.get("expiry")
    if not hours:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", hours) or not 1 <= int(hours) <= _MAX_EXPIRY_HOURS:
        raise invalid(
            ["body", "expiry"], f"Input should be a number of hours, 1 to {_MAX_EXPIRY_HOURS}"
        )
    return int(hours) * 3600


def _expires_after(fields: Mapping[str, str]) -> int | None:
    names = ("anchor", "seconds")
    given = {n: fields[f"expires_after[{n}]"] for n in names if f"expires_after[{n}]" in fields}
    try:
        return ExpiresAfterIn.model_validate(given).seconds if given else None
    except ValidationError as error:
        raise misfit(["body", "expires_after"], error) from None


_MISTRAL_UPLOAD: Final = UploadRules(
    purposes=FILE_PURPOSES, default_purpose="fine-tune", lifetime=_hours, read_facts=read_facts
)
OPENAI_UPLOAD: Final = UploadRules(
    purposes=OPENAI_PURPOSES,
    default_purpose=None,
    lifetime=_expires_after,
    read_facts=read_openai_facts,
)


def upload_of(provider_format: ProviderFormat) -> UploadRules:
    """Return the rules for people, whose files are checked for what the backend trains on."""
    return replace(_MISTRAL_UPLOAD, read_facts=partial(read_facts, provider_format=provider_format))


def clean_name(filename: str, field: str = "file") -> str:
    """Return the last part of a name, without the client's directories.

    Args:
        field: Field of the request that has the name.
    """
    name = re.split(r"[\\/]", filename)[-1].strip()
    name = "".join(char for char in name if char.isprintable())[:255]
    if name in {"", ".", ".."}:
        raise invalid(["body", field], "The file name is empty.")
    return name


def _mimetype(purpose: str, content_type: str | None) -> str:
    if purpose in {"fine-tune", "batch"}:
        return "application/jsonl"
    return content_type or "application/octet-stream"


def _disk_full() -> HTTPProblem:
    return plain(507, "Not enough disk space on the gateway for this file.")


def _delete_expired(connection: sa.Connection) -> Sequence[str]:
    """Mark expired files as deleted and return their digests."""
    over = files.c.deleted_at.is_(None), files.c.expires_at <= time.time()
    digests = connection.execute(sa.select(files.c.sha256).where(*over)).scalars().all()
    connection.execute(files.update().where(*over).values(deleted_at=files.c.expires_at))
    return digests


def use_files(connection: sa.Connection, ids: Collection[str]) -> None:
    """Record that files are used now, so that retention keeps them."""
    connection.execute(files.update().where(files.c.id.in_(ids)).values(used_at=time.time()))


def file_ids(job: Any) -> list[str]:
    """Return the ids of the files of a job."""
    return [*(file["file_id"] for file in job.training_files), *job.validation_files]


def _unused(
    connection: sa.Connection, project: str, before: float, after: tuple[float, str]
) -> Sequence[Any]:
    """Return the next uploaded files of a project that were not used since a time."""
    place = sa.tuple_(files.c.created_at, files.c.id)
    unused = files.c.used_at.is_(None) | (files.c.used_at < before)
    found = sa.select(files).where(
        *(files.c.project == project, files.c.deleted_at.is_(None), files.c.source == "upload"),
        *(files.c.created_at < before, place > after, unused),
    )
    return connection.execute(found.order_by(files.c.created_at, files.c.id).limit(_EXPIRED)).all()


def _ids_in_use(connection: sa.Connection) -> set[str]:
    """Return the ids of the files of unfinished jobs."""
    columns = jobs.c.training_files, jobs.c.validation_files
    unfinished = sa.select(*columns).where(IS_OPEN, jobs.c.status.not_in(ENDED))
    return {each for row in connection.execute(unfinished) for each in file_ids(row)}


def _needed(
    connection: sa.Connection,
    digests: Collection[str] | None = None,
    without: Collection[str] = (),
) -> set[str]:
    """Return the digests that an existing file or an unfinished job refers to.

    Args:
        digests: Look for these only; None: all.
        without: Ids of files that do not count.
    """
    query = sa.select(files.c.sha256).where(*present())
    if digests is not None:
        query = query.where(files.c.sha256.in_(digests), files.c.id.not_in(without))
    found = set(connection.execute(query).scalars())
    for blobs in connection.execute(
        sa.select(jobs.c.blobs).where(IS_OPEN, jobs.c.status.not_in(ENDED))
    ):
        found.update(blobs[0])
    return found


def _known(connection: sa.Connection) -> dict[str, float | None]:
    """Return the `known` argument of `BlobStore.collect`."""
    deleted = sa.func.max(sa.func.coalesce(files.c.deleted_at, files.c.expires_at))
    query = sa.select(files.c.sha256, deleted).group_by(files.c.sha256)
    needed = _needed(connection)
    return {
        sha256: None if sha256 in needed else deleted_at
        for sha256, deleted_at in connection.execute(query)
    }


def _conditions(filters: FileFilters) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = []
    if filters.sample_type:
        conditions.append(files.c.sample_type.in_(filters.sample_type))
    if filters.source:
        conditions.append(files.c.source.in_(filters.source))
    if filters.search:
        conditions.append(files.c.filename.icontains(filters.search, autoescape=True))
    if filters.purpose:
        conditions.append(files.c.purpose == filters.purpose)
    if filters.mimetypes:
        conditions.append(files.c.mimetype.in_(filters.mimetypes))
    return conditions


def _wire(row: Any) -> dict[str, Any]:
    return {
        "id": row.id,
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "sample_type": row.sample_type,
        "num_lines": row.num_lines,
        "mimetype": row.mimetype,
        "source": row.source,
        "signature": row.sha256[:16],
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "visibility": row.visibility,
    }
