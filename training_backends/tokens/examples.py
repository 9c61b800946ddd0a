"""Encode the lines of data files as training examples: what the trainer trains on.

`ExampleReader.read` is a pure function of the line, its place, the tokenizer and the chat
template, without torch, so it can run in any process.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from training_backends.core.config import ClassifierTarget
from training_backends.datasets.rows import (
    ClassifierRow,
    PreferenceRow,
    TextRow,
    parse_any_row,
    parse_row,
)
from training_backends.tokens.counts import pair_of
from training_backends.tokens.encoders import Encoded, Encoder, UnusableRow

__all__ = [
    "Cut",
    "EncodedLine",
    "ExampleReader",
    "TrainingExample",
    "cut_out",
    "truncated",
]

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


class TrainingExample(NamedTuple):
    """What is trained on.

    Attributes:
        sequences: One, or the chosen and the rejected answer of a pair.
        labels: Of a classifier: 1 for each output that is correct, else 0; then for each target
            whether the row labels it.
    """

    sequences: tuple[Encoded, ...]
    labels: bytes = b""


class EncodedLine(NamedTuple):
    """The result of encoding a line.

    Attributes:
        examples: Usually one; none if none of its tokens are in the loss, and several if the chat
            template requires one for each answer.
        truncated: Whether one was truncated to the maximum length.
    """

    examples: list[TrainingExample]
    truncated: bool


def truncated(example: Encoded, seq_len: int) -> Encoded | None:
    """Truncate an example; None if none of the remaining tokens are in the loss."""
    # The first token is never predicted, so it is never in the loss.
    if not any(example.trained[1:seq_len]):
        return None
    return Encoded(example.ids[:seq_len], [False, *example.trained[1:seq_len]])


@dataclass(frozen=True, slots=True)
class ExampleReader:
    """Encodes lines for a training method.

    Attributes:
        seq_len: Maximum tokens of an example; only `read` truncates, except that
            fill-in-the-middle shortens what it encodes.
        fim_ratio: Fraction of texts that are trained with fill-in-the-middle.
        seed: Selects these texts and where they are split.
        targets: Targets of a classifier.
    """

    encoder: Encoder
    seq_len: int
    fim_ratio: float = 0.0
    seed: int = 0
    method: Literal["sft", "dpo", "classifier"] = "sft"
    targets: tuple[ClassifierTarget, ...] = ()

    def read(self, line: bytes, place: str) -> EncodedLine:
        """Encode a line as the trainer stores it.

        Args:
            place: Identifies the line, as a seed.

        Raises:
            msgspec.DecodeError: The line is not a row.
            UnusableRow: The row cannot be trained on.
            TokenizerError: The tokenizer does not support the method.
        """
        if self.method == "classifier":
            return self._classified(line)
        is_shortened = False
        conversations: list[tuple[Encoded, ...]]
        if self.method == "dpo":
            conversations = [self.pair(line)]
        else:
            found, is_shortened = self.supervised(line, place)
            conversations = [(each,) for each in found]
        examples = []
        for conversation in conversations:
            sequences = [truncated(each, self.seq_len) for each in conversation]
            kept = tuple(each for each in sequences if each is not None)
            if len(kept) == len(sequences):
                examples.append(TrainingExample(kept))
            is_shortened |= any(len(each.ids) > self.seq_len for each in conversation)
        return EncodedLine(examples, is_shortened)

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

    def _classified(self, line: bytes) -> EncodedLine:
        row, ids = self.labelled(line)
        unknown = row.labels.keys() - {target.name for target in self.targets}
        if unknown:
            raise UnusableRow(f"{min(unknown)!r} is not one of classifier_targets")
        marks = [
            mark for target in self.targets for mark in _marks(target, row.labels.get(target.name))
        ]
        known = [target.name in row.labels for target in self.targets]
        kept = ids[: self.seq_len]
        sequence = Encoded(kept, [False] * len(kept))
        return EncodedLine(
            [TrainingExample((sequence,), bytes(marks + known))], len(ids) > self.seq_len
        )


def _marks(target: ClassifierTarget, given: str | list[str] | None) -> list[bool]:
    """Return for each label of a target whether a row has it."""
    if given is None:
        return [False] * len(target.labels)
    labels = [given] if isinstance(given, str) else given
    if target.loss_function != "multi_class" and len(labels) != 1:
        raise UnusableRow(f"{target.name!r} takes one label; the row has {len(labels)}")
    for label in labels:
        if label not in target.labels:
            raise UnusableRow(f"{label[:40]!r} is not a label of {target.name!r}")
    return [label in labels for label in target.labels]
