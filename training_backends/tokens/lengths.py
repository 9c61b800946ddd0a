"""How long rows are: a sum, the extremes and a histogram that never grows."""

from collections.abc import Mapping

import msgspec

__all__ = ["Lengths", "bucket_of"]

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
