"""What a count of tokens gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from training_backends.tokens.lengths import bucket_of

__all__ = ["TokenCount"]


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
