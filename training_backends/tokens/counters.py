"""Count the tokens of one row, by the rules of its model's tokenizer."""

from functools import lru_cache
from typing import Final, Protocol

from training_backends.datasets.rows import ChatRow, byte_token_count
from training_backends.tokens.errors import Uncountable
from training_backends.tokens.images import (
    image_count,
    refuse_distant_images,
    refuse_images,
)
from training_backends.tokens.mistral_layout import VERSIONS, Layout
from training_backends.tokens.openai import OpenAICounter, encoding_count
from training_backends.tokens.reference import load_reference
from training_backends.tokens.rows import AnyRow, Row, parts_of
from training_backends.tokens.templates import TemplateCounter
from training_backends.tokens.text_counters import sentencepiece_count, tekken_count
from training_backends.tokens.tokenizers import Tokenizer

__all__ = ["Counter", "count_row", "counter_of", "has_reference", "is_fast"]

_MISTRAL: Final = frozenset({"tekken", "sentencepiece"})


class Counter(Protocol):
    """Counts for one tokenizer."""

    def text(self, text: str, /) -> int:
        """Count a text on its own, without anything around it."""
        ...

    def row(self, row: Row, /) -> int:
        """Count one conversation or text as it is read in training.

        Raises:
            Uncountable: It has no exact count.
        """
        ...


class _Bytes:
    """The vocabulary of `tiny-mistral`."""

    def text(self, text: str) -> int:
        return len(text.encode("utf-8", "replace"))

    def row(self, row: Row) -> int:
        refuse_images(row)
        return byte_token_count(row)


class _Mistral:
    """Counts with the fastest library, and asks mistral-common about odd rows."""

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
                counted = self.text(row.text) + 2  # the tokens for beginning and end
            except ValueError:
                counted = None
        return load_reference(self._path).row(row) if counted is None else counted


def has_reference(tokenizer: Tokenizer) -> bool:
    """Tell whether mistral-common says what is right."""
    return tokenizer.kind in _MISTRAL


def is_fast(tokenizer: Tokenizer) -> bool:
    """Tell whether rows are counted without mistral-common or a chat template."""
    if tokenizer.kind in _MISTRAL:
        return tokenizer.version in VERSIONS
    return tokenizer.kind != "template"


@lru_cache(maxsize=4)
def counter_of(tokenizer: Tokenizer, *, slow: bool = False) -> Counter:
    """Return the counter of a tokenizer; it is kept, because loading costs tenths of a second.

    Args:
        slow: Take mistral-common itself.

    Raises:
        Uncountable: Something for it is not installed or cannot be loaded.
    """
    if tokenizer.path is None:
        return _Bytes()
    if tokenizer.kind in _MISTRAL:
        if slow or tokenizer.version not in VERSIONS:
            return load_reference(tokenizer.path)
        return _Mistral(tokenizer)
    if tokenizer.kind == "tiktoken":
        return OpenAICounter(encoding_count(tokenizer.name))
    return TemplateCounter(tokenizer.path)


def count_row(counter: Counter, row: AnyRow) -> tuple[int, ...]:
    """Return the lengths of the token sequences that training reads a row as.

    Raises:
        Uncountable: The row has no exact count.
    """
    return tuple([counter.row(part) for part in parts_of(row)])
