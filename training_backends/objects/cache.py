"""Objects kept on this machine, by content."""

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from training_backends.core.files import make_private_directory, sync_directory

__all__ = ["ObjectCache", "objects_directory"]

_IN_USE: Final = 3600.0
"""Seconds after its last use for which an object is never removed."""


def objects_directory(home: Path) -> Path:
    """Return the directory of the objects that the runs of a home read."""
    return home / "cache" / "objects"


class ObjectCache:
    """Files at `<directory>/<sha256>/<name>`, so that messages show the name of the object.

    Safe with several processes. All methods block.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, sha256: str, name: str) -> Path | None:
        """Return the path of an object, or None; marks it as used."""
        place = self.directory / sha256
        path = place / name
        try:
            os.utime(place)
            if not path.exists():
                other = next(place.iterdir())
                with suppress(FileExistsError):
                    path.hardlink_to(other)
        except (OSError, StopIteration):
            return None
        return path

    def path(self, sha256: str, name: str) -> Path:
        """Return where an object is, or would be."""
        return self.directory / sha256 / name

    def adopt(self, file: Path, sha256: str, name: str) -> Path:
        """Move a complete file on the same file system into the cache.

        Raises:
            OSError: It cannot be moved.
        """
        place = self.directory / sha256
        make_private_directory(place)
        file.replace(place / name)
        sync_directory(place)
        return place / name

    def remove(self, sha256: str) -> None:
        """Remove an object; programs that are reading it keep it."""
        place = self.directory / sha256
        # Renamed first, so that no reader finds a part of it.
        gone = self.directory / f".{uuid4()}.removed"
        with suppress(OSError):
            place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def size(self) -> int:
        """Return the bytes of all objects."""
        return sum(size for _, _, size in self._entries())

    def trim(self, most: int, keep: Collection[str]) -> None:
        """Remove the objects used longest ago until the rest has at most `most` bytes.

        Args:
            keep: Digests of objects to keep, even if there is too much.
        """
        entries = sorted(self._entries())
        total = sum(size for _, _, size in entries)
        for used, sha256, size in entries:
            if total <= most or time.time() - used < _IN_USE:
                return
            if sha256 not in keep:
                self.remove(sha256)
                total -= size

    def _entries(self) -> Iterator[tuple[float, str, int]]:
        """Yield when each object was used, its digest and its size."""
        with suppress(FileNotFoundError):
            for place in self.directory.iterdir():
                with suppress(OSError, StopIteration):
                    if len(place.name) == 64:
                        size = next(place.iterdir()).stat().st_size
                        yield place.stat().st_mtime, place.name, size
