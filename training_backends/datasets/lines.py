"""Read a file line by line in constant memory, hashing it on the way."""

import hashlib
from collections.abc import Iterator
from typing import BinaryIO, Final

__all__ = ["CHUNK_BYTES", "MAX_LINE_BYTES", "LineReader"]

CHUNK_BYTES: Final = 1 << 20

MAX_LINE_BYTES: Final = 64 << 20
"""Longest line that is kept; a longer one is read past, so that no file fills the memory."""


class LineReader:
    """The lines of one open file, without their end.

    Attributes:
        size: Bytes read so far.
    """

    def __init__(self, file: BinaryIO, *, max_line: int = MAX_LINE_BYTES) -> None:
        self._file = file
        self._max_line = max_line
        self._hash = hashlib.sha256(usedforsecurity=False)
        self.size = 0

    @property
    def sha256(self) -> str:
        """Hex digest of what was read so far."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[bytes | None]:
        """Yield every line; None stands for one that is longer than `max_line`.

        Raises:
            OSError: The file cannot be read on.
        """
        kept: list[bytes] = []
        length = 0
        while chunk := self._file.read(CHUNK_BYTES):
            self._hash.update(chunk)
            self.size += len(chunk)
            first, *others = chunk.split(b"\n")
            length += len(first)
            if length <= self._max_line:
                kept.append(first)
            else:
                kept.clear()
            if others:
                yield b"".join(kept) if length <= self._max_line else None
                last = others.pop()
                yield from (line if len(line) <= self._max_line else None for line in others)
                kept, length = [last], len(last)
        if length:
            yield b"".join(kept) if length <= self._max_line else None
