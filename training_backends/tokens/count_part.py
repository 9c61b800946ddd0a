"""What a count is made of: parts of files, samples, and the comparison with the reference."""

import random
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from training_backends.datasets.open_file import opened
from training_backends.datasets.scan_part import MAX_LINE_BYTES, line_at_or_after, lines_up_to
from training_backends.tokens.counters import (
    Counter,
    count_row,
    counter_of,
    has_reference,
)
from training_backends.tokens.counts import BadRow, Lengths, Uncountable, read_row, texts_of
from training_backends.tokens.tokenizers import Tokenizer

__all__ = ["Check", "Job", "Part", "Sample", "compare", "count_part", "draw", "run"]

_CHECKED_LINE_BYTES: Final = 1 << 20
"""Longer rows are not compared: the reference would take seconds for one."""

_NEAR_BYTES: Final = 8 << 20
_PIECE_BYTES: Final = MAX_LINE_BYTES + 2
_STEP: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Rows of one file that are to be counted, all of them or a few.

    Attributes:
        packed: It has to be unpacked, and so is read whole.
        draws: How many rows to take, as likely as they are long; None for all.
        slow: Count with the reference itself.
        texts_only: Count the texts of a classifier's rows, and nothing around them.
    """

    path: Path
    tokenizer: Tokenizer
    seq_len: int | None = None
    start: int = 0
    end: int = sys.maxsize
    packed: bool = False
    draws: int | None = None
    slow: bool = False
    texts_only: bool = False


@dataclass(slots=True)
class Part:
    """The rows of a part of a file.

    Attributes:
        lines: How many there are, the empty ones too.
        failure: Why the last of them has no count.
    """

    lengths: Lengths = field(default_factory=Lengths)
    lines: int = 0
    failure: str | None = None


@dataclass(slots=True)
class Sample:
    """Rows drawn from a file.

    Attributes:
        lengths: Theirs, each weighted by how many rows it stands for.
        shares: Tokens per byte of each.
        at_least: Tokens of the rows drawn, each once.
    """

    lengths: Lengths = field(default_factory=Lengths)
    shares: list[float] = field(default_factory=list)
    at_least: int = 0


@dataclass(frozen=True, slots=True)
class Check:
    """What comparing a few rows with the reference gave.

    Attributes:
        difference: The first row where the two disagree.
        omitted: Why nothing was compared.
    """

    difference: str | None = None
    omitted: str | None = None


def run(job: Job) -> Part | Check:
    """Do a job of a process: compare the rows that it draws, or count all."""
    return count_part(job) if job.draws is None else compare(job)


def count_part(job: Job) -> Part:
    """Count all rows of a job; the first without a count ends it."""
    part = Part()
    try:
        counter = counter_of(job.tokenizer, slow=job.slow)
        for line in _lines(job):
            part.lines += 1
            if not line.isspace():
                part.lengths.add(_count_line(counter, line, job), job.seq_len)
    except Uncountable as error:
        part.failure = str(error)
    return part


def _lines(job: Job) -> Iterator[bytes]:
    """Yield lines with their ends; one that is too long comes in pieces."""
    if job.packed:
        with opened(job.path) as source:
            yield from lines_up_to(source.lines, _PIECE_BYTES)
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


def _count_line(counter: Counter, line: bytes, job: Job) -> tuple[int, ...]:
    if len(line) >= _PIECE_BYTES:
        raise Uncountable("the line is too long")
    row = read_row(line)
    if job.texts_only:
        return (sum(map(counter.text, texts_of(row))),)
    return count_row(counter, row)


def draw(job: Job) -> Sample:
    """Draw rows, each as likely as it is long, the same ones for the same content.

    The mean of their tokens per byte, times the bytes of the file, is then an estimate without
    bias, whatever the lengths of the rows, and only the rows drawn are read.

    Raises:
        Uncountable: One of them has no count.
    """
    sample = Sample()
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


def compare(job: Job) -> Check:
    """Count a few rows and have the reference count them too."""
    if not has_reference(job.tokenizer):
        return Check()
    try:
        fast = counter_of(job.tokenizer)
        slow = counter_of(job.tokenizer, slow=True)
    except Uncountable as error:
        return Check(omitted=str(error))
    for place, line in _drawn_unpacked(job) if job.packed else _drawn(job):
        # What has no count ends the count itself, with the number of the line.
        with suppress(Uncountable):
            if len(line) <= _CHECKED_LINE_BYTES and line.strip():
                counted = _count_line(fast, line, job)
                if counted != _slow_line(slow, line, job):
                    return Check(difference=f"{job.path}, {place}")
    return Check()


def _slow_line(slow: Counter, line: bytes, job: Job) -> tuple[int, ...] | None:
    try:
        return _count_line(slow, line, job)
    except Uncountable:
        return None


def _drawn(job: Job) -> Iterator[tuple[str, bytes]]:
    """Yield where rows begin, and the rows with their ends."""
    size = job.path.stat().st_size
    chance = random.Random(size)  # noqa: S311  # repeatable on purpose
    places = sorted(chance.randrange(size) for _ in range(job.draws or 0)) if size else ()
    with job.path.open("rb") as file:
        for place in places:
            start = _line_start(file, place)
            file.seek(start)
            yield f"byte {start}", file.readline(_PIECE_BYTES)


def _drawn_unpacked(job: Job) -> Iterator[tuple[str, bytes]]:
    """Yield rows near the beginning: to draw from all, all would have to be unpacked."""
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
    """Find where the line begins that a byte is part of."""
    low = place
    while low > 0:
        high, low = low, max(0, low - _STEP)
        file.seek(low)
        found = file.read(high - low).rfind(b"\n")
        if found >= 0:
            return low + found + 1
    return 0
