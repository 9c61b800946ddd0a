"""Count the tokens of one text with the fastest exact library that is installed.

Texts never hold control tokens: "[INST]" in a message is six characters and nothing else.
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
"""How sentencepiece writes a space in its tokens."""

_WORDS: Final = re.compile(r" *[^ \n]+| +").findall

_PLAIN: Final = " \n  \ufb01 "
"""What a tokenizer that tidies texts would change: spaces, a line's end and a ligature."""

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
    multimodal: ImageConfig | None = None  # what it was called before


class _Tekken(msgspec.Struct):
    config: _TekkenConfig
    vocab: list[_Word]


def shipped(name: str) -> Path:
    """Return where a tokenizer of the mistral-common wheel lies, without importing that.

    Raises:
        Uncountable: It is not installed.
    """
    with suppress(ImportError, ValueError):
        spec = find_spec("mistral_common")
        if spec and spec.origin:
            return Path(spec.origin).parent / "data" / name
    raise missing("mistral-common")


def missing(package: str) -> Uncountable:
    """Say that a package is needed."""
    return Uncountable(f"counting requires {package}: pip install 'training-backends[tokens]'")


def tekken_facts(path: Path) -> tuple[str, ImageConfig | None]:
    """Read the version of a tekken file, such as "v3", and how it cuts images up."""
    head = msgspec.json.decode(path.read_bytes(), type=_Head)
    return head.config.version, head.image or head.multimodal


def tekken_count(path: Path) -> TextCount:
    """Load a tekken file.

    Raises:
        Uncountable: No library for it is installed.
    """
    tekken = msgspec.json.decode(path.read_bytes(), type=_Tekken)
    config = tekken.config
    # What is behind the size is in the file, but the models do not use it.
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
        # One 32-bit number a token, which costs less than a list of them.
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
        Uncountable: No library for it is installed.
    """
    sentencepiece = _installed("sentencepiece")
    if sentencepiece is None:
        raise missing("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    encode = processor.encode
    if not _falls_into_words(processor):
        return lambda text: len(encode(text))
    words = _Words(encode)
    count_word = words.__getitem__
    newline = count_word("\n")

    def count(text: str) -> int:
        if not text:
            return 0
        # The tokenizer puts a space before each text, and reads its own sign for one as one.
        spaced = " " + text.replace(_SPACE, " ")
        return sum(map(count_word, _WORDS(spaced))) + newline * text.count("\n")

    return count


class _Words(dict[str, int]):
    """How many tokens each word has, spaces before it included; the common ones are kept."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode
        # Behind a line's end no space is put before a word.
        self._before = len(encode("\n"))

    def __missing__(self, word: str) -> int:
        count = len(self._encode("\n" + word)) - self._before
        if len(word) <= _KEPT_LENGTH:
            if len(self) >= _KEPT_WORDS:
                self.clear()
            self[word] = count
        return count


def _falls_into_words(processor: Any) -> bool:
    """Tell whether no token reaches over a line's end, or from a word into the next space.

    Then each word is tokenized by itself, and one that was seen before need not be again. For
    this a space must be put before the text and nothing else be changed, and what is in no
    token must be read as bytes.
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
