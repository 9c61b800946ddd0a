"""Encode parts of data files as training examples, in any process."""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import msgspec

from training_backends.core.config import ClassifierTarget
from training_backends.tokens.encoders import UnusableRow, encoder_for
from training_backends.tokens.examples import ExampleReader

__all__ = [
    "EncodedPart",
    "EncodingJob",
    "EncodingSettings",
    "RowCounts",
    "encode_part",
    "forget_tokenizer",
]

_SHOWN_ROWS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSettings:
    """What the examples of a line depend on, see `ExampleReader`.

    Attributes:
        model: Name of the model whose tokenizer is used, for messages.
        directory: Its directory; None for the built-in model.
        chat_template: Jinja template that replaces the model's own.
    """

    model: str
    directory: Path | None
    chat_template: str | None
    method: Literal["sft", "dpo", "classifier"]
    seq_len: int
    fim_ratio: float
    seed: int
    targets: tuple[ClassifierTarget, ...]


@dataclass(frozen=True, slots=True)
class EncodingJob:
    """Lines of a file to encode.

    Attributes:
        name: Identifies the file within the run, independent of its path.
        first: Number of the first line, from 1.
    """

    settings: EncodingSettings
    name: str
    first: int
    lines: Sequence[bytes]


class RowCounts(msgspec.Struct):
    """Counts of rows and of what became of them.

    Attributes:
        rows: Usable rows.
        examples: Training examples.
        truncated: Rows truncated to the maximum length.
        divided: Rows that became several examples, and how many.
        untrained: Rows left out because none of their tokens are in the loss.
        invalid: Rows left out because they are invalid.
        reasons: The first of these, as (line, reason).
    """

    rows: int = 0
    examples: int = 0
    truncated: int = 0
    divided: tuple[int, int] = (0, 0)
    untrained: int = 0
    invalid: int = 0
    reasons: list[tuple[int, str]] = msgspec.field(default_factory=list)

    def add(self, other: "RowCounts") -> None:
        """Add the counts of later rows."""
        self.rows += other.rows
        self.examples += other.examples
        self.truncated += other.truncated
        self.divided = (
            self.divided[0] + other.divided[0],
            self.divided[1] + other.divided[1],
        )
        self.untrained += other.untrained
        self.invalid += other.invalid
        self.reasons = [*self.reasons, *other.reasons][:_SHOWN_ROWS]


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """The examples of a part of a file, one after the other.

    Attributes:
        ids: Token ids, 4 bytes each.
        trained: For each, whether it is in the loss, a byte each.
        lengths: Number of tokens of each sequence.
        labels: Labels of a classifier's examples, as many bytes for each.
    """

    counts: RowCounts
    ids: bytes
    trained: bytes
    lengths: "array[int]"
    labels: bytes


def encode_part(job: EncodingJob) -> EncodedPart:
    """Encode lines.

    Raises:
        TokenizerError: The tokenizer cannot be loaded, or does not support the method.
    """
    reader = _reader_for(job.settings)
    counts = RowCounts()
    ids, trained, labels = bytearray(), bytearray(), bytearray()
    lengths = array("q")
    for number, line in enumerate(job.lines, job.first):
        if not line.strip():
            continue
        try:
            found, is_truncated = reader.read(line, f"{job.name}/{number}")
        except (msgspec.DecodeError, UnusableRow) as error:
            counts.invalid += 1
            counts.reasons.append((number, str(error)))
            continue
        counts.rows += 1
        counts.examples += len(found)
        counts.truncated += is_truncated
        counts.untrained += not found
        if len(found) > 1:
            counts.divided = (counts.divided[0] + 1, counts.divided[1] + len(found))
        for example in found:
            for sequence in example.sequences:
                ids += struct.pack(f"{len(sequence.ids)}i", *sequence.ids)  # faster than array
                trained += bytes(sequence.trained)
                lengths.append(len(sequence.ids))
            labels += example.labels
    counts.reasons = counts.reasons[:_SHOWN_ROWS]
    return EncodedPart(counts, bytes(ids), bytes(trained), lengths, bytes(labels))


@lru_cache(maxsize=1)
def _reader_for(settings: EncodingSettings) -> ExampleReader:
    encoder = encoder_for(settings.model, settings.directory, chat_template=settings.chat_template)
    if settings.fim_ratio:
        encoder.fill_in("", "", "")  # raises if the tokenizer does not support it
    return ExampleReader(
        encoder,
        settings.seq_len,
        fim_ratio=settings.fim_ratio,
        seed=settings.seed,
        method=settings.method,
        targets=settings.targets,
    )


def forget_tokenizer() -> None:
    """Release the tokenizer that this process has loaded."""
    _reader_for.cache_clear()
