"""Uploaded bytes on disk, each content once, under its SHA-256.

A file is written under a temporary name, flushed to the disk and renamed, so under its
final name it is always whole. Everything here blocks; call it in a worker thread.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO, Self
from uuid import uuid4

from training_backends.core.files import make_private_directory, sync_directory

__all__ = ["BlobStore", "Incoming", "OpenFile"]

OpenFile = Callable[[Path], BinaryIO]
"""Opens a new file for writing; replaced in tests by a disk that is full."""


def _open(path: Path) -> BinaryIO:
    return path.open("xb", buffering=0)


class Incoming:
    """A file being received; leaving the block removes it unless it was kept."""

    def __init__(self, path: Path, open_file: OpenFile) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = open_file(path)

    def write(self, data: bytes) -> None:
        """Append to the file.

        Raises:
            OSError: The disk is full, or fails.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> None:
        """Put what was written safely on the disk; nothing can be appended afterwards."""
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Remove the temporary file, if it still is one."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


class BlobStore:
    """Files by content below one directory."""

    def __init__(self, root: Path, *, open_file: OpenFile = _open) -> None:
        self._blobs = root / "files"
        self._incoming = root / "incoming"
        self._open_file = open_file

    def prepare(self, needed: Collection[str]) -> None:
        """Make the directories, and remove what a crash left in them.

        Args:
            needed: Digests of the blobs that are still referred to.
        """
        for directory in (self._blobs, self._incoming):
            make_private_directory(directory)
        for path in self._incoming.iterdir():
            path.unlink()
        for path in self._blobs.iterdir():
            if path.name not in needed:
                path.unlink()

    def path(self, sha256: str) -> Path:
        """Return where a blob lies, or would lie."""
        return self._blobs / sha256

    def receive(self) -> Incoming:
        """Begin a new file."""
        return Incoming(self._incoming / f"{uuid4()}.part", self._open_file)

    def keep(self, incoming: Incoming) -> None:
        """Make a finished file permanent under its digest; the same content is kept once."""
        # Replaced where it is there already: how long it takes must not say whether it was.
        incoming.path.replace(self.path(incoming.sha256))
        sync_directory(self._blobs)

    def remove(self, sha256: str) -> None:
        """Remove a blob; one already gone is fine."""
        self.path(sha256).unlink(missing_ok=True)

    def free(self) -> int:
        """Return how many bytes fit on the disk."""
        found = os.statvfs(self._blobs)
        return found.f_bavail * found.f_frsize
