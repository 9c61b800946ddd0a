"""Count parts of files, draw samples, and compare counts with the reference."""

import io
import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from training_backends.datasets.open_file import open_data, opened
from training_backends.datasets.scan_part import MAX_LINE_BYTES, line_at_or_after, lines_up_to
from training_backends.tokens.counters import (
    Counter,
    count_row,
    counter_of,
    has_reference,
)
from training_backends.tokens.counts import BadRow, Lengths, Uncountable, read_row, texts_of
from training_backends.tokens.tokenizers import Tokenizer

__all__ = [
    "CountCheck",
    "CountJob",
    "PartCount",
    "SampleCount",
    "compare",
    "count_part",
    "draw",
    "run",
]

_CHECKED_LINE_BYTES: Final = 1 << 20
"""Longer rows are not compared: the reference takes seconds for one."""

_NEAR_BYTES: Final = 8 << 20
_PIECE_BYTES: Final = MAX_LINE_BYTES + 2
_STEP: Final = 1 << 12
"""Bytes in which the start of a line is searched at first; doubled until it is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountJob:
    """Rows of one file to count: all of them or a sample.

    Attributes:
        lines: The lines between `start` and `end`; None to read them from the file.
        packed: The file is compressed, so it is read completely.
        draws: Number of rows to sample, weighted by length; None for all.
        slow: Count with the reference.
        texts_only: Count only the texts of classifier rows.
    """

    path: Path
    tokenizer: Tokenizer
    seq_len: int | None = None
    start: int = 0
    end: int = sys.maxsize
    lines: bytes | None = None
    packed: bool = False
    draws: int | None = None
    slow: bool = False
    texts_only: bool = False


@dataclass(slots=True)
class PartCount:
    """Counts of a part of a file.

    Attributes:
        lines: Number of lines, including blank ones.
        failure: Why the last line has no count.
    """

    lengths: Lengths = field(default_factory=Lengths)
    lines: int = 0
    failure: str | None = None


@dataclass(slots=True)
class SampleCount:
    """Counts of sampled rows.

    Attributes:
        lengths: Lengths, weighted by the number of rows that each represents.
        shares: Tokens per byte of each row.
        at_least: Total tokens of the distinct sampled rows.
    """

    lengths: Lengths = field(default_factory=Lengths)
    shares: list[float] = field(default_factory=list)
    at_least: int = 0


@dataclass(frozen=True, slots=True)
class CountCheck:
    """Result of comparing sampled rows with the reference.

    Attributes:
        difference: Position of the first row with different counts.
        omitted: Why nothing was compared.
    """

    difference: str | None = None
    omitted: str | None = None


def run(job: CountJob) -> PartCount | CountCheck:
    """Run a job: compare a sample with the reference, or count all rows."""
    return count_part(job) if job.draws is None else compare(job)


def count_part(job: CountJob) -> PartCount:
    """Count all rows of a job; stop at the first row without a count."""
    part = PartCount()
    try:
        counter = counter_of(job.tokenizer, slow=job.slow)
        for line in _lines(job):
            part.lines += 1
            if not line.isspace():
                part.lengths.add(_count_line(counter, line, job), job.seq_len)
    except Uncountable as error:
        part.failure = str(error)
    return part


def _lines(job: CountJob) -> Iterator[bytes]:
    """Yield lines with their endings; a line that is too long comes in pieces."""
    if job.packed:
        with opened(job.path) as source:
            yield from lines_up_to(source.lines, _PIECE_BYTES)
        return
    if job.lines is not None:
        yield from lines_up_to(io.BytesIO(job.lines), _PIECE_BYTES)
        return
    with job.path.open("rb") as file:
        place = line_at_or_after(file, job.start, job.end)
        if place is None:
            return
        for line in lines_up_to(file, _PIECE_BYTES):
            if place >= job.end:
                return
            place += len(line)
            yield line


def _count_line(counter: Counter, line: bytes, job: CountJob) -> tuple[int, ...]:
    if len(line) >= _PIECE_BYTES:
        raise Uncountable("the line is too long")
    row = read_row(line, keep_source=job.tokenizer.kind == "template")
    if job.texts_only:
        return (sum(map(counter.text, texts_of(row))),)
    return count_row(counter, row)


def draw(job: CountJob) -> SampleCount:
    """Sample rows with probability proportional to length; deterministic for the same content.

    The mean of tokens per byte, times the file size, is then an unbiased estimate, whatever the
    lengths of the rows, and only the sampled rows are read.

    Raises:
        Uncountable: A sampled row has no count.
    """
    sample = SampleCount()
    counter = counter_of(job.tokenizer, slow=job.slow)
    size = job.path.stat().st_size
    known: dict[str, tuple[int, ...]] = {}
    for place, line in _drawn(job):
        if place not in known:
            try:
                known[place] = _count_line(counter, line, job) if line.strip() else (0,)
            except Uncountable as error:
                raise BadRow(f"{job.path}, {place}: {error}") from None
            sample.at_least += sum(known[place])
        sample.shares.append(sum(known[place]) / len(line))
        if line.strip():
            weight = size / len(line) / (job.draws or 1)
            sample.lengths.add(known[place], job.seq_len, weight)
    return sample


def compare(job: CountJob) -> CountCheck:
    """Count sampled rows with the fast counter and the reference."""
    if not has_reference(job.tokenizer):
        return CountCheck()
    try:
        fast = counter_of(job.tokenizer)
        slow = counter_of(job.tokenizer, slow=True)
    except Uncountable as error:
        return CountCheck(omitted=str(error))
    for place, line in _drawn_unpacked(job) if job.packed else _drawn(job):
        # Rows without a count are reported by the count itself, with the line number.
        with suppress(Uncountable):
            if len(line) <= _CHECKED_LINE_BYTES and line.strip():
                counted = _count_line(fast, line, job)
                if counted != _slow_line(slow, line, job):
                    return CountCheck(difference=f"{job.path}, {place}")
    return CountCheck()


def _slow_line(slow: Counter, line: bytes, job: CountJob) -> tuple[int, ...] | None:
    try:
        return _count_line(slow, line, job)
    except Uncountable:
        return None


def _drawn(job: CountJob) -> Iterator[tuple[str, bytes]]:
    """Yield the position and the bytes of sampled rows."""
    size = job.path.stat().st_size
    draws = job.draws or 0
    chance = random.Random(size)  # noqa: S311  # repeatable on purpose
    # One in each of as many parts of equal size: rows that are alike often follow each other.
    places = [int((part + chance.random()) * size / draws) for part in range(draws)]
    with open_data(job.path) as file:
        for place in places:
            start = _line_start(file, place)
            file.seek(start)
            yield f"byte {start}", file.readline(_PIECE_BYTES)


def _drawn_unpacked(job: CountJob) -> Iterator[tuple[str, bytes]]:
    """Yield sampled rows near the start, to avoid decompressing the complete file."""
    lines: list[bytes] = []
    size = 0
    with opened(job.path) as source:
        for line in lines_up_to(source.lines, _PIECE_BYTES):
            lines.append(line)
            size += len(line)
            if size >= _NEAR_BYTES:
                break
    chance = random.Random(size)  # noqa: S311  # repeatable on purpose
    for number in sorted(chance.sample(range(len(lines)), min(job.draws or 0, len(lines)))):
        yield f"line {number + 1}", lines[number]


def _line_start(file: BinaryIO, place: int) -> int:
    """Return the start of the line that contains a byte."""
    low, step = place, _STEP
    while low > 0:
        high, low, step = low, max(0, low - step), 2 * step
        file.seek(low)
        found = file.read(high - low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
    return 0
