"""Encode the lines of data files as training examples: what the trainer trains on.

`ExampleReader.read` is a pure function of the line, its place, the tokenizer and the chat
template, without torch, so it can run in any process.
"""

import random
from dataclasses import dataclass
from typing import Final, NamedTuple

from training_backends.datasets.rows import (
    ClassifierRow,
    PreferenceRow,
    TextRow,
    parse_any_row,
    parse_row,
)
from training_backends.tokens.counts import pair_of
from training_backends.tokens.encoders import Encoded, Encoder, UnusableRow

__all__ = ["Cut", "ExampleReader", "cut_out"]

_SHORTER: Final = 0.98
"""Slightly less than would fit if every character took the same number of tokens."""


class Cut(NamedTuple):
    """A text split for fill-in-the-middle."""

    prefix: str
    middle: str
    suffix: str


def cut_out(text: str, rng: random.Random) -> Cut:
    """Split a text at two random positions."""
    first, last = sorted(rng.randint(0, len(text)) for _ in range(2))
    return Cut(text[:first], text[first:last], text[last:])


@dataclass(frozen=True, slots=True)
class ExampleReader:
    """Encodes lines for a training method.

    Attributes:
        seq_len: Maximum tokens of an example; only fill-in-the-middle shortens what it encodes,
            the rest is truncated by the trainer.
        fim_ratio: Fraction of texts that are trained with fill-in-the-middle.
        seed: Selects these texts and where they are split.
    """

    encoder: Encoder
    seq_len: int
    fim_ratio: float = 0.0
    seed: int = 0

    def supervised(self, line: bytes, place: str) -> tuple[list[Encoded], bool]:
        """Encode a conversation or a text.

        Args:
            place: Identifies the line, as a seed.

        Returns:
            The examples, and whether a text was shortened.

        Raises:
            msgspec.DecodeError: The line is not a row.
            UnusableRow: The row cannot be encoded exactly.
        """
        row = parse_row(line, keep_source=True)
        if self.fim_ratio and isinstance(row, TextRow):
            rng = random.Random(f"{self.seed}/fim/{place}")  # noqa: S311  # not cryptographic
            if rng.random() < self.fim_ratio:
                example, is_shortened = self._fill_in(row.text, rng)
                return [example], is_shortened
        return self.encoder.encode(row), False

    def _fill_in(self, text: str, rng: random.Random) -> tuple[Encoded, bool]:
        # Truncating the tokens would drop the middle, which comes last: shorten the text instead.
        is_shortened = False
        while True:
            example = self.encoder.fill_in(*cut_out(text, rng))
            if len(example.ids) <= self.seq_len:
                return example, is_shortened
            is_shortened = True
            text = text[: int(_SHORTER * len(text) * self.seq_len / len(example.ids))]

    def pair(self, line: bytes) -> tuple[Encoded, Encoded]:
        """Encode the chosen and the rejected conversation; only the answers are in the loss.

        Raises:
            msgspec.DecodeError: The line is not a row.
            UnusableRow: The row is not a pair, or cannot be encoded exactly.
        """
        row = parse_any_row(line, keep_source=True)
        if not isinstance(row, PreferenceRow):
            raise UnusableRow("not a preference pair: it needs one prompt and two answers")
        shared, conversations = pair_of(row)
        if not shared or shared in {len(each.messages) for each in conversations}:
            raise UnusableRow("the two answers of a pair must share a prompt and differ")
        chosen, rejected = (self.encoder.encode(each) for each in conversations)
        if len(chosen) != 1 or len(rejected) != 1:
            raise UnusableRow(
                "the chat template changes earlier answers, so each conversation of a pair can "
                "have only one: end both with a single assistant message"
            )
        return chosen[0], rejected[0]

    def labelled(self, line: bytes) -> tuple[ClassifierRow, list[int]]:
        """Encode the content of a classifier row.

        Raises:
            msgspec.DecodeError: The line is not a row.
            UnusableRow: The row has no labels or no content, or cannot be encoded exactly.
        """
        row = parse_any_row(line, keep_source=True)
        if not isinstance(row, ClassifierRow) or not row.labels:
            raise UnusableRow("the row has no `labels`")
        ids = self.encoder.read(row.content)
        if not ids:
            raise UnusableRow("the row has no content")
        return row, ids
