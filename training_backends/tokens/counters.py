"""Count the tokens of one row with the tokenizer of a model."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

from training_backends.datasets.rows import ChatRow, TextRow, byte_token_count
from training_backends.tokens.counts import AnyRow, Row, Uncountable, parts_of
from training_backends.tokens.encoders import TokenizerError, UnusableRow, encoder_for
from training_backends.tokens.images import (
    image_count,
    refuse_distant_images,
    refuse_images,
)
from training_backends.tokens.mistral_layout import VERSIONS, Layout, chat_request
from training_backends.tokens.text_counters import (
    TextCount,
    missing,
    sentencepiece_count,
    tekken_count,
)
from training_backends.tokens.tokenizers import Tokenizer

__all__ = [
    "NOTE",
    "Counter",
    "OpenAICounter",
    "Reference",
    "TemplateCounter",
    "count_row",
    "counter_of",
    "has_reference",
    "is_fast",
]


class Reference:
    """Counts rows with mistral-common in fine-tuning mode."""

    def __init__(self, path: Path) -> None:
        """Load a tokenizer file, which takes about a second.

        Raises:
            Uncountable: A package is not installed, or the file version is not supported.
        """
        try:
            from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415
            from mistral_common.protocol.instruct.request import (  # noqa: PLC0415
                ChatCompletionRequest,
            )
            from mistral_common.protocol.instruct.validator import (  # noqa: PLC0415
                ValidationMode,
            )
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

            self._tokenizer = MistralTokenizer.from_file(str(path), ValidationMode.finetuning)
        except ImportError as error:
            raise missing("mistral-common with sentencepiece") from error
        except Exception as error:
            first = str(error).partition("\n")[0]
            raise Uncountable(f"mistral-common could not read {path.name}: {first}") from error
        self._request = ChatCompletionRequest
        instruct = self._tokenizer.instruct_tokenizer
        if instruct.image_encoder is not None:
            instruct.image_encoder = _Sizes(instruct.image_encoder)
        # It also raises built-in exceptions for bad values and deep nesting.
        self._row_errors = (MistralCommonException, ValueError, AssertionError, RecursionError)

    def text(self, text: str) -> int:
        """Count a text on its own."""
        return len(self._encode(text, around=False))

    def row(self, row: ChatRow | TextRow) -> int:
        """Count a conversation or a text.

        Raises:
            Uncountable: mistral-common rejects the row.
        """
        refuse_distant_images(row)
        if isinstance(row, TextRow):
            return len(self._encode(row.text, around=True))
        try:
            request = self._request.model_validate(chat_request(row))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return len(self._tokenizer.encode_chat_completion(request).tokens)
        except self._row_errors as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            raise Uncountable(f"mistral-common rejects the row: {why}") from error

    def _encode(self, text: str, *, around: bool) -> Sequence[int]:
        tokens: Sequence[int]
        tokens = self._tokenizer.instruct_tokenizer.tokenizer.encode(text, bos=around, eos=around)
        return tokens


class _Sizes:
    """Image encoder with mistral-common's token counts but no pixels, which would need opencv."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __call__(self, part: Any) -> Any:
        import numpy  # noqa: PLC0415, ICN001  # comes with it
        from mistral_common.tokens.tokenizers.image import (  # noqa: PLC0415
            ImageEncoding,
            image_from_chunk,
        )

        size = self._encoder._image_to_num_tokens  # noqa: SLF001  # there is no public way
        columns, rows = size(image_from_chunk(part))
        tokens = [self._encoder.special_ids.img] * (columns + 1) * rows
        return ImageEncoding(tokens, numpy.zeros((3, 1, 1)))


@lru_cache(maxsize=2)
def _load_reference(path: Path) -> Reference:
    """Return the reference counter of a file; cached, because loading is slow."""
    return Reference(path)


class TemplateCounter:
    """Counts rows as the trainer encodes them, with its encoder."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        """Load the tokenizer from a model directory.

        Raises:
            Uncountable: A package is not installed, or the tokenizer cannot be loaded.
        """
        try:
            self._encoder = encoder_for(directory.name, directory, chat_template=chat_template)
        except TokenizerError as error:
            raise Uncountable(str(error)) from error

    def text(self, text: str) -> int:
        """Count a text on its own."""
        return sum(self._encoder.encode(TextRow(text))[0].trained) - 1  # the end of the text

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: The template rejects the row, or there is none.
        """
        return sum(self.lengths(row))

    def lengths(self, row: ChatRow | TextRow) -> tuple[int, ...]:
        """Count the tokens of each training example that a row becomes.

        Raises:
            Uncountable: The template rejects the row, or there is none.
        """
        try:
            return tuple(len(example.ids) for example in self._encoder.encode(row))
        except (TokenizerError, UnusableRow) as error:
            raise Uncountable(str(error)) from error


NOTE: Final = "Counted as in OpenAI's cookbook; billed tokens may differ."

_PER_MESSAGE: Final = 3
_PER_NAME: Final = 1
_AT_THE_END: Final = 3


def _encoding_count(name: str) -> TextCount:
    """Load an encoding that tiktoken has cached.

    Raises:
        Uncountable: The encoding cannot be loaded.
    """
    try:
        from tiktoken import get_encoding  # noqa: PLC0415

        encode = get_encoding(name).encode_ordinary
    except Exception as error:  # arbitrary exceptions if the cached file is corrupt
        first = str(error).partition("\n")[0]
        raise Uncountable(f"tiktoken could not load the encoding {name}: {first}") from error
    return lambda text: len(encode(text))


class OpenAICounter:
    """Counts rows by a tiktoken encoding and the rule of OpenAI's cookbook."""

    def __init__(self, count: TextCount) -> None:
        self.text = count

    def row(self, row: ChatRow | TextRow) -> int:
        """Count one row.

        Raises:
            Uncountable: The row has parts whose tokens are not documented.
        """
        refuse_images(row)
        if isinstance(row, TextRow):
            return self.text(row.text)
        if row.tools or any(message.tool_calls for message in row.messages):
            raise Uncountable("OpenAI does not document how tools are counted")
        total = _AT_THE_END
        for message in row.messages:
            if message.role == "tool":
                raise Uncountable("OpenAI does not document how tools are counted")
            total += _PER_MESSAGE + self.text(message.role) + self.text(message.text)
            if message.name is not None:
                total += _PER_NAME + self.text(message.name)
        return total


_MISTRAL: Final = frozenset({"tekken", "sentencepiece"})


class Counter(Protocol):
    """Token counter of one tokenizer."""

    def text(self, text: str, /) -> int:
        """Count a text on its own, without control tokens."""
        ...

    def row(self, row: Row, /) -> int:
        """Count a conversation or text as it is encoded for training.

        Raises:
            Uncountable: The row has no exact count.
        """
        ...


class _Bytes:
    """Counter of `tiny-mistral`'s byte-level vocabulary."""

    def text(self, text: str) -> int:
        return len(text.encode("utf-8", "replace"))

    def row(self, row: Row) -> int:
        refuse_images(row)
        return byte_token_count(row)


class _Mistral:
    """Counts with the fastest library; leaves unusual rows to mistral-common."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.path is None:
            raise Uncountable("the tokenizer has no file")
        self._path = tokenizer.path
        load = tekken_count if tokenizer.kind == "tekken" else sentencepiece_count
        self.text = load(tokenizer.path)
        images = image_count(tokenizer.images) if tokenizer.images else None
        self._layout = Layout(tokenizer.version, self.text, images)

    def row(self, row: Row) -> int:
        refuse_distant_images(row)
        counted: int | None
        if isinstance(row, ChatRow):
            counted = self._layout.chat(row)
        else:
            try:
                counted = self.text(row.text) + 2  # BOS and EOS
            except ValueError:
                counted = None
        return _load_reference(self._path).row(row) if counted is None else counted


def has_reference(tokenizer: Tokenizer) -> bool:
    """Return whether mistral-common is the reference for a tokenizer."""
    return tokenizer.kind in _MISTRAL


def is_fast(tokenizer: Tokenizer) -> bool:
    """Return whether rows are counted without mistral-common or a chat template."""
    if tokenizer.kind in _MISTRAL:
        return tokenizer.version in VERSIONS
    return tokenizer.kind != "template"


@lru_cache(maxsize=4)
def counter_of(tokenizer: Tokenizer, *, slow: bool = False) -> Counter:
    """Return the counter of a tokenizer; cached, because loading takes tenths of a second.

    Args:
        slow: Use mistral-common itself.

    Raises:
        Uncountable: A required package is not installed, or the tokenizer cannot be loaded.
    """
    if tokenizer.path is None:
        return _Bytes()
    if tokenizer.kind in _MISTRAL:
        if slow or tokenizer.version not in VERSIONS:
            return _load_reference(tokenizer.path)
        return _Mistral(tokenizer)
    if tokenizer.kind == "tiktoken":
        return OpenAICounter(_encoding_count(tokenizer.name))
    return TemplateCounter(tokenizer.path, tokenizer.chat_template)


def count_row(counter: Counter, row: AnyRow) -> tuple[int, ...]:
    """Return the lengths of the token sequences that a row is encoded as.

    Raises:
        Uncountable: The row has no exact count.
    """
    parts = parts_of(row)
    if isinstance(counter, TemplateCounter):
        return tuple(length for part in parts for length in counter.lengths(part))
    return tuple([counter.row(part) for part in parts])
