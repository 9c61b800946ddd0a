"""Read data files in one pass and yield issues as they are found."""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import gettempdir
from typing import Final

from training_backends.core.dataset import DataFile
from training_backends.core.errors import DatasetError, Issue
from training_backends.core.files import Stamp, stamp_of
from training_backends.datasets.duplicates import Repeat, RowHashes
from training_backends.datasets.file_report import Collector
from training_backends.datasets.findings import Finding
from training_backends.datasets.open_file import STDIN, Source, opened
from training_backends.datasets.scan_part import (
    BOM,
    KEPT_PER_CODE,
    MAX_SKIPPED_BYTES,
    UTF16,
    End,
    FilePart,
    Judged,
    Scanned,
    Verdict,
    judge_scanned,
    skip_line,
)
from training_backends.datasets.worker_pool import cpu_count, run_parallel

__all__ = ["NOT_SEARCHED", "Progress", "Reading", "parts_of"]

NOT_SEARCHED: Final = "duplicates_not_searched"
"""Issue code about this machine, not the data."""

FIRST_BLOCK: Final = 1 << 16
"""Bytes of the first part; small, so that issues at the start are reported immediately."""

_SEARCHED: Final = 1 << 20
"""Bytes at the start of a file in which every row is searched for duplicate keys."""

LARGEST_BLOCK: Final = 1 << 20
"""Bytes of the largest part, without the rest of its last line."""


def parts_of(
    file: int, path: Path, *, rules: bytes, max_line: int, plain_only: bool = False
) -> Iterator[Scanned]:
    """Yield the parts of a file, then an `End` if it was read completely.

    Args:
        rules: The rules, see `packed_rules`.
        plain_only: Reject compressed files and Parquet.
    """
    cutting = _Cutting(file, path, rules, max_line)
    try:
        stamp = None if path == STDIN else _stamp(path)
        with opened(path, digest=True) as source:
            if plain_only and source.kind != "plain":
                what = "Parquet" if source.kind == "parquet" else f"compressed ({source.kind})"
                fix = "upload plain JSON Lines; `training-backends data repair` converts it"
                yield cutting.problem("bad_utf8", f"the file is {what}", fix)
                return
            # Peek, because a stream cannot seek back.
            head = source.lines.peek(len(BOM))[: len(BOM)]
            if head.startswith(UTF16):
                yield cutting.problem("bad_utf8", "the file is UTF-16", "save the file as UTF-8")
                return
            begin = len(BOM) if head == BOM else 0
            if begin:
                text = "the file starts with a byte order mark"
                fix = "save the file as UTF-8 without a byte order mark"
                yield cutting.problem("byte_order_mark", text, fix)
            yield from cutting.blocks(source, begin, stamp)
    except DatasetError as error:
        yield from (Scanned(file, 0, issue) for issue in error.issues)


class _Cutting:
    """Splits one file into parts."""

    def __init__(self, file: int, path: Path, rules: bytes, max_line: int) -> None:
        self._file = file
        self._path = path
        self._rules = rules
        self._max_line = max_line

    def problem(self, code: str, message: str, fix: str) -> Scanned:
        """Return an issue on line 1."""
        issue = Issue(code=code, message=message, path=str(self._path), line=1, fix=fix)
        return Scanned(self._file, 0, issue)

    def unusable(self, code: str, message: str) -> Scanned:
        """Return the issue for a file that is not read completely."""
        fix = "write one JSON object per line"
        return Scanned(
            self._file, 0, Issue(code=code, message=message, path=str(self._path), fix=fix)
        )

    def blocks(self, source: Source, begin: int, stamp: Stamp | None) -> Iterator[Scanned]:
        """Yield the parts of a file, from byte `begin` of its lines."""
        lines, step = source.lines, FIRST_BLOCK
        unpacked = len(lines.read(begin))
        # Not more than there was at the start: another process may write faster than this reads.
        most = stamp[2] if stamp and source.kind == "plain" else sys.maxsize
        # Start with whatever is available: the writer of a pipe may be slow.
        while unpacked < most and (
            block := lines.read1(step) if step == FIRST_BLOCK else lines.read(step)
        ):
            if not block.endswith(b"\n"):
                rest = lines.readline(self._max_line + 1)
                block += rest
                if not rest.endswith(b"\n") and len(rest) > self._max_line:
                    # This much is enough to report that the line is too long.
                    skipped = skip_line(lines, MAX_SKIPPED_BYTES)
                    if skipped > MAX_SKIPPED_BYTES:
                        text = f"a line is longer than {MAX_SKIPPED_BYTES >> 30} GiB"
                        yield self.unusable("line_too_long", text)
                        return
                    unpacked += skipped
            unpacked += len(block)
            closely = unpacked <= _SEARCHED
            part = FilePart(
                lines=block, closely=closely, rules=self._rules, max_line=self._max_line
            )
            yield Scanned(self._file, source.size, part)
            step = min(2 * step, LARGEST_BLOCK)
        end = End(source.kind, source.size, source.sha256, unpacked, stamp)
        yield Scanned(self._file, source.size, end)


_TASK: Final = "training_backends.datasets.scan_part:judge_scanned"

PARALLEL_BYTES: Final = 128 << 20
"""Bytes below which starting more processes is slower."""

_MOST_PROCESSES: Final = 6
"""Limit of processes; with more, the parent that merges the verdicts is the bottleneck."""

Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes read so far and its size; may raise to stop reading."""


class Reading:
    """One pass over several files.

    Args:
        collectors: One per file.
        rules: The rules, see `packed_rules`.
        max_line: Maximum bytes of a line; longer ones are an error.
        plain_only: Reject compressed files and Parquet.
        on_progress: Called with the bytes read.
    """

    def __init__(
        self,
        collectors: Sequence[Collector],
        *,
        rules: bytes,
        max_line: int,
        plain_only: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        self._files: dict[int, DataFile] = {}
        self._collectors = collectors
        self._sizes = [_size(collector.path) for collector in collectors]
        self._rules = rules
        self._max_line = max_line
        self._plain_only = plain_only
        self._on_progress = on_progress

    @property
    def files(self) -> list[DataFile]:
        """The summaries of the files that were read completely."""
        return list(self._files.values())

    def issues(self, processes: int | None = None) -> Iterator[Issue]:
        """Yield issues as they are found; worker processes end with the iterator.

        Args:
            processes: Maximum number of processes; None chooses by size.
        """
        with ExitStack() as stack:
            hashes = stack.enter_context(RowHashes())
            judged = run_parallel(
                _TASK, self._parts(), processes=processes or self._worth_processes()
            )
            for each in stack.enter_context(closing(judged)):
                yield from self._measure(each, hashes)
            try:
                yield from self._repeated(hashes)
            except OSError as error:
                yield _not_searched(error)

    def issues_of_rows(self) -> Generator[Issue, None, None]:
        """Do the same in this process, without a search for duplicates."""
        for part in self._parts():
            yield from self._take(judge_scanned(part))

    def _parts(self) -> Iterator[Scanned]:
        for number, collector in enumerate(self._collectors):
            parts = parts_of(
                number,
                collector.path,
                rules=self._rules,
                max_line=self._max_line,
                plain_only=self._plain_only,
            )
            for part in parts:
                if collector.failed:
                    break
                yield part

    def _worth_processes(self) -> int:
        return min(cpu_count(), _MOST_PROCESSES) if sum(self._sizes) >= PARALLEL_BYTES else 1

    def _measure(self, judged: Judged, hashes: RowHashes) -> Iterator[Issue]:
        """Process the verdict on a part, including its row hashes."""
        number, what = judged.file, judged.what
        collector = self._collectors[number]
        if isinstance(what, Verdict) and not collector.failed:
            hashes.add(number, what.hashes, collector.lines, what.places)
        yield from self._take(judged)
        if isinstance(what, End) and not collector.failed:
            self._files[number] = collector.file(what)
        if self._on_progress:
            self._on_progress(collector.path, judged.done, max(judged.done, self._sizes[number]))

    def _take(self, judged: Judged) -> Iterator[Issue]:
        what, collector = judged.what, self._collectors[judged.file]
        if collector.failed:
            return
        if isinstance(what, Verdict):
            yield from collector.take(what)
        elif isinstance(what, End):
            yield from collector.end(what)
        else:
            yield what

    def _repeated(self, hashes: RowHashes) -> Iterator[Issue]:
        """Yield duplicate rows, except in duplicate files, which have an issue of their own."""
        first: dict[str, int] = {}
        for number, file in self._files.items():
            first.setdefault(file.sha256 or str(number), number)
        groups = [
            [number for number in first.values() if self._files[number].role == role]
            for role in ("train", "validation")
        ]
        found = hashes.find(groups, most=KEPT_PER_CODE)
        for number, file in self._files.items():
            counts = found.duplicates[number], found.overlaps[number]
            fix = "remove it, or run `training-backends data repair`"
            yield from self._named("duplicate_row", number, found.named, counts[0], fix)
            fix = "use validation rows that are not in the training data"
            code = "train_validation_overlap"
            yield from self._named(code, number, found.named_overlaps, counts[1], fix)
            yield from self._collectors[number].rest()
            known = {
                "findings": self._collectors[number].findings,
                "duplicate_rows": counts[0],
                "overlapping_rows": counts[1] if file.role == "validation" else None,
            }
            summary = file.summary.model_copy(update=known)
            self._files[number] = file.model_copy(update={"summary": summary})

    def _named(
        self, code: str, number: int, named: Sequence[Repeat], count: int, fix: str
    ) -> Iterator[Issue]:
        collector = self._collectors[number]
        for place, before in named:
            if place.file == number:
                first = self._collectors[before.file]
                where = "" if first is collector else f" of {first.path}"
                what = (
                    "duplicate of" if first.role == collector.role else "also in the training data:"
                )
                text = f"{what} line {before.line:,}{where}"
                yield from collector.add(Finding(code, None, text, fix, "warning"), place.line)
                count -= 1
        collector.leave(code, count, "warning")


def _not_searched(error: OSError) -> Issue:
    """Return the issue for row hashes that could not be stored."""
    return Issue(
        code=NOT_SEARCHED,
        message=f"skipped the search for duplicate rows: {error.strerror or error}",
        fix=f"free space in {gettempdir()}, or set TMPDIR to another directory",
        severity="warning",
    )


def _stamp(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except OSError:
        return None  # opening it reports why


def _size(path: Path) -> int:
    stamp = _stamp(path)
    return stamp[2] if stamp else 0
