"""A multipart upload of one file: length known beforehand, read in a thread, never whole."""

import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import anyio.to_thread

from training_backends.core.errors import DatasetError, Issue

__all__ = ["CHUNK_BYTES", "FileUpload", "Progress", "hash_file"]

CHUNK_BYTES: Final = 512 * 1024
"""Larger chunks are a little faster but hold the event loop for longer."""
_SENT_BYTES: Final = 64 * 1024
"""Each must leave within the write timeout, so this sets how slow a line may be: with 30 s
about 2 kB/s, where whole chunks would be cut off below 17 kB/s although bytes flow."""

Progress = Callable[[int, int], None]
"""Told how many of how many bytes are done."""


async def hash_file(path: Path) -> tuple[str, int]:
    """Return the SHA-256 (hex) and the size of a file, read in a worker thread.

    Raises:
        DatasetError: It cannot be read.
    """
    try:
        return await anyio.to_thread.run_sync(_hash_file, path)
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror or error}") from error


def _hash_file(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


class FileUpload:
    """The body of a multipart/form-data request; may be streamed again for another attempt.

    Args:
        fields: Text fields, sent before the file in this order.
        filename: Name told to the server.
        sha256: What the file must hold; checked before the request is completed.
    """

    def __init__(
        self,
        path: Path,
        *,
        fields: Mapping[str, str],
        filename: str | None = None,
        sha256: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.path = path
        self._sha256 = sha256
        self._on_progress = on_progress
        self._boundary = secrets.token_hex(16)
        self._head = self._make_head(fields, filename or path.name)
        self._tail = f"\r\n--{self._boundary}--\r\n".encode()

    def _make_head(self, fields: Mapping[str, str], filename: str) -> bytes:
        parts = [
            f'--{self._boundary}\r\nContent-Disposition: form-data; name="{_quoted(name)}"'
            f"\r\n\r\n{value}\r\n"
            for name, value in fields.items()
        ]
        parts.append(
            f'--{self._boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{_quoted(filename)}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        return "".join(parts).encode()

    async def headers(self) -> dict[str, str]:
        """Return the headers that go with the body, Content-Length among them.

        Raises:
            DatasetError: The file is not there, not a file or empty.
        """
        size = (await self._stat()).st_size
        return {
            "Content-Type": f"multipart/form-data; boundary={self._boundary}",
            "Content-Length": str(len(self._head) + size + len(self._tail)),
        }

    async def _stat(self) -> os.stat_result:
        try:
            found = await anyio.to_thread.run_sync(os.stat, self.path)
        except OSError as error:
            raise _unusable(self.path, f"it cannot be read: {error.strerror or error}") from error
        if not found.st_size:
            raise _unusable(self.path, "it is empty")
        return found

    async def stream(self, expected_length: int) -> AsyncGenerator[bytes, None]:
        """Yield the body.

        Args:
            expected_length: The Content-Length that was sent.

        Raises:
            DatasetError: The file changed since then; the request stays incomplete, so
                the server keeps nothing.
        """
        size = expected_length - len(self._head) - len(self._tail)
        try:
            file = await anyio.to_thread.run_sync(self.path.open, "rb")
        except OSError as error:
            raise _unusable(self.path, f"it cannot be read: {error.strerror or error}") from error
        try:
            yield self._head
            async for chunk in self._chunks(file, size):
                for start in range(0, len(chunk), _SENT_BYTES):
                    yield chunk[start : start + _SENT_BYTES]
            yield self._tail
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(file.close)

    async def _chunks(self, file: BinaryIO, size: int) -> AsyncGenerator[bytes, None]:
        digest = hashlib.sha256()

        def read(limit: int) -> bytes:
            chunk = file.read(limit)
            if self._sha256 is not None:
                digest.update(chunk)
            return chunk

        done = 0
        while done < size:
            try:
                chunk = await anyio.to_thread.run_sync(read, min(CHUNK_BYTES, size - done))
            except OSError as error:
                raise _unusable(self.path, f"reading failed: {error.strerror}") from error
            if not chunk:
                raise _changed(self.path, f"it was cut from {size} to {done} bytes")
            done += len(chunk)
            if done == size:
                await self._verify(file, size, digest.hexdigest())
            yield chunk
            if self._on_progress:
                self._on_progress(done, size)

    async def _verify(self, file: BinaryIO, size: int, sha256: str) -> None:
        now = (await anyio.to_thread.run_sync(os.fstat, file.fileno())).st_size
        if now != size:
            raise _changed(self.path, f"it went from {size} to {now} bytes")
        if self._sha256 not in {None, sha256}:
            raise _changed(self.path, "its content is not what was checked before")


def _quoted(text: str) -> str:
    """Escape a name as browsers do (WHATWG, multipart/form-data encoding)."""
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _unusable(path: Path, why: str) -> DatasetError:
    issue = Issue(code="unreadable_file", message=why, path=str(path))
    return DatasetError(f"{path.name} cannot be uploaded: {why}.", issues=[issue])


def _changed(path: Path, how: str) -> DatasetError:
    issue = Issue(code="file_changed", message=how, path=str(path))
    return DatasetError(
        f"{path.name} changed while it was uploaded: {how}.",
        issues=[issue],
        hint="Wait until nothing writes to the file, then repeat the same command.",
    )
