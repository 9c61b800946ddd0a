"""Uploaded bytes on disk, each content once, under its SHA-256.

A file is written under a temporary name, flushed to the disk and renamed, so under its
final name it is always whole. Everything here blocks; call it in a worker thread.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Self
from uuid import uuid4

from training_backends.core.files import make_private_directory, sync_directory
from training_backends.core.logging import get_logger

__all__ = ["BlobStore", "Incoming", "OpenFile"]

log = get_logger()

_PART = ".part"
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

    def prepare(self) -> None:
        """Create the directories and remove uploads that were cut off."""
        for directory in (self._blobs, self._incoming):
            make_private_directory(directory)
        for path in self._incoming.iterdir():
            if path.suffix == _PART:
                _remove(path)
            else:
                log.warning("unexpected file left in place", path=str(path))

    def collect(self, known: Mapping[str, float | None]) -> None:
        """Remove the blobs that a crash left behind.

        A blob that the database does not know is kept: the database may be new, or restored
        from a copy that is older than the upload.

        Args:
            known: Digest of every blob that the database knows, with the time in seconds since
                the epoch at which the last reference to it was deleted; None: still needed.
        """
        unknown = 0
        for path in self._blobs.iterdir():
            if path.name not in known:
                unknown += 1
            elif (deleted_at := known[path.name]) is not None and _written_before(path, deleted_at):
                _remove(path)
        if unknown:
            log.warning("files unknown to the database kept", files=unknown, path=str(self._blobs))

    def path(self, sha256: str) -> Path:
        """Return where a blob lies, or would lie."""
        return self._blobs / sha256

    def receive(self) -> Incoming:
        """Begin a new file."""
        return Incoming(self._incoming / f"{uuid4()}{_PART}", self._open_file)

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


def _written_before(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime < moment
    except OSError:
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:  # a directory of that name, or a disk that is read-only
        log.warning("leftover not removed", path=str(path), reason=error.strerror)
