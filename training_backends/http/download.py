"""Write a streamed response to a file, continued after a cut, and published when complete."""

import base64
import hashlib
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

import anyio
import anyio.to_thread

from training_backends.core.errors import (
    BackendUnavailable,
    ConfigError,
    ProtocolError,
    TrainingBackendError,
)
from training_backends.core.files import sync_directory
from training_backends.http.upload import Progress

__all__ = ["PartialFile", "new_directory", "partial_file", "unpack", "within"]

_PARTIAL: Final = 206
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20})")
_SHA256: Final = re.compile(r"(?:^|[, ])sha-256=:([A-Za-z0-9+/]{43}=):")
_STRONG_TAG: Final = re.compile(r'"[\x21\x23-\x7e]{1,500}"')
"""An entity tag that names bytes; a weak one names a meaning."""


@asynccontextmanager
async def new_directory(target: Path) -> AsyncGenerator[Path, None]:
    """Yield a temporary directory that becomes `target` if the block succeeds.

    Raises:
        ConfigError: `target` exists and is not an empty directory.
        TrainingBackendError: It cannot be created.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        await anyio.to_thread.run_sync(_make_empty, part, target)
        try:
            yield part
            await anyio.to_thread.run_sync(_publish_directory, part, target)
        finally:
            with anyio.CancelScope(shield=True):
                remove = partial(shutil.rmtree, part, ignore_errors=True)
                await anyio.to_thread.run_sync(remove)
    except OSError as error:
        if isinstance(error, TrainingBackendError):
            raise
        raise TrainingBackendError(f"Cannot write {target}: {error.strerror or error}.") from error


def _make_empty(part: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty.", hint="Choose a new directory.")
    part.mkdir(parents=True)


def _publish_directory(part: Path, target: Path) -> None:
    part.replace(target)
    sync_directory(target.parent)


def within(directory: Path, name: str) -> Path:
    """Return the path of a file with a server's name.

    Raises:
        ProtocolError: The name leads out of the directory.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ProtocolError(f"The server has a file with the invalid name {name[:200]!r}.")
    return directory / path


async def unpack(archive: Path, directory: Path) -> None:
    """Write the files of a tar archive into a directory.

    Raises:
        ProtocolError: It is not such an archive, or has something other than files within it.
    """
    await anyio.to_thread.run_sync(_unpack, archive, directory)


def _unpack(archive: Path, directory: Path) -> None:
    try:
        with tarfile.open(archive, "r:") as files:
            for member in files:
                content = files.extractfile(member) if member.isreg() else None
                if content is None:
                    name = member.name[:200]
                    raise ProtocolError(f"The server's archive has {name!r}, which is no file.")
                target = within(directory, member.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    shutil.copyfileobj(content, file, 2**20)
                    os.fsync(file.fileno())
    except (tarfile.TarError, FileExistsError) as error:
        raise ProtocolError(f"The server's archive is invalid: {error}.") from None


class PartialFile:
    """A download in progress, in a temporary file next to its target.

    Attributes:
        done: Bytes received so far.
    """

    def __init__(self, file: BinaryIO, path: Path, target: Path) -> None:
        self.done = 0
        self._file = file
        self._path = path
        self._target = target
        self._tag: str | None = None
        self._sha256: str | None = None

    @property
    def request_headers(self) -> dict[str, str]:
        """Headers that ask for the rest, if the server can continue the same content."""
        if not self.done or self._tag is None:
            return {}
        return {"Range": f"bytes={self.done}-", "If-Range": self._tag}

    async def receive(
        self,
        status: int,
        headers: Mapping[str, str],
        chunks: AsyncIterator[bytes],
        on_progress: Progress | None = None,
    ) -> None:
        """Append a response to what has arrived; one that is not the rest replaces it.

        Raises:
            BackendUnavailable: The number of bytes differs from the announced length.
            ProtocolError: The server sent another part than the one asked for.
        """
        expected = self._begin(status, headers)
        if status != _PARTIAL:
            self.done = 0
            await anyio.to_thread.run_sync(self._file.seek, 0)
            await anyio.to_thread.run_sync(self._file.truncate)
        async for chunk in chunks:
            await anyio.to_thread.run_sync(self._file.write, chunk)
            self.done += len(chunk)
            if on_progress:
                on_progress(self.done, self.done if expected is None else expected)
        if expected is not None and self.done != expected:
            name = self._target.name
            raise BackendUnavailable(f"Received {self.done} of {expected} bytes of {name}.")

    def _begin(self, status: int, headers: Mapping[str, str]) -> int | None:
        """Return the length of the complete content, if the server announces it."""
        if status == _PARTIAL:
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if found is None or int(found[1]) != self.done:
                raise ProtocolError(f"The server sent another part of {self._target.name}.")
            return int(found[2])
        digest = _SHA256.search(headers.get("repr-digest", ""))
        self._sha256 = digest[1] if digest else None
        tag = headers.get("etag", "")
        can_continue = headers.get("accept-ranges") == "bytes" and _STRONG_TAG.fullmatch(tag)
        self._tag = tag if can_continue else None
        length = headers.get("content-length", "")
        plain = "content-encoding" not in headers and length.isascii() and length.isdigit()
        return int(length[:20]) if plain else None

    async def publish(self) -> None:
        """Flush the file to disk and rename it to its target.

        Raises:
            BackendUnavailable: Its digest differs from the one that the server announced.
        """
        await anyio.to_thread.run_sync(self._file.flush)
        if self._sha256 is not None:
            found = await anyio.to_thread.run_sync(_sha256_of, self._path)
            if found != self._sha256:
                self._tag = None  # none of it can be trusted
                raise BackendUnavailable(f"The checksum of {self._target.name} differs.")
        await anyio.to_thread.run_sync(_publish, self._file, self._path, self._target)


@asynccontextmanager
async def partial_file(target: Path) -> AsyncGenerator[PartialFile, None]:
    """Yield a file that becomes `target` when it is published, and is removed otherwise.

    Raises:
        TrainingBackendError: The file cannot be written, for example on a full disk.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        file = await anyio.to_thread.run_sync(_create, part)
        try:
            yield PartialFile(file, part, target)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_discard, file, part)
    except OSError as error:
        if isinstance(error, TrainingBackendError):
            raise
        raise TrainingBackendError(f"Cannot write {target}: {error.strerror or error}.") from error


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha256").digest()).decode()


def _create(part: Path) -> BinaryIO:
    part.parent.mkdir(parents=True, exist_ok=True)
    return part.open("xb")


def _publish(file: BinaryIO, part: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    part.replace(target)
    sync_directory(target.parent)


def _discard(file: BinaryIO, part: Path) -> None:
    file.close()
    part.unlink(missing_ok=True)
