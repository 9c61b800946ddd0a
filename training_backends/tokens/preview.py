"""Show the text and the tokens that rows of a configuration become in training.

Uses the trainer's encoder, but neither torch nor a GPU nor the model's weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Literal

import msgspec

from training_backends.core.config import TrainingConfig
from training_backends.core.errors import ConfigError, Issue
from training_backends.datasets.open_file import STDIN, opened
from training_backends.datasets.scan_part import BOM, MAX_LINE_BYTES, lines_up_to
from training_backends.tokens.counts import Uncountable
from training_backends.tokens.encoders import (
    Encoded,
    Encoder,
    MistralEncoder,
    TokenizerError,
    UnusableRow,
    encoder_for,
)
from training_backends.tokens.examples import ExampleReader
from training_backends.tokens.tokenizers import find_tokenizer

__all__ = ["PreviewExample", "Segment", "preview"]

Part = Literal["chosen", "rejected"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of an example that are all in the loss, or all not.

    Attributes:
        text: Their text, with control tokens.
        trained: Whether they are in the loss.
        tokens: Number of tokens.
    """

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewExample:
    """A training example, or why a row has none.

    Attributes:
        line: Line of the row in the file.
        example: Number of the example among those of the row, from 1.
        examples: Number of examples of the row; 0 if it is rejected.
        part: Which answer of a preference it has.
        segments: The text that is trained on, cut to the sequence length.
        truncated: Whether tokens were cut off.
        reason: Why the row is rejected.
    """

    path: Path
    line: int
    example: int = 1
    examples: int = 1
    part: Part | None = None
    segments: tuple[Segment, ...] = ()
    token_ids: tuple[int, ...] = ()
    truncated: bool = False
    reason: str | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens in the loss."""
        return sum(segment.tokens for segment in self.segments if segment.trained)


def preview(
    config: TrainingConfig, *, rows: int = 3, seq_len: int | None = None
) -> Iterator[PreviewExample]:
    """Encode the first rows of each training file as the local trainer does. Blocking.

    Args:
        rows: Number of rows per file.
        seq_len: Longer examples are truncated; None: `hyperparameters.seq_len`, if set.

    Raises:
        ConfigError: The model's tokenizer is not on this machine, or the data is elsewhere.
        DatasetError: A file cannot be read.
    """
    limit = seq_len or config.hyperparameters.seq_len
    fim_ratio = config.hyperparameters.fim_ratio or 0.0
    encoder = _encoder(config)
    reader = ExampleReader(
        encoder, limit or 1 << 30, fim_ratio=fim_ratio, seed=config.hyperparameters.seed or 0
    )
    for number, source in enumerate(config.data.train):
        if source.path is None or source.path == STDIN:
            message = f"{source} is not a file on this machine"
            raise _problem(message, "copy the data here", f"data.train.{number}")
        for line, content in islice(_lines(source.path), rows):
            try:
                examples = _encode(reader, config.method, content, f"train/{number}/{line}")
            except (msgspec.DecodeError, UnusableRow) as error:
                yield PreviewExample(path=source.path, line=line, examples=0, reason=str(error))
                continue
            except TokenizerError as error:
                raise _problem(str(error), "use another model or other rows") from error
            for place, (part, example) in enumerate(examples, 1):
                yield PreviewExample(
                    path=source.path,
                    line=line,
                    example=place,
                    examples=len(examples),
                    part=part,
                    segments=tuple(_segments(encoder, example, limit)),
                    token_ids=tuple(example.ids[:limit]),
                    truncated=limit is not None and len(example.ids) > limit,
                )


def _encoder(config: TrainingConfig) -> Encoder:
    model = config.base_model
    template = config.chat_template.read() if config.chat_template else None
    try:
        tokenizer = find_tokenizer(model)
        if tokenizer.kind == "tiktoken":
            message = f"OpenAI does not document how rows are encoded for {model!r}"
            raise _problem(message, "use another model")
        if tokenizer.path is None or tokenizer.path.is_dir():
            return encoder_for(model, tokenizer.path, chat_template=template)
        return MistralEncoder(tokenizer.path)
    except (Uncountable, TokenizerError) as error:
        raise _problem(str(error), "download the model, or use a local directory") from error


def _problem(message: str, fix: str, field: str = "model") -> ConfigError:
    return ConfigError(
        "The rows cannot be previewed.",
        issues=[Issue(code="no_preview", message=message, field=field, fix=fix)],
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with opened(path) as source:
        for number, line in enumerate(lines_up_to(source.lines, MAX_LINE_BYTES), 1):
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield number, content


def _encode(
    reader: ExampleReader, method: str, line: bytes, place: str
) -> list[tuple[Part | None, Encoded]]:
    if method == "dpo":
        chosen, rejected = reader.pair(line)
        return [("chosen", chosen), ("rejected", rejected)]
    if method == "classifier":
        ids = reader.labelled(line)[1]
        return [(None, Encoded(ids, [False] * len(ids)))]
    return [(None, example) for example in reader.supervised(line, place)[0]]


def _segments(encoder: Encoder, example: Encoded, limit: int | None) -> Iterator[Segment]:
    # The first token is never predicted, so it is never in the loss.
    trained = [False, *example.trained[1:]]
    pairs = zip(example.ids[:limit], trained[:limit], strict=True)
    for is_trained, tokens in groupby(pairs, itemgetter(1)):
        ids = [token for token, _ in tokens]
        yield Segment(encoder.decode(ids, keep_controls=True), is_trained, len(ids))
