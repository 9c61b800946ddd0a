"""Check the rows of a part of a file: the task of a worker process, and its messages.

Parts are checked independently of each other, so that they can be checked in parallel; the
verdicts are merged in order by `file_report`.
"""

import io
import pickle
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, islice
from operator import itemgetter
from threading import get_ident
from typing import TYPE_CHECKING, BinaryIO, Final, Literal, NamedTuple

from xxhash import xxh3_64_intdigest

from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import Issue
from training_backends.core.files import Stamp
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.check_fast import Verdict as RowVerdict
from training_backends.datasets.findings import Facts, Finding, too_long

if TYPE_CHECKING:
    from training_backends.core.config import ClassifierTarget

__all__ = [
    "BOM",
    "KEPT_PER_CODE",
    "MAX_LINE_BYTES",
    "MAX_SKIPPED_BYTES",
    "UTF16",
    "End",
    "FilePart",
    "Judged",
    "Kind",
    "Scanned",
    "Verdict",
    "judge",
    "judge_scanned",
    "line_at_or_after",
    "lines_up_to",
    "packed_rules",
    "skip_line",
]

BOM: Final = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16."""

_CHUNK_BYTES: Final = 1 << 20

MAX_SKIPPED_BYTES: Final = 1 << 30
"""Bytes of a line that are skipped at most; a compressed file may have a line of any length."""

MAX_LINE_BYTES: Final = 32 << 20
"""Longest line that is kept in memory; longer ones are skipped."""


def line_at_or_after(file: BinaryIO, start: int, end: int) -> int | None:
    """Seek to the first line that starts in a byte range; return its offset, or None.

    With adjacent ranges each line belongs to exactly one: the one in which it starts.
    """
    if not start:
        file.seek(0)
        return 0
    file.seek(start - 1)
    begun = file.readline(end - start)
    return start - 1 + len(begun) if begun.endswith(b"\n") else None


def lines_up_to(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Iterate over lines with their endings; a longer line yields `limit` bytes without one.

    The rest of such a line remains to be read, see `skip_line`. As fast as iterating over the
    file itself, but with bounded memory.
    """
    return iter(partial(file.readline, limit), b"")


def skip_line(file: BinaryIO, most: int) -> int:
    """Skip the rest of a line, up to about `most` bytes; return how many were skipped."""
    done = 0
    while done <= most and (part := file.readline(_CHUNK_BYTES)):
        done += len(part)
        if part.endswith(b"\n"):
            break
    return done


KEPT_PER_CODE: Final = 20
"""Findings per code that are kept; others are only counted."""

Packing = Literal["plain", "gzip", "zstd", "parquet"]

_PIECE: Final = 1 << 16
"""Bytes of a line that are read at a time."""

_AT_ONCE: Final = 64
"""Lines that are read at a time."""

_CLOSELY_EVERY: Final = 64
"""One in this many batches is searched for duplicate keys."""

_LF: Final = ord("\n")
_BRACE: Final = {ord("}")}
_last: Final = itemgetter(-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """Complete lines of a file to check.

    Attributes:
        closely: Search every row for duplicate keys, not one batch in 64.
        rules: See `packed_rules`.
    """

    lines: bytes
    closely: bool = True
    rules: bytes
    max_line: int


@dataclass(slots=True)
class Kind:
    """The rows of one sample type.

    Attributes:
        rows: Number of rows.
        good: Number of rows without an error.
        first: Line numbers of the first rows.
    """

    rows: int = 0
    good: int = 0
    first: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Verdict:
    """Counts and findings of a part; line numbers are relative to it, from 1.

    Attributes:
        lines: Number of lines.
        rows: Number of non-blank lines.
        bad_rows: Number of rows with an error.
        found: Findings by line; only the first of each code.
        counts: Number of warnings and errors by code.
        kinds: Rows by sample type, in order of first occurrence.
        blank: Number of blank lines.
        first_blank: The first blank line.
        first_crlf: The first line that ends with CRLF.
        hashes: One per readable row, in order.
        places: Line numbers of the hashes; None for 1, 2, 3…
        sizes: Rows by bit length of their size.
        facts: Counts over the rows.
    """

    lines: int = 0
    rows: int = 0
    bad_rows: int = 0
    found: list[tuple[int, Finding]] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    blank: int = 0
    first_blank: int | None = None
    first_crlf: int | None = None
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))
    places: "array[int] | None" = None
    sizes: Counter[int] = field(default_factory=Counter)
    facts: Facts = field(default_factory=Facts)

    def add(self, line: int, findings: Sequence[Finding]) -> bool:
        """Add the findings of one line; return whether there is an error."""
        bad = False
        for finding in findings:
            bad = bad or finding.severity == "error"
            count = self.counts.setdefault(finding.code, [0, 0])
            if sum(count) < KEPT_PER_CODE:
                self.found.append((line, finding))
            count[finding.severity == "error"] += 1
        self.bad_rows += bad
        return bad


class End(NamedTuple):
    """Marks the end of a file that was read completely.

    Attributes:
        packing: Format of the file.
        size: Bytes of the stored file.
        sha256: Their digest.
        unpacked: Bytes of the lines, decompressed.
        stamp: The file's stamp before it was read; None for standard input.
    """

    packing: Packing
    size: int
    sha256: str | None
    unpacked: int
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Scanned:
    """A part of a file, its end, or an issue of the file as a whole.

    Attributes:
        file: Number of the file.
        done: Bytes of the stored file up to the end of the part.
    """

    file: int
    done: int
    what: FilePart | End | Issue


@dataclass(frozen=True, slots=True)
class Judged:
    """`Scanned` with a verdict instead of a part."""

    file: int
    done: int
    what: Verdict | End | Issue


def packed_rules(
    provider_format: ProviderFormat, targets: "Sequence[ClassifierTarget]" = ()
) -> bytes:
    """Pickle the rules, to be sent with every part."""
    return pickle.dumps((provider_format, tuple(targets)))


def judge(part: FilePart) -> Verdict:
    """Check the lines of a part."""
    return _Judging(part).run(io.BytesIO(part.lines), len(part.lines))


def judge_scanned(scanned: Scanned) -> Judged:
    """Check a part of a file; pass anything else through."""
    what = scanned.what
    return Judged(scanned.file, scanned.done, judge(what) if isinstance(what, FilePart) else what)


@lru_cache(maxsize=16)
def _rules(packed: bytes, _thread: int) -> RowRules:
    """Return the rules of a thread; cached, because they hold caches and counts."""
    provider_format, targets = pickle.loads(packed)  # noqa: S301  # from our own parent
    return RowRules(provider_format, targets)


class _Judging:
    """The check of one part."""

    def __init__(self, part: FilePart) -> None:
        self.verdict = Verdict()
        self._rules = _rules(part.rules, get_ident())
        self._rules.facts = self.verdict.facts
        self._max_line = part.max_line
        self._closely = part.closely
        self._longest = min(part.max_line, _PIECE - 1)
        self._lengths = array("I")
        self._no_rows = 0
        self._single_rows = 0
        self._usual: RowVerdict | None = None
        self._begun = 0
        self._kept = bytearray()

    def run(self, file: BinaryIO, left: int) -> Verdict:
        """Check lines until `left` bytes are read, including the line at the boundary."""
        pieces_of = lines_up_to(file, _PIECE)
        batch = 0
        while (left > 0 or self._begun) and (pieces := list(islice(pieces_of, _AT_ONCE))):
            # Once a duplicate key was found, search every row.
            self._closely = self._closely or "duplicate_key" in self.verdict.counts
            self._rules.closely = self._closely or batch % _CLOSELY_EVERY == 0
            batch += 1
            sizes = list(map(len, pieces))
            if not self._begun and self._are_rows(pieces, sizes):
                if sum(sizes) > left:
                    # Lines that start after the part belong to the next one.
                    count = sum(start < left for start in accumulate(sizes[:-1], initial=0))
                    del pieces[count:], sizes[count:]
                self._take(pieces, sizes)
                left -= sum(sizes)
            else:
                left = self._take_each(pieces, left)
        if self._begun:
            self._finish()
        return self._totals()

    def _totals(self) -> Verdict:
        verdict = self.verdict
        verdict.facts = self._rules.facts  # updated on access
        verdict.lines = self._number
        verdict.rows = verdict.lines - verdict.blank
        verdict.facts.longest_row = max(self._lengths, default=0)
        verdict.sizes = Counter(map(int.bit_length, self._lengths))
        if (usual := self._usual) and usual[0]:
            verdict.kinds[usual[0]].rows += len(self._lengths) - self._single_rows
            verdict.kinds[usual[0]].good += len(self._lengths) - self._single_rows
        return verdict

    @property
    def _number(self) -> int:
        """Number of lines so far."""
        return len(self._lengths) + self._no_rows

    def _are_rows(self, pieces: list[bytes], sizes: list[int]) -> bool:
        """Return whether all pieces are complete lines that end in `}` and LF."""
        # One check per batch, because this is the hot path.
        complete = pieces[-1][-1] == _LF and max(sizes) <= self._longest and min(sizes) > 1
        return complete and {*map(_last, pieces)} == _BRACE

    def _take(self, lines: list[bytes], sizes: list[int]) -> None:
        """Process lines; a batch with identical verdicts is handled as a whole."""
        found = list(map(self._rules.judge, lines))
        verdict = self.verdict
        if found.count(self._usual) == len(found):  # type: ignore[arg-type]  # None is not in it
            if verdict.places is not None:
                verdict.places.extend(range(self._number + 1, self._number + len(found) + 1))
            self._lengths.extend(sizes)
            verdict.hashes.extend(map(xxh3_64_intdigest, lines))
            return
        for line, one in zip(lines, found, strict=True):
            self._take_one(line, one)

    def _take_each(self, pieces: list[bytes], left: int) -> int:
        """Process lines and pieces of long ones individually; return the bytes left."""
        for piece in pieces:
            if left <= 0 and not self._begun:
                break  # belongs to the next part
            left -= len(piece)
            if len(piece) < _PIECE and not self._begun:
                self._take_one(piece, None)
                continue
            self._extend(piece)
            if left <= 0 and self._begun > self._max_line:
                self._finish()  # too long, whatever follows
        return left

    def _extend(self, piece: bytes) -> None:
        """Add a piece of a long line; lines that are too long are not kept."""
        self._begun += len(piece)
        if self._begun <= self._max_line + 1:
            self._kept += piece
        else:
            self._kept.clear()
        if piece[-1] == _LF:
            self._finish()

    def _finish(self) -> None:
        """Process the long line that was read in pieces."""
        line, size = bytes(self._kept), self._begun
        self._kept.clear()
        self._begun = 0
        if size - line.endswith(b"\n") > self._max_line:
            self._add_too_long()
        else:
            self._take_one(line, None)

    def _add_too_long(self) -> None:
        self._no_rows += 1
        self.verdict.add(self._number, (too_long(self._max_line),))
        self._record_places()

    def _take_one(self, line: bytes, found: RowVerdict | None) -> None:
        """Process a single line, with its verdict if there is one already."""
        verdict = self.verdict
        if len(line) - line.endswith(b"\n") > self._max_line:
            self._add_too_long()
            return
        row = line if found else self._trimmed(line, self._number + 1)
        if row:
            self._lengths.append(len(line))
            if found is None or found is not self._usual:
                self._single_rows += 1
                if self._is_bad(found or self._rules.judge(row)):
                    row = None
        else:
            self._no_rows += 1
        if row:
            verdict.hashes.append(xxh3_64_intdigest(row))
            if verdict.places is not None:
                verdict.places.append(self._number)
        else:
            self._record_places()

    def _record_places(self) -> None:
        """Record line numbers of hashes from the first line without a hash on."""
        if self.verdict.places is None:
            self.verdict.places = array("I", range(1, self._number))

    def _is_bad(self, found: RowVerdict) -> bool:
        """Record the verdict on the current row; return whether there is an error."""
        kind, findings = found
        bad = self.verdict.add(self._number, findings)
        if kind:
            counted = self.verdict.kinds.setdefault(kind, Kind())
            counted.rows += 1
            counted.good += not bad
            if len(counted.first) < KEPT_PER_CODE:
                counted.first.append(self._number)
            elif not findings and self._usual is None:
                # Rows with this verdict can be handled in batches from now on.
                self._usual = found
        return bad

    def _trimmed(self, line: bytes, number: int) -> bytes | None:
        """Return a row without trailing whitespace, ended with LF; None for a blank line."""
        text = line.rstrip()
        if line.endswith(b"\r\n") and not self.verdict.first_crlf:
            self.verdict.first_crlf = number
        if text:
            return text + b"\n"
        self.verdict.blank += 1
        self.verdict.first_blank = self.verdict.first_blank or number
        return None
