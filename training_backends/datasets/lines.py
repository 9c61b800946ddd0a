"""Read a file line by line in constant memory."""

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO, Final

__all__ = [
    "BOM",
    "MAX_LINE_BYTES",
    "MAX_SKIPPED_BYTES",
    "UTF16",
    "line_at_or_after",
    "lines_up_to",
    "skip_line",
]

BOM: Final = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
"""How a file in UTF-16 begins."""

_CHUNK_BYTES: Final = 1 << 20

MAX_SKIPPED_BYTES: Final = 1 << 30
"""Of a line that is read past; a small compressed file may hold one of any length."""

MAX_LINE_BYTES: Final = 32 << 20
"""Longest line that is kept; a longer one is read past, so that no file fills the memory."""


def line_at_or_after(file: BinaryIO, start: int, end: int) -> int | None:
    """Seek the first line that begins in a part of a file; return where it begins, or None.

    Parts that lie side by side have each line once: in the one in which it begins.
    """
    if not start:
        file.seek(0)
        return 0
    file.seek(start - 1)
    begun = file.readline(end - start)
    return start - 1 + len(begun) if begun.endswith(b"\n") else None


def lines_up_to(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Iterate over lines with their ends; of a longer one, `limit` bytes come without an end.

    The rest of such a line is then still to be read, see `skip_line`. As fast as iterating over
    the file itself, which would hold a line of any length.
    """
    return iter(partial(file.readline, limit), b"")


def skip_line(file: BinaryIO, most: int) -> int:
    """Read past the end of the line; return how many bytes were read, just over `most` at most."""
    done = 0
    while done <= most and (part := file.readline(_CHUNK_BYTES)):
        done += len(part)
        if part.endswith(b"\n"):
            break
    return done
