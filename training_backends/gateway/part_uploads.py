"""Files that clients of the OpenAI API upload in parts."""

import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import uuid4

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.core.logging import get_logger
from training_backends.gateway.errors import HTTPProblem, invalid, not_found, problem
from training_backends.gateway.files import (
    OPENAI_UPLOAD,
    Exclusive,
    FileService,
    clean_name,
    one_of,
)
from training_backends.gateway.keys import Principal
from training_backends.gateway.openai_ids import PART, internal_id
from training_backends.gateway.projects import check_bytes
from training_backends.gateway.repetition import Repetition
from training_backends.gateway.store import GatewayStore
from training_backends.gateway.uploads import (
    BlobStore,
    Incoming,
    MinimumSpeed,
    Upload,
    receive,
    too_large,
)
from training_backends.protocols.mistral.wire import FileSchema
from training_backends.protocols.openai.errors import ErrorAnswer, wrong_state
from training_backends.protocols.openai.requests import CompleteUploadIn, UploadIn
from training_backends.store.gateway_schema import parts, uploads

__all__ = ["FoundUpload", "PartUploads"]

log = get_logger()

LASTS: Final = 3600.0
"""Seconds from the creation of an upload to its expiry, as at OpenAI."""
SWEEP_EVERY: Final = 300.0
_REMEMBERED: Final = 86400.0
"""Seconds for which a finished upload is known, for clients that repeat a request."""
_MAX_PART: Final = 64 * 2**20
"""Bytes; the official Python client sends parts of this size."""
_MOST_PARTS: Final = 5000
_MOST_PENDING: Final = 100
_LONGEST_TYPE: Final = 255


@dataclass(frozen=True, slots=True)
class FoundUpload:
    """The row of an upload, and its file once it is completed."""

    row: Any
    file: FileSchema | None = None


class PartUploads:
    """Receives the parts of uploads and joins them.

    A part is a file and a row. Files without a row, and rows of uploads that are over, are what
    a crash leaves behind; `open` and `sweep` remove them.

    Args:
        limit: Maximum bytes of a joined file.
        exclusive: Excludes other gateways from completing or cancelling the same upload.
    """

    def __init__(
        self,
        store: GatewayStore,
        files: FileService,
        blobs: BlobStore,
        *,
        limit: int,
        pace: MinimumSpeed,
        exclusive: Exclusive,
    ) -> None:
        self._store = store
        self._files = files
        self._blobs = blobs
        self._limit = limit
        self._pace = pace
        self._exclusive = exclusive
        # An upload is completed or cancelled by one request at a time.
        self._locks: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    async def open(self) -> None:
        """Remove what a crash left behind; in shared storage, `sweep` does."""
        if not self._blobs.is_shared:
            await self._expire()

    async def sweep(self) -> None:
        """Expire uploads periodically; runs until cancelled."""
        while True:
            await anyio.sleep(SWEEP_EVERY)
            try:
                await self._expire()
            except Exception:  # must not stop the gateway
                log.exception("expired uploads not removed")

    async def create(
        self, request: UploadIn, caller: Principal, repetition: Repetition
    ) -> FoundUpload:
        """Begin an upload, unless this repeats a request.

        Raises:
            HTTPProblem: The request is invalid, or the key has too many pending uploads.
        """
        one_of("purpose", request.purpose, OPENAI_UPLOAD.purposes)
        if request.bytes < 1:
            raise invalid(["body", "bytes"], "The file is empty.")
        if request.bytes > self._limit:
            raise invalid(["body", "bytes"], f"The limit is {self._limit} bytes.")
        mimetype = request.mime_type
        if len(mimetype) > _LONGEST_TYPE or not mimetype.isprintable():
            raise invalid(["body", "mime_type"], "Input should be a MIME type")
        now = time.time()
        row = {
            "id": str(uuid4()),
            "filename": clean_name(request.filename, "filename"),
            "purpose": request.purpose,
            "mimetype": mimetype,
            "bytes": request.bytes,
            "lifetime": request.expires_after.seconds if request.expires_after else None,
            "status": "pending",
            "created_at": now,
            "created_by": caller.key_id,
            "project": caller.project,
            "expires_at": now + LASTS,
            "idempotency_key": repetition.key,
        }
        alike = ("filename", "purpose", "mimetype", "bytes", "lifetime")
        same = sa.and_(*(uploads.c[name].is_not_distinct_from(row[name]) for name in alike))

        def work(connection: sa.Connection) -> Any:
            mine, key = caller.made(uploads), uploads.c.idempotency_key
            known = repetition.first(connection, uploads, mine=mine, same=same, key=key)
            if known is not None:
                return known
            _check_pending(connection, caller)
            check_bytes(connection, caller.project, request.bytes, with_uploads=True)
            connection.execute(uploads.insert().values(row))
            caller.record(connection, "upload.create", str(row["id"]))
            return _find(connection, str(row["id"]), caller)

        return await self._shown(await self._store.awrite(work))

    async def add(
        self,
        upload_id: str,
        chunks: AsyncIterator[bytes],
        *,
        content_type: str,
        content_length: int | None,
        caller: Principal,
        repetition: Repetition,
    ) -> Any:
        """Receive a part and return its row; parts may arrive in parallel and in any order.

        Raises:
            HTTPProblem: There is no such upload, it has ended, or the part is too large.
        """
        pending = await self._store.aread(lambda c: _pending(c, upload_id, caller))
        limit = min(_MAX_PART, pending.bytes)
        async with self._files.receiving(content_length, limit) as incoming:
            form = await receive(
                chunks, content_type, incoming, limit=limit, pace=self._pace, name="data"
            )
            if form.filename is None:
                raise invalid(["body", "data"], "Field required", "missing")
            if incoming.size == 0:
                raise invalid(["body", "data"], "The part is empty.")
            part_id = str(uuid4())
            row = {
                "id": part_id,
                "upload_id": upload_id,
                "bytes": incoming.size,
                "sha256": incoming.sha256,
                "created_at": time.time(),
                "idempotency_key": repetition.key,
            }
            await to_thread.run_sync(self._blobs.keep_part, incoming, part_id)
            kept = None
            try:
                kept = await self._store.awrite(lambda c: _add_part(c, row, caller, repetition))
            finally:
                if kept is None or kept.id != part_id:
                    with anyio.CancelScope(shield=True):
                        await to_thread.run_sync(self._remove, [part_id])
        return kept

    async def complete(
        self, upload_id: str, request: CompleteUploadIn, caller: Principal
    ) -> FoundUpload:
        """Join the parts in the order given; a repeated request returns the same file.

        Raises:
            HTTPProblem: A part is unknown, or the file has another size or checksum than stated.
        """
        asked = [internal_id(PART, part_id) or part_id for part_id in request.part_ids]
        await self._store.aread(lambda c: _find(c, upload_id, caller))
        async with self._locks[upload_id], self._exclusive(f"upload:{upload_id}"):
            row = await self._store.aread(lambda c: _find(c, upload_id, caller))
            if row.status == "completed" and row.part_ids == asked:
                return await self._shown(row)
            row, chosen = await self._store.aread(lambda c: _chosen(c, upload_id, asked, caller))
            size = sum(part.bytes for part in chosen)
            if size != row.bytes:
                message = f"The parts have {size} bytes, and the upload was created for {row.bytes}"
                raise invalid(["body", "part_ids"], f"{message}.")
            async with self._files.receiving(row.bytes, self._limit) as incoming:
                ids = [part.id for part in chosen]
                md5 = await to_thread.run_sync(self._join, ids, incoming)
                if request.md5 is not None and request.md5.lower() != md5:
                    raise invalid(["body", "md5"], f"The MD5 checksum of the parts is {md5}.")
                await self._files.accept(
                    _form(row),
                    incoming,
                    replace(caller, key_id=row.created_by, project=row.project),
                    OPENAI_UPLOAD,
                    repetition=Repetition(),
                    also=lambda c, file_id: _end(
                        c, upload_id, "completed", file_id=file_id, part_ids=asked
                    ),
                )
        return await self._over(upload_id, caller)

    async def cancel(self, upload_id: str, caller: Principal) -> FoundUpload:
        """Cancel an upload and delete its parts; safe to repeat.

        Raises:
            HTTPProblem: There is no such upload, or it is completed or expired.
        """

        def work(connection: sa.Connection) -> None:
            if _find(connection, upload_id, caller).status != "cancelled":
                _pending(connection, upload_id, caller)
                _end(connection, upload_id, "cancelled")
                caller.record(connection, "upload.cancel", upload_id)

        await self._store.aread(lambda c: _find(c, upload_id, caller))
        async with self._locks[upload_id], self._exclusive(f"upload:{upload_id}"):
            await self._store.awrite(work)
        return await self._over(upload_id, caller)

    async def _over(self, upload_id: str, caller: Principal) -> FoundUpload:
        self._locks.pop(upload_id, None)
        await self._collect()
        return await self._shown(await self._store.aread(lambda c: _find(c, upload_id, caller)))

    async def _shown(self, row: Any) -> FoundUpload:
        if row.file_id is None:
            return FoundUpload(row)
        with suppress(HTTPProblem):  # deleted since
            owner = Principal(row.created_by, row.project)
            return FoundUpload(row, await self._files.retrieve(row.file_id, owner))
        return FoundUpload(row)

    async def _expire(self) -> None:
        now = time.time()
        joining = [each for each, lock in self._locks.items() if lock.locked()]
        over = (
            uploads.c.status == "pending",
            uploads.c.expires_at <= now,
            uploads.c.id.not_in(joining),
        )
        forgotten = uploads.c.status != "pending", uploads.c.expires_at <= now - _REMEMBERED

        def work(connection: sa.Connection) -> None:
            connection.execute(uploads.update().where(*over).values(status="expired"))
            connection.execute(uploads.delete().where(*forgotten))

        await self._store.awrite(work)
        await self._collect()
        # Younger ones may be waiting for their rows.
        found = await to_thread.run_sync(self._blobs.parts, now - LASTS)
        if found:
            query = sa.select(parts.c.id)
            known = await self._store.aread(lambda c: {*c.execute(query).scalars()})
            await to_thread.run_sync(self._remove, [*({*found} - known)])

    async def _collect(self) -> None:
        """Remove the parts of uploads that are over; files first, then rows."""
        live = sa.select(uploads.c.id).where(uploads.c.status == "pending")
        over = sa.select(parts.c.id).where(parts.c.upload_id.not_in(live))
        ids = await self._store.aread(lambda c: c.execute(over).scalars().all())
        if not ids:
            return
        await to_thread.run_sync(self._remove, ids)

        def work(connection: sa.Connection) -> None:
            for start in range(0, len(ids), 500):  # databases limit the number of values
                chosen = parts.c.id.in_(ids[start : start + 500])
                connection.execute(parts.delete().where(chosen))

        await self._store.awrite(work)

    def _remove(self, part_ids: Sequence[str]) -> None:
        for part_id in part_ids:
            self._blobs.remove_part(part_id)

    def _join(self, part_ids: Sequence[str], incoming: Incoming) -> str:
        """Write parts to one file and return its MD5 checksum."""
        digest = hashlib.md5(usedforsecurity=False)
        for part_id in part_ids:
            for block in self._blobs.read_part(part_id):
                digest.update(block)
                incoming.write(block)
        incoming.finish()
        return digest.hexdigest()


def _find(connection: sa.Connection, upload_id: str, caller: Principal) -> Any:
    mine = uploads.c.id == upload_id, caller.sees(uploads.c.project)
    row = connection.execute(sa.select(uploads).where(*mine)).first()
    if row is None:
        raise not_found("upload")
    return row


def _pending(connection: sa.Connection, upload_id: str, caller: Principal) -> Any:
    row = _find(connection, upload_id, caller)
    status = row.status
    if status == "pending" and row.expires_at <= time.time():
        status = "expired"
    if status != "pending":
        raise problem(wrong_state(f"The upload is {status}, not pending."))
    return row


def _check_pending(connection: sa.Connection, caller: Principal) -> None:
    pending = uploads.c.status == "pending", uploads.c.expires_at > time.time()
    count = sa.select(sa.func.count()).where(caller.made(uploads), *pending)
    if connection.execute(count).scalar_one() >= _MOST_PENDING:
        message = f"This API key has {_MOST_PENDING} pending uploads; complete or cancel one."
        raise problem(
            ErrorAnswer(
                status=429,
                message=message,
                code="rate_limit_exceeded",
                headers={"retry-after": "60"},
            )
        )


def _add_part(
    connection: sa.Connection, row: dict[str, Any], caller: Principal, repetition: Repetition
) -> Any:
    upload = _pending(connection, row["upload_id"], caller)
    mine = parts.c.upload_id == upload.id
    # Two equal parts may share an id: the joined file is the same.
    same, key = parts.c.sha256 == row["sha256"], parts.c.idempotency_key
    known = repetition.first(connection, parts, mine=mine, same=same, key=key)
    if known is not None:
        return known
    count, size = sa.func.count(), sa.func.coalesce(sa.func.sum(parts.c.bytes), 0)
    number, stored = connection.execute(sa.select(count, size).where(mine)).one()
    if number >= _MOST_PARTS:
        raise invalid(["body", "data"], f"An upload has at most {_MOST_PARTS} parts.")
    # Parts that were sent twice are stored twice.
    if stored + row["bytes"] > 2 * upload.bytes:
        raise too_large(upload.bytes)
    connection.execute(parts.insert().values(row))
    return connection.execute(sa.select(parts).where(parts.c.id == row["id"])).first()


def _chosen(
    connection: sa.Connection, upload_id: str, asked: Sequence[str], caller: Principal
) -> tuple[Any, list[Any]]:
    """Return a pending upload with the parts that a client names, in its order."""
    row = _pending(connection, upload_id, caller)
    query = sa.select(parts).where(parts.c.upload_id == upload_id)
    found = {part.id: part for part in connection.execute(query)}
    for index, part_id in enumerate(asked):
        if part_id not in found:
            raise invalid(["body", "part_ids", index], "The upload has no such part.")
    return row, [found[part_id] for part_id in asked]


def _end(connection: sa.Connection, upload_id: str, status: str, **values: Any) -> None:
    pending = uploads.c.id == upload_id, uploads.c.status == "pending"
    changed = connection.execute(uploads.update().where(*pending).values(status=status, **values))
    if not changed.rowcount:  # by another gateway, meanwhile
        raise problem(wrong_state("The upload has ended."))


def _form(row: Any) -> Upload:
    fields = {"purpose": row.purpose}
    if row.lifetime is not None:
        fields |= {"expires_after[anchor]": "created_at"}
        fields |= {"expires_after[seconds]": str(row.lifetime)}
    return Upload(fields, row.filename, row.mimetype)
