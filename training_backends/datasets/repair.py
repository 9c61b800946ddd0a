"""Rewrite a data file with the repairs that do not change its meaning."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final, Literal, NamedTuple, Self

from xxhash import xxh3_128_digest

from training_backends.core.config import ClassifierTarget
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import ConfigError, DatasetError, Issue, TrainingBackendError
from training_backends.core.escape import plural
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.file_report import MOST_BLANK_LINES
from training_backends.datasets.findings import Finding, too_long
from training_backends.datasets.open_file import STDIN, Source, opened
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.repair_row import is_empty, mend
from training_backends.datasets.scan_part import BOM, MAX_LINE_BYTES, UTF16
from training_backends.datasets.write import Meter, NewFiles, Progress, refuse_existing

__all__ = ["MOST_BLANK_BYTES", "REPAIRS", "Repair", "Repaired", "SeenRows", "repair"]

_IN_MEMORY: Final = 1 << 18
"""Rows kept in a set of about 30 MB; beyond it, hashes are stored on disk (slower)."""


_INSERT: Final = "INSERT OR IGNORE INTO seen VALUES (?)"


class SeenRows:
    """Set of the rows seen so far, by 128-bit hash, so that collisions are negligible.

    A context manager.
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
        """Add a row and return whether it is new; trailing whitespace is ignored.

        Raises:
            TrainingBackendError: The temporary directory is full.
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
    """Move hashes to an anonymous on-disk table, which is deleted with the connection."""
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
        f"Could not store row hashes in the temporary directory: {error}.",
        hint="Free space there, or set SQLITE_TMPDIR to another directory.",
    )


REPAIRS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "byte_order_mark": "byte order marks removed",
        "line_ends": "line endings changed from CRLF to LF",
        "blank_line": "blank lines removed",
        "empty_row": "empty rows removed",
        "duplicate_row": "duplicate rows removed",
        "trailing_turns": "rows truncated after the last assistant message",
        "call_ids": "rows with new tool call ids",
        "arguments": "rows with arguments converted to strings",
        "invalid_row": "invalid rows removed",
    }
)
"""Repairs by code, with the label of their count."""

_PIECE: Final = 1 << 20
MOST_BLANK_BYTES: Final = 1 << 30
"""Consecutive bytes of blank lines; a small compressed file can contain any number."""
_ROUNDS: Final = 4
"""Maximum number of passes over a row."""

OnRepair = Callable[["Repair"], None]
OnIssue = Callable[[Issue], None]


class Repair(NamedTuple):
    """One repair that was made.

    Attributes:
        line: Line number in the input file, from 1.
        code: A key of `REPAIRS`.
        message: Description of the repair.
    """

    line: int
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """Result of repairing a file.

    Attributes:
        rows: Rows read, without blank lines.
        written: Rows written.
        invalid: Rows written unchanged that still have an error.
        counts: Number of repairs by code.
        backup: Path of the original content after an in-place repair; None if unchanged.
    """

    source: Path
    target: Path
    rows: int
    written: int
    invalid: int
    counts: Mapping[str, int]
    backup: Path | None = None


def repair(
    path: Path,
    target: Path | None = None,
    *,
    provider_format: ProviderFormat = MISTRAL,
    targets: Sequence[ClassifierTarget] = (),
    drop_invalid: bool = False,
    force: bool = False,
    on_repair: OnRepair | None = None,
    on_issue: OnIssue | None = None,
    on_progress: Progress | None = None,
) -> Repaired:
    """Write a repaired copy of a file; valid rows keep their bytes.

    A row that cannot be repaired is copied unchanged.

    Args:
        path: Input file, decompressed if necessary; `-` is standard input.
        target: Output file; None repairs the file in place, unless there is nothing to
            repair, and backs up the original to NAME.orig.
        provider_format: The provider format.
        targets: Allowed classifier targets.
        drop_invalid: Remove rows that cannot be repaired.
        force: Overwrite `target` if it exists.
        on_repair: Called with each repair; line endings are reported once, at the end.
        on_issue: Called with each remaining error.

    Raises:
        DatasetError: The file cannot be read, or no rows would be left.
        ConfigError: `target` or NAME.orig already exists, or the file to repair in place is
            compressed.
        TrainingBackendError: `target` cannot be written.
    """
    work = _Repairing(path, RowRules(provider_format, targets), on_repair, on_issue)
    work.drop_invalid = drop_invalid
    if target is None:
        return _in_place(path, work, on_progress)
    if not force:
        refuse_existing(target)
    with opened(path) as source, NewFiles() as made:
        if path != STDIN and target.exists() and target.samefile(path):
            raise ConfigError(f"{path} is both the input and the output.", hint="Use --in-place.")
        with made.create(target) as out:
            work.run(source, out, on_progress)
    return work.result(target)


def _in_place(path: Path, work: "_Repairing", on_progress: Progress | None) -> Repaired:
    with opened(path) as source, NewFiles() as made:
        if source.kind != "plain" or path == STDIN:
            raise ConfigError(
                f"{path} is not a plain file, so it cannot be repaired in place.",
                hint="Write to a new file with --output.",
            )
        # Follow a symlink, so that it still refers to the file afterwards.
        place = path.resolve() if path.is_symlink() else path
        backup = place.with_name(f"{place.name}.orig")
        refuse_existing(
            backup, hint="The original is backed up to this path. Move or delete the file first."
        )
        with made.create(place, like=place) as out:
            work.run(source, out, on_progress)
        if not work.counts:
            made.discard(place)
            return work.result(path)
        made.keep(place, backup)
    return work.result(path, backup)


class _Blank(NamedTuple):
    """Consecutive blank lines."""

    last: int
    lines: int
    size: int


class _Repairing:
    """One pass over a file."""

    def __init__(
        self,
        path: Path,
        rules: RowRules,
        on_repair: OnRepair | None,
        on_issue: OnIssue | None,
    ) -> None:
        self._path = path
        self._rules = rules
        self._on_repair = on_repair
        self._on_issue = on_issue
        self._seen = SeenRows()
        self._first_crlf = 0
        self._blank = _Blank(0, 0, 0)
        self._rows = self._written = self._invalid = 0
        self.counts: Counter[str] = Counter()
        self.drop_invalid = False

    def run(self, source: Source, out: BinaryIO, on_progress: Progress | None) -> None:
        """Read the complete file and write the repaired one."""
        size = 0 if self._path == STDIN else self._path.stat().st_size
        meter = Meter(self._path, size, on_progress)
        judge, is_new = self._rules.judge, self._seen.add
        with self._seen:
            kept = False
            for number, piece, part in _pieces(source.lines):
                meter.reach(source.size)
                if part == "line":
                    # Fast path: nearly all lines are valid.
                    if piece.endswith(b"}\n") and not judge(piece)[1] and is_new(piece):
                        self._rows += 1
                        self._written += 1
                        out.write(piece)
                    else:
                        out.write(self._line(number, piece))
                    continue
                if part == "start":
                    self._rows += 1
                    kept = self._accepts(number, (too_long(MAX_LINE_BYTES),))
                if kept:
                    out.write(piece)
        if self._first_crlf:
            many = self.counts["line_ends"]
            where = plural(many, "line") + (", first here" if many > 1 else "")
            self._report(self._first_crlf, "line_ends", f"changed CRLF to LF in {where}")
        if not self._written:
            raise _unusable(
                self._path, "empty_file", "no rows would be left", "check that it is JSON Lines"
            )

    def result(self, target: Path, backup: Path | None = None) -> Repaired:
        """Return the result."""
        return Repaired(
            source=self._path,
            target=target,
            rows=self._rows,
            written=self._written,
            invalid=self._invalid,
            counts=dict(self.counts),
            backup=backup,
        )

    def _line(self, number: int, line: bytes) -> bytes:
        """Return the repaired line with its line ending."""
        if number == 1 and line.startswith(UTF16):
            raise _unusable(self._path, "bad_utf8", "the file is UTF-16", "save it as UTF-8")
        row = line.removesuffix(b"\n")
        end = line[len(row) :]
        if row.endswith(b"\r"):
            row = row.rstrip(b"\r")
            self.counts["line_ends"] += 1
            self._first_crlf = self._first_crlf or number
        if row.startswith(BOM):
            while row.startswith(BOM):
                row = row.removeprefix(BOM)
            self._done(number, "byte_order_mark", "removed byte order mark")
        if not row or row.isspace():
            self._blank_line(number, len(line))
            return b""
        self._rows += 1
        repaired = self._row(number, row)
        return b"" if repaired is None else repaired + end

    def _blank_line(self, number: int, size: int) -> None:
        before = self._blank if self._blank.last == number - 1 else _Blank(number, 0, 0)
        self._blank = _Blank(number, before.lines + 1, before.size + size)
        if self._blank.lines > MOST_BLANK_LINES or self._blank.size > MOST_BLANK_BYTES:
            message = f"more than {MOST_BLANK_LINES:,} blank lines, or 1 GiB of them, in a row"
            raise _unusable(self._path, "only_blank_lines", message, "check that it is JSON Lines")
        self._done(number, "blank_line", "removed blank line")

    def _row(self, number: int, row: bytes) -> bytes | None:
        """Return the repaired row, or None to remove it."""
        findings = self._rules.judge(row)[1]
        done: Sequence[Repair] = ()
        if findings:
            if is_empty(row):
                self._done(number, "empty_row", "removed empty row")
                return None
            row, findings, done = self._repair_row(number, row, findings)
        if not self._seen.add(row):
            self._done(number, "duplicate_row", "removed duplicate row")
            return None
        if not self._accepts(number, findings):
            return None
        for one in done:
            self._done(*one)
        return row

    def _repair_row(
        self, number: int, row: bytes, findings: Sequence[Finding]
    ) -> tuple[bytes, Sequence[Finding], Sequence[Repair]]:
        """Repair a row until nothing changes; keep the original if an error remains."""
        new, left = row, findings
        done: list[Repair] = []
        for _ in range(_ROUNDS):
            new, mends = mend(new, {finding.code for finding in left}, self._rules.provider_format)
            if not mends:
                break
            done += (Repair(number, code, message) for code, message in mends)
            left = self._rules.judge(new)[1]
        if done and not any(finding.severity == "error" for finding in left):
            return new, left, done
        return row, findings, ()

    def _accepts(self, number: int, findings: Sequence[Finding]) -> bool:
        """Count a row and report its errors; return False if it is removed for them."""
        errors = [finding for finding in findings if finding.severity == "error"]
        if errors and self.drop_invalid:
            first = errors[0]
            what = f"{first.field}: {first.message}" if first.field else first.message
            self._done(number, "invalid_row", f"removed invalid row: {what}")
            return False
        self._written += 1
        self._invalid += bool(errors)
        if self._on_issue:
            for error in errors:
                self._on_issue(Issue(path=str(self._path), line=number, **error._asdict()))
        return True

    def _done(self, number: int, code: str, message: str) -> None:
        self.counts[code] += 1
        self._report(number, code, message)

    def _report(self, number: int, code: str, message: str) -> None:
        if self._on_repair:
            self._on_repair(Repair(number, code, message))


def _pieces(file: BinaryIO) -> Iterator[tuple[int, bytes, Literal["line", "start", "rest"]]]:
    """Yield lines with their endings; lines that are too long to check come in pieces."""
    number = 0
    inside = False
    while piece := file.readline(_PIECE if inside else MAX_LINE_BYTES + 1):
        is_end = piece.endswith(b"\n")
        if inside:
            yield number, piece, "rest"
        else:
            number += 1
            inside = not is_end and len(piece) > MAX_LINE_BYTES
            yield number, piece, "start" if inside else "line"
        inside = inside and not is_end


def _unusable(path: Path, code: str, message: str, fix: str) -> DatasetError:
    issue = Issue(code=code, message=message, path=str(path), fix=fix)
    return DatasetError(f"Could not repair {path}.", issues=[issue])
