"""Read data files once, all of them, and tell of issues on the way."""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import gettempdir
from typing import Final

from training_backends.core.dataset import DataFile
from training_backends.core.errors import DatasetError, Issue
from training_backends.datasets.duplicates import Repeat, RowHashes
from training_backends.datasets.file_report import Collector
from training_backends.datasets.findings import Finding
from training_backends.datasets.open_file import STDIN, Source, opened, unreadable
from training_backends.datasets.scan_part import (
    BOM,
    KEPT_PER_CODE,
    MAX_SKIPPED_BYTES,
    UTF16,
    End,
    Judged,
    Part,
    Told,
    Verdict,
    judge_told,
    skip_line,
)
from training_backends.datasets.worker_pool import cpu_count, run_parallel

__all__ = ["Progress", "Reading", "digested", "parts_of"]


def digested(file: DataFile) -> DataFile:
    """Return what is known of a file with its digest.

    Raises:
        OSError: The file cannot be read.
    """
    if file.sha256 is not None:
        return file
    with file.path.open("rb", buffering=0) as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return file.model_copy(update={"sha256": digest})


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
                fix = "upload plain JSON Lines; `training-backends data repair` converts it"
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
        fix = "write one JSON object per line"
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


_TASK: Final = "training_backends.datasets.scan_part:judge_told"

_WORTH_PROCESSES: Final = 128 << 20
"""Bytes below which starting another process takes longer than it saves."""

_MOST_PROCESSES: Final = 6
"""More of them would wait for the parent, which adds up what they find."""

Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes read so far and its size; may raise to stop reading."""


class Reading:
    """One pass over some files.

    Args:
        collectors: One for each file.
        rules: What rows are judged by, see `packed_rules`.
        max_line: Bytes of the longest line that is judged.
        plain_only: Refuse files that have to be unpacked.
        on_progress: Told how far the reading is.
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
        """What is known of the files that were read to their end."""
        return list(self._files.values())

    def issues(self, processes: int | None = None) -> Iterator[Issue]:
        """Yield issues as they are found; leave no process behind, however it ends.

        Args:
            processes: How many may judge; None: as many as are worth it.
        """
        with ExitStack() as stack:
            hashes = stack.enter_context(RowHashes())
            judged = run_parallel(
                _TASK, self._parts(), processes=processes or self._worth_processes()
            )
            for each in stack.enter_context(closing(judged)):
                yield from self._measure(each, hashes)
            yield from self._compared()
            try:
                yield from self._repeated(hashes)
            except OSError as error:
                yield _not_searched(error)

    def issues_of_rows(self) -> Generator[Issue, None, None]:
        """Do the same in this process alone, without digests and rows that stand twice."""
        for part in self._parts():
            yield from self._take(judge_told(part))

    def _parts(self) -> Iterator[Told]:
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
        return min(cpu_count(), _MOST_PROCESSES) if sum(self._sizes) >= _WORTH_PROCESSES else 1

    def _measure(self, judged: Judged, hashes: RowHashes) -> Iterator[Issue]:
        """Take a part of a file, with its hashes."""
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
            # One part says it for all that are still to come.
            collector.failed = what.code == "unreadable_file"
            yield what

    def _compared(self) -> Iterator[Issue]:
        """Make the digests of files that may be the same, being of one size."""
        sizes = Counter(file.size for file in self._files.values())
        for number, file in self._files.items():
            if sizes[file.size] > 1:
                try:
                    self._files[number] = digested(file)
                except OSError as error:
                    yield unreadable(file.path, error)

    def _repeated(self, hashes: RowHashes) -> Iterator[Issue]:
        """Tell of rows that stand twice; not where a whole file does, which says more."""
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
    """Say that rows are not compared: their hashes find no room beside the data."""
    return Issue(
        code="duplicates_not_searched",
        message=f"skipped the search for duplicate rows: {error.strerror or error}",
        fix=f"free space in {gettempdir()}, or set TMPDIR to another directory",
        severity="warning",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
