"""Upload of a file or a part of it, streamed with a known length."""

import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import BinaryIO, Final, NamedTuple

import anyio.to_thread
from anyio import from_thread

from training_backends.core.errors import DatasetError, Issue
from training_backends.core.files import digest_of

__all__ = [
    "CHUNK_BYTES",
    "FileBody",
    "FileUpload",
    "HashedFile",
    "Progress",
    "hash_file",
    "hash_parts",
]

CHUNK_BYTES: Final = 2**20
"""Smaller chunks are slower, larger ones block the event loop for longer. Each must be sent within
the write timeout, so this also sets the minimum upload speed."""
_AHEAD: Final = 2
"""Chunks to read ahead; more of them would only fall out of the CPU caches."""

Progress = Callable[[int, int], None]
"""Called with the bytes done and the total."""


class HashedFile(NamedTuple):
    """A file or a part of it, at the time it was hashed.

    Attributes:
        sha256: Hex digest of its content.
        size: In bytes.
        start: Offset of the part in the file; None: the entire file.
    """

    sha256: str
    size: int
    start: int | None = None


async def hash_file(path: Path) -> HashedFile:
    """Hash a file in a worker thread, unless its digest is known from an earlier reading.

    Raises:
        DatasetError: The file cannot be read.
    """
    try:
        return HashedFile(*await anyio.to_thread.run_sync(digest_of, path))
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror or error}") from error


async def hash_parts(path: Path, hashed: HashedFile, part_bytes: int) -> list[HashedFile]:
    """Return the parts of a file, each with its hash; only the last one is smaller.

    Args:
        hashed: The entire file; the parts are those of this content.
        part_bytes: Size of a part.

    Raises:
        DatasetError: The file cannot be read, or has changed.
    """
    try:
        return await anyio.to_thread.run_sync(_hash_parts, path, hashed, part_bytes)
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror or error}") from error


def _hash_parts(path: Path, hashed: HashedFile, part_bytes: int) -> list[HashedFile]:
    parts: list[HashedFile] = []
    entire = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, hashed.size, part_bytes):
            from_thread.check_cancelled()
            size, done = min(part_bytes, hashed.size - start), 0
            digest = hashlib.sha256()
            while done < size and (chunk := file.read(min(CHUNK_BYTES, size - done))):
                digest.update(chunk)
                entire.update(chunk)
                done += len(chunk)
            parts.append(HashedFile(digest.hexdigest(), size, start))
    if entire.hexdigest() != hashed.sha256:
        raise _changed(path, "its content differs from when it was checked")
    return parts


class FileBody:
    """A file as the body of a request; can be streamed again for a retry.

    Args:
        hashed: Expected content: the bytes are hashed as they are sent, and the request is only
            completed if they match. For a part of a file, only that part is sent.
        content_type: None sends no Content-Type.
    """

    def __init__(
        self,
        path: Path,
        *,
        hashed: HashedFile | None = None,
        content_type: str | None = "application/octet-stream",
        on_progress: Progress | None = None,
    ) -> None:
        self.path: Path = path
        self._hashed = hashed
        self._content_type = content_type
        self._on_progress = on_progress
        self._head = b""
        self._tail = b""

    @property
    def sha256(self) -> str | None:
        """Hex digest of the body, if known."""
        return None if self._hashed is None or self._head else self._hashed.sha256

    async def headers(self) -> dict[str, str]:
        """Return the headers for the body, including Content-Length.

        Raises:
            DatasetError: The file does not exist, is not a regular file or is empty.
        """
        size = await self._size()
        kind = {} if self._content_type is None else {"Content-Type": self._content_type}
        return {**kind, "Content-Length": str(len(self._head) + size + len(self._tail))}

    async def _size(self) -> int:
        if self._hashed is not None and self._hashed.start is not None:
            return self._hashed.size
        try:
            found = await anyio.to_thread.run_sync(os.stat, self.path)
        except OSError as error:
            raise _unusable(self.path, f"it cannot be read: {error.strerror or error}") from error
        if not found.st_size:
            raise _unusable(self.path, "it is empty")
        return found.st_size

    async def stream(self, expected_length: int) -> AsyncGenerator[bytes, None]:
        """Yield the body.

        Args:
            expected_length: The Content-Length that was sent.

        Raises:
            DatasetError: The file has changed; the request stays incomplete, so the server
                discards it.
        """
        size = expected_length - len(self._head) - len(self._tail)
        try:
            file = await anyio.to_thread.run_sync(self.path.open, "rb")
        except OSError as error:
            raise _unusable(self.path, f"it cannot be read: {error.strerror or error}") from error
        reader = _ReadAhead(file, self.path, size, self._hashed)
        try:
            if self._head:
                yield self._head
            done = 0
            while done < size:
                chunk = await reader.next()
                done += len(chunk)
                yield chunk
                if self._on_progress:
                    self._on_progress(done, size)
            if self._tail:
                yield self._tail
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(reader.close)


class FileUpload(FileBody):
    """A file in a multipart/form-data request.

    Args:
        fields: Text fields, sent before the file in this order.
        filename: File name sent to the server.
        field: Name of the file's field.
        hashed: See `FileBody`.
    """

    def __init__(
        self,
        path: Path,
        *,
        fields: Mapping[str, str],
        filename: str | None = None,
        field: str = "file",
        hashed: HashedFile | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        boundary = secrets.token_hex(16)
        super().__init__(
            path,
            hashed=hashed,
            content_type=f"multipart/form-data; boundary={boundary}",
            on_progress=on_progress,
        )
        self._head = _form_head(boundary, fields, field, filename or path.name)
        self._tail = f"\r\n--{boundary}--\r\n".encode()


def _form_head(boundary: str, fields: Mapping[str, str], field: str, filename: str) -> bytes:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; '
        f'filename="{_quoted(filename)}"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    return "".join(parts).encode()


class _ReadAhead:
    """Reads, hashes and verifies a file in a dedicated thread.

    Unlike a worker thread call per chunk, it does not wait for the event loop: the loop sends
    chunks while the next ones are hashed.
    """

    def __init__(self, file: BinaryIO, path: Path, size: int, hashed: HashedFile | None) -> None:
        self._file = file
        self._path = path
        self._size = size
        self._hashed = hashed
        self._start = None if hashed is None else hashed.start
        self._read: Queue[bytes | Exception] = Queue(_AHEAD)
        self._unwanted = Event()
        self._thread = Thread(target=self._run, name="upload-reader", daemon=True)
        self._thread.start()

    async def next(self) -> bytes:
        """Return the next chunk; the last one only if the file matches its hash.

        Raises:
            DatasetError: The file cannot be read, or has changed.
        """
        try:
            chunk = self._read.get_nowait()
        except Empty:
            chunk = await anyio.to_thread.run_sync(self._read.get)
        if isinstance(chunk, OSError):
            why = f"read error: {chunk.strerror or chunk}"
            raise _unusable(self._path, why) from chunk
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def close(self) -> None:
        """Stop the thread and close the file."""
        self._unwanted.set()
        try:
            while True:  # the thread may be blocked on a full queue
                self._read.get_nowait()
        except Empty:
            self._thread.join()
            self._file.close()

    def _run(self) -> None:
        try:
            self._read_all()
        except Exception as error:  # pass it to the caller waiting for the next chunk
            self._read.put(error)

    def _read_all(self) -> None:
        digest = hashlib.sha256()
        done = 0
        if self._start is not None:
            self._file.seek(self._start)
        while done < self._size and not self._unwanted.is_set():
            chunk = self._file.read(min(CHUNK_BYTES, self._size - done))
            if not chunk:
                raise _changed(self._path, f"it shrank from {self._size} to {done} bytes")
            digest.update(chunk)
            done += len(chunk)
            if done == self._size:
                self._verify(digest.hexdigest())
            self._read.put(chunk)

    def _verify(self, sha256: str) -> None:
        if self._start is None:
            now = os.fstat(self._file.fileno()).st_size
            if now != self._size:
                raise _changed(self._path, f"its size changed from {self._size} to {now} bytes")
        if self._hashed is not None and sha256 != self._hashed.sha256:
            raise _changed(self._path, "its content differs from when it was checked")


def _quoted(text: str) -> str:
    """Escape a name as browsers do (WHATWG, multipart/form-data encoding)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _unusable(path: Path, why: str) -> DatasetError:
    issue = Issue(code="unreadable_file", message=why, path=str(path))
    return DatasetError(f"Cannot upload {path.name}: {why}.", issues=[issue])


def _changed(path: Path, how: str) -> DatasetError:
    issue = Issue(code="file_changed", message=how, path=str(path))
    return DatasetError(
        f"{path.name} changed during the upload: {how}.",
        issues=[issue],
        hint="Wait until nothing writes to the file, then run the same command again.",
    )
