"""Results and errors of token counting, and the parts of rows that are counted."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import msgspec

from training_backends.datasets.rows import (
    ChatRow,
    ClassifierRow,
    Message,
    PreferenceRow,
    TextRow,
    parse_any_row,
)

__all__ = [
    "SAMPLE_NOTE",
    "UNKNOWN_LAYOUT",
    "AnyRow",
    "BadRow",
    "Lengths",
    "Row",
    "TokenCount",
    "Uncountable",
    "bucket_of",
    "has_images",
    "pair_of",
    "parts_of",
    "read_row",
    "texts_of",
]

Row = ChatRow | TextRow
AnyRow = ChatRow | TextRow | ClassifierRow | PreferenceRow

SAMPLE_NOTE = (
    "The tokens are estimated from a sample of the rows, and so is whatever depends on them; "
    "`--exact` counts all rows."
)
UNKNOWN_LAYOUT = "the provider's encoding of classifier rows is not documented"


def read_row(line: bytes, *, keep_source: bool = False) -> AnyRow:
    """Decode a line.

    Args:
        keep_source: Keep the JSON of messages and tools, which chat templates render.

    Raises:
        Uncountable: The line is not a valid row.
    """
    try:
        return parse_any_row(line, keep_source=keep_source)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Uncountable("the row is invalid") from None


def parts_of(row: AnyRow) -> tuple[Row, ...]:
    """Return the sequences of a row: the row itself, or the two conversations of a preference.

    Raises:
        Uncountable: It is a classifier row.
    """
    if isinstance(row, ClassifierRow):
        raise Uncountable(UNKNOWN_LAYOUT)
    if isinstance(row, PreferenceRow):
        return pair_of(row)[1]
    return (row,)


def pair_of(row: PreferenceRow) -> tuple[int, tuple[ChatRow, ChatRow]]:
    """Return the two conversations of a preference, and how many messages they share.

    What they share is not in the loss.
    """
    chosen, rejected = ([*row.prompt, *answer] for answer in (row.chosen, row.rejected))
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def conversation(messages: list[Message]) -> ChatRow:
        prompt = (
            msgspec.structs.replace(message, weight=0) if message.role == "assistant" else message
            for message in messages[:shared]
        )
        return ChatRow([*prompt, *messages[shared:]], row.tools)

    return shared, (conversation(chosen), conversation(rejected))


def texts_of(row: AnyRow) -> list[str]:
    """Return the texts of a row of any format.

    Raises:
        Uncountable: The row has images.
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
    """Return whether a row has parts other than text."""
    if isinstance(row, TextRow):
        return False
    return any(type(m.content) is list and m.has_other_parts for m in row.messages)


_SMALLEST = 16


def bucket_of(length: int) -> int:
    """Return the inclusive upper bound of a length's histogram bucket.

    There are four buckets per power of two, and every power is a bound, so that the number of rows
    longer than a common context length is exact.
    """
    if length <= _SMALLEST:
        return _SMALLEST
    width = 1 << ((length - 1).bit_length() - 3)
    return -(-length // width) * width


class Lengths(msgspec.Struct, kw_only=True):
    """Lengths of a set of rows, in tokens.

    Attributes:
        tokens: Total over all rows.
        rows: Number of rows; for a sample, the estimated total.
        sequences: Number of token sequences; a row may become several, a preference has two.
        longest: Length of the longest row; the longer answer counts for a pair.
        buckets: Number of rows by upper bound of the bucket.
        over: Number of rows longer than `seq_len`.
    """

    tokens: int = 0
    rows: float = 0
    sequences: float = 0
    shortest: int | None = None
    longest: int = 0
    buckets: dict[int, float] = msgspec.field(default_factory=dict)
    over: float = 0

    def add(self, sequences: tuple[int, ...], seq_len: int | None, weight: float = 1) -> None:
        """Add one row, given the lengths of its token sequences."""
        length = max(sequences)
        self.tokens += sum(sequences)
        self.rows += weight
        self.sequences += len(sequences) * weight
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
        self.sequences += other.sequences
        shortest = [each for each in (self.shortest, other.shortest) if each is not None]
        self.shortest = min(shortest, default=None)
        self.longest = max(self.longest, other.longest)
        self.over += other.over
        for bucket, rows in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + rows

    def histogram(self) -> Mapping[int, int]:
        """Return the number of rows by upper bound of the bucket, rounded and sorted."""
        return {bucket: round(self.buckets[bucket]) for bucket in sorted(self.buckets)}


class Uncountable(ValueError):
    """A row or a model has no exact count; the message has the reason."""


class BadRow(Uncountable):
    """A row of the data has no exact count; the message has its position and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """Tokens of the training files; each row counts once, whatever the weight of its file.

    Attributes:
        data_tokens: Total; None if it cannot be counted, with the `reason`.
        basis: Whether all rows were counted or a sample.
        interval: Bounds of the 95% confidence interval if `sampled`.
        bad_row: `reason` is about a row, not the tokenizer.
        tokenizer: Name of the tokenizer, if known.
        rows: Number of rows; lengths are those of the sampled rows if `sampled`. A
            preference has the length of the longer of its two conversations.
        sequences: Number of token sequences: more than `rows` if the chat template requires one
            for each answer; a preference has two.
        histogram: Number of rows by upper bound of the length bucket.
        seq_len: The requested sequence length.
        over: Number of rows longer than `seq_len`.
        notes: Caveats about the count.
    """

    data_tokens: int | None = None
    basis: Literal["exact", "sampled"] = "exact"
    interval: tuple[int, int] | None = None
    tokenizer: str | None = None
    reason: str | None = None
    bad_row: bool = False
    rows: int | None = None
    sequences: int | None = None
    shortest: int | None = None
    longest: int | None = None
    histogram: Mapping[int, int] | None = None
    seq_len: int | None = None
    over: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean tokens per row."""
        return self.data_tokens / self.rows if self.rows and self.data_tokens is not None else None

    def rows_over(self, seq_len: int) -> int | None:
        """Return how many rows are longer than `seq_len`; None if not known exactly.

        Known for the `seq_len` of the count, for powers of two and other bucket bounds of the
        histogram, and for anything above the longest row.
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
