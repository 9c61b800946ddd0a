"""Count the tokens of a text with the fastest exact library that is installed.

Text never becomes a control token: "[INST]" in a message is counted as six characters.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from training_backends.tokens.counts import Uncountable
from training_backends.tokens.images import ImageConfig

__all__ = ["TextCount", "sentencepiece_count", "shipped", "tekken_count", "tekken_facts"]

TextCount = Callable[[str], int]

_SPACE: Final = "\u2581"
"""The space symbol of sentencepiece."""

_WORDS: Final = re.compile(r" *[^ \n]+| +").findall

_PLAIN: Final = " \n  \ufb01 "
"""A text that normalization would change: spaces, a newline and a ligature."""

_KEPT_WORDS: Final = 100_000
_KEPT_LENGTH: Final = 32


class _Word(msgspec.Struct):
    token_bytes: bytes


class _TekkenConfig(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str


class _Head(msgspec.Struct):
    config: _TekkenConfig
    image: ImageConfig | None = None
    multimodal: ImageConfig | None = None  # former name


class _Tekken(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_Word]


def shipped(name: str) -> Path:
    """Return the path of a tokenizer in the mistral-common wheel, without importing it.

    Raises:
        Uncountable: mistral-common is not installed.
    """
    with suppress(ImportError, ValueError):
        spec = find_spec("mistral_common")
        if spec and spec.origin:
            return Path(spec.origin).parent / "data" / name
    raise missing("mistral-common")


def missing(package: str) -> Uncountable:
    """Return the error for a missing package."""
    return Uncountable(f"counting requires {package}: pip install 'training-backends[tokens]'")


def tekken_facts(path: Path) -> tuple[str, ImageConfig | None]:
    """Read the version of a tekken file, such as "v3", and its image settings."""
    head = msgspec.json.decode(path.read_bytes(), type=_Head)
    return head.config.version, head.image or head.multimodal


def tekken_count(path: Path) -> TextCount:
    """Load a tekken file.

    Raises:
        Uncountable: No suitable library is installed.
    """
    tekken = msgspec.json.decode(path.read_bytes(), type=_Tekken)
    config = tekken.config
    # The file has more tokens than the models use.
    words = tekken.vocab[: config.default_vocab_size - config.default_num_special_tokens]
    tokens = [word.token_bytes for word in words]
    return _splintr(tokens, config.pattern) or _tiktoken(tokens, config.pattern)


def _splintr(tokens: list[bytes], pattern: str) -> TextCount | None:
    splintr = _installed("splintr")
    if splintr is None:
        return None
    from base64 import b64encode  # noqa: PLC0415

    lines = b"".join(b"%b %d\n" % (b64encode(token), rank) for rank, token in enumerate(tokens))
    encode = splintr.Tokenizer.from_bytes(lines, pattern).encode_flat

    def count(text: str) -> int:
        # Returns bytes with one 32-bit number per token, which is faster than a list.
        return len(encode(text)) >> 2

    return count


def _tiktoken(tokens: list[bytes], pattern: str) -> TextCount:
    tiktoken = _installed("tiktoken")
    if tiktoken is None:
        raise missing("tiktoken")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    made = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encode = made.encode_ordinary
    return lambda text: len(encode(text))


def sentencepiece_count(path: Path) -> TextCount:
    """Load a sentencepiece file.

    Raises:
        Uncountable: No suitable library is installed.
    """
    sentencepiece = _installed("sentencepiece")
    if sentencepiece is None:
        raise missing("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    encode = processor.encode
    if not _splits_into_words(processor):
        return lambda text: len(encode(text))
    words = _Words(encode)
    count_word = words.__getitem__
    newline = count_word("\n")

    def count(text: str) -> int:
        if not text:
            return 0
        # The tokenizer prefixes a space and treats its space symbol as a space.
        spaced = " " + text.replace(_SPACE, " ")
        return sum(map(count_word, _WORDS(spaced))) + newline * text.count("\n")

    return count


class _Words(dict[str, int]):
    """Cached token counts of words with their leading spaces."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode
        # After a newline no space is prefixed.
        self._before = len(encode("\n"))

    def __missing__(self, word: str) -> int:
        count = len(self._encode("\n" + word)) - self._before
        if len(word) <= _KEPT_LENGTH:
            if len(self) >= _KEPT_WORDS:
                self.clear()
            self[word] = count
        return count


def _splits_into_words(processor: Any) -> bool:
    """Return whether no token spans a newline, or a word and the space after it.

    If so, words can be tokenized independently and their counts cached. This also requires that
    normalization only prefixes a space, and that unknown characters are encoded as bytes.
    """
    if processor.normalize(_PLAIN) != f" {_PLAIN}".replace(" ", _SPACE):
        return False
    has_bytes = False
    for index in range(processor.vocab_size()):
        if processor.is_byte(index):
            has_bytes = True
        elif not processor.is_control(index):
            piece = processor.id_to_piece(index)
            if "\n" in piece or _SPACE in piece.lstrip(_SPACE):
                return False
    return has_bytes


def _installed(name: str) -> Any:
    with suppress(ImportError):
        return import_module(name)
    return None
