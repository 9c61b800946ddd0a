"""Remember which rows were there before, of files of any size, in little memory."""

import sqlite3
from typing import Final, Self

from xxhash import xxh3_128_digest

from training_backends.core.errors import TrainingBackendError

__all__ = ["SeenRows"]

_IN_MEMORY: Final = 1 << 18
"""Rows that are kept in a set, some 30 MB; more are kept on the disk, several times slower."""


_INSERT: Final = "INSERT OR IGNORE INTO seen VALUES (?)"


class SeenRows:
    """The rows so far, each as a hash of 128 bits: two different ones are never taken for one.

    Use it in a `with`.
    """

    def __init__(self, *, in_memory: int = _IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._set: set[bytes] = set()
        self._stored: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stored:
            self._stored.close()

    def add(self, row: bytes) -> bool:
        """Remember a row; return whether it is new. White space behind it does not count.

        Raises:
            TrainingBackendError: There is no room for it on the disk.
        """
        digest = xxh3_128_digest(row.rstrip())
        if self._stored is None:
            before = len(self._set)
            self._set.add(digest)
            if before >= self._in_memory:
                self._stored = _stored(self._set)
                self._set = set()
                return True
            return len(self._set) > before
        try:
            return bool(self._stored.execute(_INSERT, (digest,)).rowcount)
        except sqlite3.OperationalError as error:
            raise _not_stored(error) from None


def _stored(digests: set[bytes]) -> sqlite3.Connection:
    """Put hashes on the disk, in a file without a name, gone with the connection."""
    stored = sqlite3.connect("", isolation_level=None)
    try:
        for setting in ("journal_mode = off", "synchronous = off", "cache_size = -16384"):
            stored.execute(f"PRAGMA {setting}")
        stored.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        stored.execute("BEGIN")
        stored.executemany(_INSERT, ((digest,) for digest in sorted(digests)))
    except sqlite3.OperationalError as error:
        stored.close()
        raise _not_stored(error) from None
    return stored


def _not_stored(error: sqlite3.Error) -> TrainingBackendError:
    return TrainingBackendError(
        f"The hashes of the rows cannot be kept in the directory for temporary files: {error}.",
        hint="Make room there, or name another directory in SQLITE_TMPDIR.",
    )
