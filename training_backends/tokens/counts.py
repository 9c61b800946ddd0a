"""What a count of tokens gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from training_backends.datasets.rows import (
    ChatRow,
    ClassifierRow,
    PreferenceRow,
    TextRow,
    parse_any_row,
)

__all__ = [
    "UNKNOWN_LAYOUT",
    "AnyRow",
    "BadRow",
    "Lengths",
    "Row",
    "TokenCount",
    "Uncountable",
    "bucket_of",
    "has_images",
    "parts_of",
    "read_row",
    "texts_of",
]

Row = ChatRow | TextRow
AnyRow = ChatRow | TextRow | ClassifierRow | PreferenceRow

UNKNOWN_LAYOUT = "the provider's encoding of classifier rows is not documented"


def read_row(line: bytes) -> AnyRow:
    """Decode a line.

    Raises:
        Uncountable: It holds no row.
    """
    try:
        return parse_any_row(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Uncountable("the row is invalid") from None


def parts_of(row: AnyRow) -> tuple[Row, ...]:
    """Return what a row is read as: itself, or for a preference the pair of conversations.

    Raises:
        Uncountable: It is a classifier's.
    """
    if isinstance(row, ClassifierRow):
        raise Uncountable(UNKNOWN_LAYOUT)
    if isinstance(row, PreferenceRow):
        answers = (row.chosen, row.rejected)
        return tuple(ChatRow([*row.prompt, *answer], row.tools) for answer in answers)
    return (row,)


def texts_of(row: AnyRow) -> list[str]:
    """Return the texts in a row, of whatever format it is.

    Raises:
        Uncountable: It holds images.
    """
    texts: list[str] = []
    for part in (row.content,) if isinstance(row, ClassifierRow) else parts_of(row):
        if isinstance(part, TextRow):
            texts.append(part.text)
        elif has_images(part):
            raise Uncountable("images cannot be counted for this model")
        else:
            texts += [message.text for message in part.messages]
    return texts


def has_images(row: Row) -> bool:
    """Tell whether a row holds anything but text."""
    if isinstance(row, TextRow):
        return False
    return any(type(m.content) is list and m.has_other_parts for m in row.messages)


_SMALLEST = 16


def bucket_of(length: int) -> int:
    """Return the upper bound of the bucket that a length falls in, the bound included.

    There are four buckets between a power of two and the next, and every power is a bound, so
    that how many rows are longer than a usual context length is exact.
    """
    if length <= _SMALLEST:
        return _SMALLEST
    width = 1 << ((length - 1).bit_length() - 3)
    return -(-length // width) * width


class Lengths(msgspec.Struct, kw_only=True):
    """What is known of the rows of some data.

    Attributes:
        tokens: In all rows.
        rows: How many; of a sample, how many there are by its weights.
        longest: Length of the longest row; a pair of answers is as long as the longer one.
        buckets: Rows by the upper bound of their bucket.
        over: Rows longer than the length that was asked for.
    """

    tokens: int = 0
    rows: float = 0
    shortest: int | None = None
    longest: int = 0
    buckets: dict[int, float] = msgspec.field(default_factory=dict)
    over: float = 0

    def add(self, sequences: tuple[int, ...], seq_len: int | None, weight: float = 1) -> None:
        """Add one row, given as the lengths of the token sequences that it is read as."""
        length = max(sequences)
        self.tokens += sum(sequences)
        self.rows += weight
        if self.shortest is None or length < self.shortest:
            self.shortest = length
        self.longest = max(self.longest, length)
        bucket = bucket_of(length)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + weight
        if seq_len is not None and length > seq_len:
            self.over += weight

    def merge(self, other: "Lengths") -> None:
        """Add the rows of `other`."""
        self.tokens += other.tokens
        self.rows += other.rows
        shortest = [each for each in (self.shortest, other.shortest) if each is not None]
        self.shortest = min(shortest, default=None)
        self.longest = max(self.longest, other.longest)
        self.over += other.over
        for bucket, rows in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + rows

    def histogram(self) -> Mapping[int, int]:
        """Return whole rows by the upper bound of their bucket, in order."""
        return {bucket: round(self.buckets[bucket]) for bucket in sorted(self.buckets)}


class Uncountable(ValueError):
    """A row or a model has no exact count; the text says why."""


class BadRow(Uncountable):
    """The data have a row without an exact count; the text says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the training files, each row counted once whatever its file's weight.

    Attributes:
        data_tokens: None when they cannot be counted; `reason` then says why.
        basis: How they were counted.
        interval: Bounds of the 95 % interval when `sampled`.
        bad_row: The reason is a row, not the tokenizer.
        tokenizer: Name of the tokenizer, when one is known.
        rows: How many rows; their lengths are those of the rows drawn when `sampled`. A
            preference is as long as the longer of its two conversations.
        histogram: Rows by length, under the upper bound of each bucket.
        seq_len: The length that was asked for.
        over: Rows longer than that.
        notes: What else there is to know about the number.
    """

    data_tokens: int | None = None
    basis: Literal["exact", "sampled"] = "exact"
    interval: tuple[int, int] | None = None
    tokenizer: str | None = None
    reason: str | None = None
    bad_row: bool = False
    rows: int | None = None
    shortest: int | None = None
    longest: int | None = None
    histogram: Mapping[int, int] | None = None
    seq_len: int | None = None
    over: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Tokens a row."""
        return self.data_tokens / self.rows if self.rows and self.data_tokens is not None else None

    def rows_over(self, seq_len: int) -> int | None:
        """Return how many rows are longer than that; None where this is not known exactly.

        It is known for the length that the count was asked for, for powers of two and the
        other bounds of the histogram, and beyond the longest row.
        """
        if self.basis != "exact" or self.histogram is None or self.longest is None:
            return None
        if seq_len == self.seq_len:
            return self.over
        if seq_len >= self.longest:
            return 0
        if bucket_of(seq_len) == seq_len:
            return sum(rows for bound, rows in self.histogram.items() if bound > seq_len)
        return None
