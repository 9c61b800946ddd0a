"""Cut data files into parts that are judged one by one, or at the same time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from training_backends.core.errors import DatasetError, Issue
from training_backends.datasets.lines import BOM, MAX_SKIPPED_BYTES, UTF16, skip_line
from training_backends.datasets.open_file import STDIN, Source, opened
from training_backends.datasets.scan_part import End, Part, Told

__all__ = ["parts_of"]

_FIRST: Final = 1 << 16
"""Bytes of the first part; small, so that what is wrong at the beginning is told at once."""

_SEARCHED: Final = 1 << 20
"""Bytes at the beginning of a file in which every row is searched for doubled keys."""

_LARGEST: Final = 4 << 20
_LARGEST_BLOCK: Final = 1 << 20
"""The same where the bytes themselves are handed over."""


def parts_of(
    file: int, path: Path, *, rules: bytes, max_line: int, plain_only: bool = False
) -> Iterator[Told]:
    """Yield all parts of a file, and its end unless it cannot be read to that.

    Args:
        rules: What the parts are judged by, see `packed_rules`.
        plain_only: Refuse files that have to be unpacked.
    """
    cutting = _Cutting(file, path, rules, max_line)
    try:
        with opened(path, digest=True) as source:
            if plain_only and source.kind != "plain":
                what = "Parquet" if source.kind == "parquet" else f"compressed ({source.kind})"
                fix = "send plain JSON Lines; `training-backends data repair` writes them"
                yield cutting.problem("bad_utf8", f"the file is {what}", fix)
                return
            # Looked at, not taken: a stream cannot go back.
            head = source.lines.peek(len(BOM))[: len(BOM)]
            if head.startswith(UTF16):
                yield cutting.problem("bad_utf8", "the file is UTF-16", "save the file as UTF-8")
                return
            begin = len(BOM) if head == BOM else 0
            if begin:
                text = "the file starts with a byte order mark"
                fix = "save the file as UTF-8 without a byte order mark"
                yield cutting.problem("byte_order_mark", text, fix)
            if source.kind == "plain" and path != STDIN:
                yield from cutting.ranges(begin)
            else:
                source.lines.read(begin)
                yield from cutting.blocks(source)
    except DatasetError as error:
        yield from (Told(file, 0, issue) for issue in error.issues)


class _Cutting:
    """One file and what all its parts have."""

    def __init__(self, file: int, path: Path, rules: bytes, max_line: int) -> None:
        self._file = file
        self._path = path
        self._rules = rules
        self._max_line = max_line

    def problem(self, code: str, message: str, fix: str) -> Told:
        """Tell of something wrong on line 1."""
        issue = Issue(code=code, message=message, path=str(self._path), line=1, fix=fix)
        return Told(self._file, 0, issue)

    def unusable(self, code: str, message: str) -> Told:
        """Tell of a file that is not read to its end."""
        fix = "write one JSON object on each line"
        return Told(self._file, 0, Issue(code=code, message=message, path=str(self._path), fix=fix))

    def ranges(self, begin: int) -> Iterator[Told]:
        """Yield parts of a plain file by where they lie."""
        found = self._path.stat()
        start, step = begin, _FIRST
        while start < found.st_size:
            end = min(start + step, found.st_size)
            part = Part(
                path=str(self._path),
                start=start,
                end=end,
                begins=start == begin,
                closely=end <= _SEARCHED,
                rules=self._rules,
                max_line=self._max_line,
            )
            yield Told(self._file, end, part)
            start, step = end, min(2 * step, _LARGEST)
        yield Told(
            self._file, start, End("plain", found.st_size, None, found.st_size, found.st_mtime_ns)
        )

    def blocks(self, source: Source) -> Iterator[Told]:
        """Yield parts of a stream with their lines."""
        lines, step, unpacked = source.lines, _FIRST, 0
        # At first take what there is; whoever writes to a pipe may be slow.
        while block := lines.read1(step) if step == _FIRST else lines.read(step):
            if not block.endswith(b"\n"):
                rest = lines.readline(self._max_line + 1)
                block += rest
                if not rest.endswith(b"\n") and len(rest) > self._max_line:
                    # The judge sees that it is too long, and needs no more of it.
                    skipped = skip_line(lines, MAX_SKIPPED_BYTES)
                    if skipped > MAX_SKIPPED_BYTES:
                        text = f"a line is longer than {MAX_SKIPPED_BYTES >> 30} GiB"
                        yield self.unusable("line_too_long", text)
                        return
                    unpacked += skipped
            unpacked += len(block)
            closely = unpacked <= _SEARCHED
            part = Part(lines=block, closely=closely, rules=self._rules, max_line=self._max_line)
            yield Told(self._file, source.size, part)
            step = min(2 * step, _LARGEST_BLOCK)
        yield Told(self._file, source.size, End(source.kind, source.size, source.sha256, unpacked))
