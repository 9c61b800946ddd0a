"""Uploaded files in an object store, which several gateways may share."""

import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from anyio import to_thread
from starlette.responses import Response, StreamingResponse

from training_backends.core.config import DataSource
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.files import digest_of
from training_backends.core.logging import get_logger
from training_backends.datasets.convert import convert
from training_backends.gateway.errors import FileStorageUnavailable
from training_backends.gateway.uploads import (
    ABANDONED,
    PART,
    BlobStore,
    Incoming,
    OpenFile,
    open_new,
    saved_as,
)
from training_backends.objects.cache import ObjectCache
from training_backends.objects.store import BLOCK, ObjectInfo, ObjectStore, ObjectUpload

__all__ = ["ObjectBlobStore"]

log = get_logger()


class _ObjectIncoming(Incoming):
    """A file being received: on disk for its checks, and in the store at the same time."""

    def __init__(self, path: Path, open_file: OpenFile, upload: ObjectUpload) -> None:
        super().__init__(path, open_file)
        self.upload = upload

    def write(self, data: bytes) -> None:
        super().write(data)
        with _unavailable():
            self.upload.write(data)

    def discard(self) -> None:
        self.upload.abort()
        super().discard()


class ObjectBlobStore(BlobStore):
    """Content-addressed objects, with the files being received in a local directory.

    A file is stored as `files/<first two digits>/<sha256>`, its conversions below `converted/`.
    While it is received it is `incoming/<random>`, in parts that become an object only once the
    file is accepted.

    Methods that use the store raise `FileStorageUnavailable` if they cannot.

    Args:
        root: Local directory of this gateway.
        cache: Where its client looks for the data of jobs.
    """

    def __init__(
        self,
        objects: ObjectStore,
        root: Path,
        cache: ObjectCache,
        *,
        open_file: OpenFile = open_new,
    ) -> None:
        super().__init__(root, is_shared=True, open_file=open_file)
        self._objects = objects
        self._cache = cache

    def check(self) -> None:
        """Check that the store can be reached."""
        with _unavailable():
            self._objects.check()

    def collect(self, known: Mapping[str, float | None]) -> None:
        """Remove what crashes left behind; see `BlobStore.collect`."""
        before = time.time() - ABANDONED
        with _unavailable():
            self._objects.abort_uploads("incoming", before=before)
            for found in self._objects.list("incoming"):
                if found.modified is not None and found.modified < before:
                    self._objects.remove(found.name)
            for found in self._stored():
                sha256 = found.name.rpartition("/")[2]
                deleted_at = known.get(sha256)
                if deleted_at is not None and (found.modified or time.time()) < deleted_at:
                    self.remove(sha256)

    def _stored(self) -> Iterator[ObjectInfo]:
        for shard in self._objects.directories("files"):  # a listing is held in memory
            yield from self._objects.list(shard)

    def receive(self) -> Incoming:
        """Create a new temporary file and begin an upload."""
        path = self._incoming / f"{uuid4()}{PART}"
        with _unavailable():
            upload = self._objects.upload(f"incoming/{uuid4()}")
        return _ObjectIncoming(path, self._open_file, upload)

    def keep(self, incoming: Incoming) -> None:
        """Move a finished file to its permanent name; identical content is stored once."""
        self._publish(_own(incoming), _name(incoming.sha256))
        # The jobs of this gateway need not fetch it.
        self._cache.adopt(incoming.path, incoming.sha256, incoming.sha256)

    def _publish(self, incoming: _ObjectIncoming, name: str) -> None:
        """Make a received file the object of this name."""
        with _unavailable():
            if incoming.upload.is_begun:
                incoming.upload.finish()
                self._objects.copy(incoming.upload.name, name)
                self._objects.remove(incoming.upload.name)
            else:
                incoming.upload.abort()
                self._objects.write(name, incoming.path.read_bytes())

    def keep_part(self, incoming: Incoming, part_id: str) -> None:
        """Store a finished file as a part, which any gateway can join."""
        self._publish(_own(incoming), f"parts/{part_id}")

    def read_part(self, part_id: str) -> Iterator[bytes]:
        """Yield the content of a part."""
        name = f"parts/{part_id}"
        with _unavailable():
            size = self._objects.info(name).size
            for start in range(0, size, BLOCK):
                yield self._objects.read(name, start, min(start + BLOCK, size))

    def remove_part(self, part_id: str) -> None:
        """Remove a part; safe to repeat."""
        with _unavailable():
            self._objects.remove(f"parts/{part_id}")

    def parts(self, before: float) -> Sequence[str]:
        """Return the ids of the parts that were stored before a time, in seconds."""
        with _unavailable():
            return [
                found.name.rpartition("/")[2]
                for found in self._objects.list("parts")
                if found.modified is not None and found.modified < before
            ]

    def remove(self, sha256: str) -> None:
        """Remove a blob with its conversions; safe to repeat."""
        with _unavailable():
            for converted in self._objects.list(f"converted/{sha256}"):
                self._objects.remove(converted.name)
            self._objects.remove(_name(sha256))
        self._cache.remove(sha256)

    def source(self, sha256: str) -> DataSource:
        """Return where the client finds a blob."""
        return DataSource(uri=self._objects.place(_name(sha256)), sha256=sha256)

    def convert(self, source: DataSource, provider_format: ProviderFormat) -> DataSource:
        """Return a blob's rows in a provider's format: a new object, or the blob itself.

        Raises:
            DatasetError: The blob cannot be read.
        """
        sha256 = str(source.sha256)
        directory = f"converted/{sha256}"
        with _unavailable():
            for known in self._objects.list(directory):
                kind, _, digest = known.name.rpartition("/")[2].partition(".")
                if kind == provider_format.name:
                    return source.model_copy(
                        update={"uri": self._objects.place(known.name), "sha256": digest}
                    )
            blob = self.local(sha256)
        fresh = self._incoming / f"{uuid4()}{PART}"
        try:
            if convert([blob], fresh, provider_format=provider_format).path is None:
                return source
            digest = digest_of(fresh).sha256
            name = f"{directory}/{provider_format.name}.{digest}"
            with _unavailable():
                self._objects.put(name, fresh)
            self._cache.adopt(fresh, digest, name.rpartition("/")[2])
        finally:
            fresh.unlink(missing_ok=True)
        return source.model_copy(update={"uri": self._objects.place(name), "sha256": digest})

    def local(self, sha256: str) -> Path:
        """Return the path of a blob in the cache; fetched unless this gateway received it."""
        return self._cache.find(sha256, sha256) or self._fetched(sha256)

    def _fetched(self, sha256: str) -> Path:
        fresh = self._incoming / f"{uuid4()}{PART}"
        name = _name(sha256)
        try:
            size = self._objects.info(name).size
            with fresh.open("xb") as file:
                for start in range(0, size, BLOCK):
                    file.write(self._objects.read(name, start, min(start + BLOCK, size)))
            return self._cache.adopt(fresh, sha256, sha256)
        finally:
            fresh.unlink(missing_ok=True)

    def conversions(self, sha256: str) -> Sequence[str]:
        """Return the places of what `convert` made of a blob."""
        with _unavailable():
            found = self._objects.list(f"converted/{sha256}")
            return [self._objects.place(each.name) for each in found]

    async def response(
        self, sha256: str, filename: str, headers: Mapping[str, str]
    ) -> Response | None:
        """Return a blob's content, or the range of it that a request asks for."""
        info = await to_thread.run_sync(self._info, sha256)
        if info is None:
            return None
        size = info.size
        etag = f'"{sha256}"'
        answer = {"accept-ranges": "bytes", "etag": etag, "content-disposition": saved_as(filename)}
        asked = headers.get("range") if headers.get("if-range", etag) == etag else None
        found = _range(asked, size)
        if found is None:
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        start, end = found
        status = 200 if (start, end) == (0, size) else 206
        if status == 206:
            answer["content-range"] = f"bytes {start}-{end - 1}/{size}"
        return StreamingResponse(
            self._blocks(sha256, start, end),
            status,
            {**answer, "content-length": str(end - start)},
            media_type="application/octet-stream",
        )

    async def _blocks(self, sha256: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        for at in range(start, end, BLOCK):
            yield await to_thread.run_sync(self._read, sha256, at, min(at + BLOCK, end))

    def _info(self, sha256: str) -> ObjectInfo | None:
        with _unavailable():
            try:
                return self._objects.info(_name(sha256))
            except RunNotFound:
                return None

    def _read(self, sha256: str, start: int, end: int) -> bytes:
        with _unavailable():
            return self._objects.read(_name(sha256), start, end)

    def sign(self, sha256: str, *, seconds: int, filename: str) -> str | None:
        """Return a presigned URL of the store, if it makes any for so long."""
        return self._objects.sign(_name(sha256), seconds=seconds, filename=filename)


def _own(incoming: Incoming) -> _ObjectIncoming:
    if not isinstance(incoming, _ObjectIncoming):
        raise TypeError("the file was not received by this store")
    return incoming


def _name(sha256: str) -> str:
    return f"files/{sha256[:2]}/{sha256}"


def _range(asked: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte and the end of the requested range; None if there is none such.

    Anything but one range of bytes is answered with the complete content.
    """
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", (asked or "").strip())
    if match is None or not any(match.groups()):
        return 0, size
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
    return (start, end) if start < end else None


@contextmanager
def _unavailable() -> Iterator[None]:
    """Turn every failure of the store into one that clients may retry."""
    try:
        yield
    except TrainingBackendError as error:
        if isinstance(error, FileStorageUnavailable):
            raise
        log.error("object store failed", reason=error.message)  # noqa: TRY400
        raise FileStorageUnavailable(error.message, hint=error.hint) from error
