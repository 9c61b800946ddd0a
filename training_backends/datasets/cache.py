"""Keep results about data files in a directory, for later calls and other processes."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

from training_backends.core.files import make_private_directory, write_atomic

__all__ = ["ResultCache"]

MAX_ENTRIES: Final = 512
_MOST_BYTES: Final = 1 << 20
"""Bytes of an entry; larger results are not kept."""


class ResultCache:
    """A bounded cache in a directory, with one file per entry; None keeps nothing.

    Entries that cannot be read are ignored, and so are write errors: the cache must never make
    a call fail. Safe with several processes, because entries are written atomically.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def find(self, key: str) -> bytes | None:
        """Return the kept result, or None."""
        if self._directory is None:
            return None
        with suppress(OSError):
            path = self._path(self._directory, key)
            digest, _, content = path.read_bytes().partition(b"\n")
            # Detects damaged entries.
            if sha256(content).hexdigest().encode() == digest:
                with suppress(OSError):
                    path.touch()  # the entries used longest ago are removed first
                return content
        return None

    def keep(self, key: str, content: bytes) -> None:
        """Keep a result under a key that names everything it depends on."""
        if self._directory is None or len(content) > _MOST_BYTES:
            return
        with suppress(OSError):
            make_private_directory(self._directory)
            digest = sha256(content).hexdigest().encode()
            write_atomic(self._path(self._directory, key), digest + b"\n" + content, private=True)
            self._trim(self._directory)

    def _path(self, directory: Path, key: str) -> Path:
        return directory / sha256(key.encode("utf-8", "surrogateescape")).hexdigest()

    def _trim(self, directory: Path) -> None:
        entries = list(directory.iterdir())
        if len(entries) <= MAX_ENTRIES:
            return
        ages: list[tuple[float, Path]] = []
        for entry in entries:
            with suppress(OSError):  # removed by another process
                ages.append((entry.stat().st_mtime, entry))
        for _, entry in sorted(ages)[: len(ages) - MAX_ENTRIES // 2]:
            entry.unlink(missing_ok=True)
