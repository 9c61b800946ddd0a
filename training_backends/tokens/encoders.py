"""Encode rows as token ids with a loss mask.

Text never becomes a control token, and loss masks are never guessed: a row that cannot be encoded
exactly raises `UnusableRow`; a model that can encode no row exactly raises `TokenizerError`.
"""

import shutil
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import first_line
from training_backends.core.files import digest_of
from training_backends.datasets.rows import (
    CONTROL_TEXT,
    ChatRow,
    Control,
    TextRow,
    byte_encode,
)
from training_backends.tokens.byte_tokenizer import CHAT_TEMPLATE, save_tiny_tokenizer
from training_backends.tokens.chat_template import (
    ChatRenderer,
    Conversation,
    RejectedByTemplate,
    RenderedExample,
)
from training_backends.tokens.jinja import EndlessTemplate
from training_backends.tokens.mistral_layout import chat_request
from training_backends.tokens.tokenizers import TokenizerSettings

__all__ = [
    "ByteEncoder",
    "Encoded",
    "Encoder",
    "MistralEncoder",
    "TemplateEncoder",
    "TokenizerError",
    "UnusableRow",
    "encoder_for",
    "has_tokenizer",
    "tokenizer_digest",
]

Row = ChatRow | TextRow
_CONTROL_BYTES: Final = {int(control): text.encode() for control, text in CONTROL_TEXT.items()}
_FILL_IN: Final = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    (
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
    ),  # DeepSeek
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
)
"""Control tokens for prefix, suffix and middle, in this order."""

_BLOCKS: Final = ("INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_RESULTS", "MODEL_SETTINGS")
"""What mistral-common puts between `[NAME]` and `[/NAME]`: all but the answers."""

_TOKENIZER_FILES: Final = (
    *("tekken.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "SYSTEM_PROMPT.txt", "vocab.json", "merges.txt"),
)
_LIBRARIES: Final = (
    *("training-backends", "jinja2", "mistral-common", "sentencepiece", "tiktoken", "tokenizers"),
    "transformers",
)
_TEMPLATE_FILE: Final = "chat_template.jinja"
_TEMPLATE_FOLDER: Final = "additional_chat_templates"


class Encoded(NamedTuple):
    """A training example: token ids, and for each whether it is in the loss."""

    ids: list[int]
    trained: list[bool]


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a tokenizer, which adapters of other programs often lack."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return bool(_mistral_tokenizer(directory)) or any((directory / n).is_file() for n in names)


class TokenizerError(Exception):
    """The tokenizer of a model cannot encode rows exactly; the message has the reason."""


class UnusableRow(ValueError):
    """A row cannot be encoded for training; the message has the reason."""


class Encoder(Protocol):
    """Encodes rows as tokens for one model, and decodes answers."""

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the end-of-sequence token."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer; the end-of-sequence token is one of them."""
        ...

    def encode(self, row: Row) -> list[Encoded]:
        """Return the training example of a row, or one for each of its answers.

        A pure function of the row, the tokenizer and the chat template.

        Raises:
            UnusableRow: The row cannot be encoded exactly.
        """
        ...

    def read(self, row: Row) -> list[int]:
        """Return the token ids of a row without a loss mask; it may end with any role.

        Raises:
            UnusableRow: The row cannot be encoded exactly.
        """
        ...

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Encode a fill-in-the-middle example.

        Raises:
            TokenizerError: The tokenizer has no fill-in-the-middle tokens.
        """
        ...

    def prompt(self, row: ChatRow) -> list[int]:
        """Return the token ids of a conversation that ends with the user, to be continued."""
        ...

    def decode(self, ids: list[int], *, keep_controls: bool = False) -> str:
        """Decode an answer, usually without control tokens; invalid UTF-8 is replaced."""
        ...

    def save(self, directory: Path) -> None:
        """Save the tokenizer to the model directory."""
        ...


def encoder_for(model: str, directory: Path | None, *, chat_template: str | None = None) -> Encoder:
    """Return the encoder of a model; loads neither torch nor weights.

    Args:
        model: Name of the model, for messages.
        directory: Directory of the model; None for `tiny-mistral`.
        chat_template: Jinja template that replaces the model's own.

    Raises:
        TokenizerError: The model's chats cannot be encoded exactly.
    """
    source = directory and _mistral_tokenizer(directory)
    is_byte_level = directory is None or _is_byte_level(directory)
    if chat_template is not None and (source or is_byte_level):
        reason = "mistral-common lays out its chats" if source else "its template is built in"
        raise TokenizerError(f"{model!r} takes no chat_template: {reason}. Remove it.")
    if directory is None or is_byte_level:
        return ByteEncoder()
    return MistralEncoder(source) if source else TemplateEncoder(model, directory, chat_template)


def _is_byte_level(directory: Path) -> bool:
    template = directory / _TEMPLATE_FILE
    return template.is_file() and template.read_text(encoding="utf-8") == CHAT_TEMPLATE


def _mistral_tokenizer(directory: Path) -> Path | None:
    named = [directory / "tekken.json", *sorted(directory.glob("tokenizer.model.v*"))]
    return next((path for path in named if path.is_file()), None)


def tokenizer_digest(directory: Path | None) -> str:
    """Return a digest of all that the encoder of a model in a directory depends on.

    Those are its files and the versions of the libraries that read them.

    Args:
        directory: None for `tiny-mistral`.
    """
    found = sha256()
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found.update(f"{name} {version(name)}\n".encode())
    files = [*_tokenizer_files(directory), directory / "config.json"] if directory else []
    folder = directory / _TEMPLATE_FOLDER if directory else None
    for path in [*files, *(sorted(folder.glob("*")) if folder else [])]:
        if path.is_file():
            found.update(f"{path.name} {digest_of(path).sha256}\n".encode())
    return found.hexdigest()


def _tokenizer_files(directory: Path) -> list[Path]:
    found = {path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for path in _tokenizer_files(source):
        shutil.copy(path, directory / path.name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, directory / _TEMPLATE_FOLDER, dirs_exist_ok=True)


def _refuse_images(row: ChatRow) -> None:
    if any(message.has_other_parts for message in row.messages):
        raise UnusableRow("a message has parts that are not text (images are not supported)")


def _no_filling_in(name: str) -> TokenizerError:
    return TokenizerError(
        f"The tokenizer of {name} has no fill-in-the-middle tokens: "
        "remove fim_ratio, or use a code model."
    )


class ByteEncoder:
    """Encoder of `tiny-mistral`'s byte-level vocabulary."""

    pad_id: Final = int(Control.PAD)
    eos_id: Final = int(Control.EOS)
    end_ids: Final = (int(Control.EOS),)

    def encode(self, row: Row) -> list[Encoded]:
        """Encode with `datasets.rows.byte_encode`."""
        if isinstance(row, ChatRow):
            _refuse_images(row)
        return [Encoded(*byte_encode(row))]

    def read(self, row: Row) -> list[int]:
        """Encode with `datasets.rows.byte_encode`."""
        return self.encode(row)[0].ids

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Raise: the vocabulary has no fill-in-the-middle tokens."""
        del prefix, middle, suffix
        raise _no_filling_in(TINY_MODEL)

    def prompt(self, row: ChatRow) -> list[int]:
        """Encode the messages."""
        return byte_encode(row)[0]

    def decode(self, ids: list[int], *, keep_controls: bool = False) -> str:
        """Decode the bytes."""
        controls = _CONTROL_BYTES if keep_controls else {}
        pieces = (bytes([i]) if i < 256 else controls.get(i, b"") for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Save the equivalent transformers tokenizer."""
        save_tiny_tokenizer(directory)


class MistralEncoder:
    """Encodes with mistral-common; the loss mask is derived from control tokens."""

    def __init__(self, source: Path) -> None:
        # Imported here, because it takes half a second and only Mistral's models need it.
        from mistral_common.protocol.instruct.normalize import get_normalizer  # noqa: PLC0415
        from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: PLC0415
        from mistral_common.protocol.instruct.validator import (  # noqa: PLC0415
            ValidationMode,
            get_validator,
        )
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

        self._source = source
        self._request = ChatCompletionRequest
        try:
            self._training = MistralTokenizer.from_file(source, ValidationMode.finetuning)
        except ImportError as error:
            raise TokenizerError(
                f"The tokenizer {source.name} requires sentencepiece: "
                "pip install 'training-backends[tokens]'"
            ) from error
        self._tokens = self._training.instruct_tokenizer.tokenizer
        version = self._tokens.version
        self._asking = MistralTokenizer(  # what `from_file` makes, which would read the file again
            self._training.instruct_tokenizer,
            get_validator(version, ValidationMode.test),
            get_normalizer(version, self._tokens.model_settings_builder),
        )
        self.eos_id: int = self._tokens.eos_id
        self.pad_id: int = self._tokens.pad_id if self._tokens.pad_id >= 0 else self.eos_id
        self.end_ids: tuple[int, ...] = (self.eos_id,)
        self._stops = self._optional(*(f"[/{name}]" for name in _BLOCKS))
        if not self._stops:
            raise TokenizerError(
                f"{source.name} has no control tokens around messages, so its chats cannot be "
                "masked. Use a model with a tokenizer of version 2 or later."
            )
        self._bos = self._optional("<s>")

    def _optional(self, *texts: str) -> set[int]:
        found = set()
        for text in texts:
            try:
                token = int(self._tokens.get_special_token(text))
            except (KeyError, ValueError, AttributeError):
                continue  # not in every version
            if self._tokens.id_to_piece(token) == text:  # else it is the unknown token
                found.add(token)
        return found

    def encode(self, row: Row) -> list[Encoded]:
        """Encode with mistral-common; the tokens of answers through `</s>` are in the loss."""
        if isinstance(row, TextRow):
            ids = self._tokens.encode(row.text, bos=True, eos=True)
            return [Encoded(ids, [False] + [True] * (len(ids) - 1))]
        _refuse_images(row)
        ids = self._encode_chat(row, self._training)
        spans = self._answers(ids)
        # mistral-common joins assistant messages that follow each other.
        answers = [
            [message.is_trained for message in messages]
            for role, messages in groupby(row.messages, lambda message: message.role)
            if role == "assistant"
        ]
        if len(spans) != len(answers):
            raise UnusableRow(
                f"mistral-common lays out {len(spans)} answers for {len(answers)} of the row: "
                "join assistant messages that follow each other"
            )
        trained = [False] * len(ids)
        for (start, end), weights in zip(spans, answers, strict=True):
            if len({*weights}) > 1:
                raise UnusableRow(
                    "assistant messages that follow each other are joined to one, so they must "
                    "have the same weight"
                )
            trained[start:end] = [weights[0]] * (end - start)
        return [Encoded(ids, trained)]

    def read(self, row: Row) -> list[int]:
        """Encode with mistral-common."""
        if isinstance(row, TextRow):
            return self.encode(row)[0].ids
        _refuse_images(row)
        answered = bool(row.messages) and row.messages[-1].role == "assistant"
        return self._encode_chat(row, self._training if answered else self._asking)

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Encode with mistral-common as suffix, prefix, middle, as Codestral was trained."""
        head = self._fill_in_head(prefix, suffix)
        # Encoded like a suffix: a middle starts within a line, without a leading space.
        rest = self._fill_in_head("", middle)[2:-1]
        controls = {*self._optional("<s>", "[SUFFIX]", "[PREFIX]")}
        ids = [*head, *rest, self.eos_id]
        return Encoded(ids, [token not in controls for token in ids])

    def _fill_in_head(self, prefix: str, suffix: str) -> list[int]:
        from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415
        from mistral_common.protocol.fim.request import FIMRequest  # noqa: PLC0415

        request = FIMRequest(prompt=prefix, suffix=suffix)
        try:
            return list(self._training.encode_fim(request).tokens)
        except MistralCommonException as error:
            raise _no_filling_in(self._source.name) from error

    def _encode_chat(self, row: ChatRow, tokenizer: Any) -> list[int]:
        from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415

        try:
            request = self._request.model_validate(chat_request(row))
            return list(tokenizer.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError) as error:
            raise UnusableRow(first_line(error)) from error

    def _answers(self, ids: list[int]) -> list[tuple[int, int]]:
        """Return the spans outside of the blocks of other roles, each through its `</s>`."""
        spans = []
        start = 0
        for position, token in enumerate(ids):
            if token in self._stops or token in self._bos:
                start = position + 1
            elif token == self.eos_id:
                spans.append((start, position + 1))
                start = position + 1
        return spans

    def prompt(self, row: ChatRow) -> list[int]:
        """Encode the messages."""
        request = self._request.model_validate(chat_request(row))
        return list(self._asking.encode_chat_completion(request).tokens)

    def decode(self, ids: list[int], *, keep_controls: bool = False) -> str:
        """Decode with mistral-common."""
        if not keep_controls:
            return str(self._training.decode(ids))
        return "".join(
            "".join(map(self._tokens.id_to_piece, tokens)) if is_control else self.decode([*tokens])
            for is_control, tokens in groupby(ids, self._tokens.is_special)
        )

    def save(self, directory: Path) -> None:
        """Copy the tokenizer files, and those for other programs, such as the chat template."""
        _copy_tokenizer(self._source.parent, directory)


class TemplateEncoder:
    """Encodes with the chat template of a model, see `chat_template`."""

    def __init__(self, model: str, directory: Path, chat_template: str | None = None) -> None:
        """Load the tokenizer, with `tokenizers` alone if its files suffice.

        Raises:
            TokenizerError: The tokenizer or the template cannot be loaded.
        """
        self._model = model
        self._directory = directory
        self._own_template = chat_template
        self._tokenizer, settings = _load_tokenizer(model, directory)
        # Nothing is added to what the template writes, and offsets keep their white space.
        self._tokenizer.post_processor = None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        eos = settings.named.get("eos_token")
        if eos is None:
            raise TokenizerError(f"The tokenizer of {model!r} has no end-of-text token.")
        self.eos_id: int = self._id(eos)
        pad = settings.named.get("pad_token")
        self.pad_id: int = self.eos_id if pad is None else self._id(pad)
        bos = settings.named.get("bos_token")
        self._head: list[int] = [] if bos is None else [self._id(bos)]
        self._template: ChatRenderer | None = None
        if settings.templates or chat_template is not None:
            try:
                self._template = ChatRenderer(settings, chat_template)
            except RejectedByTemplate as error:
                raise TokenizerError(f"{model!r}: {error}.") from error

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise TokenizerError(
                f"The tokenizer of {self._model!r} has no token {token!r}, which its files name."
            )
        return int(found)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens with which the template ends answers, and of the end of text."""
        ends = self._template.ends if self._template else ()
        return tuple(sorted({self.eos_id, *map(self._id, ends)}))

    def encode(self, row: Row) -> list[Encoded]:
        """Encode with the template: one example, or one for each answer in the loss."""
        if isinstance(row, TextRow):
            return [self._encode_text(row.text)]
        _refuse_images(row)
        template = self._require_template()
        with self._explaining():
            return [self._encode_rendered(each) for each in template.examples(Conversation.of(row))]

    def _encode_rendered(self, example: RenderedExample) -> Encoded:
        encoding = self._tokenizer.encode(example.text, add_special_tokens=False)
        ids = encoding.ids
        trained = [False] * len(ids)
        for span in example.spans:
            tokens = _tokens_between(encoding, *span, len(example.text))
            if tokens is None:
                return self._encode_parts(example)
            trained[tokens] = [True] * (tokens.stop - tokens.start)
        return Encoded(ids, trained)

    def _encode_parts(self, example: RenderedExample) -> Encoded:
        """Encode prompts and answers separately, as a token would be part of both."""
        ids: list[int] = []
        trained: list[bool] = []
        places = [0, *chain.from_iterable(example.spans), len(example.text)]
        for number, (start, end) in enumerate(pairwise(places)):
            part = self._tokenizer.encode(example.text[start:end], add_special_tokens=False)
            if number and part.tokens[:1] and part.offsets[0] == (0, 0):
                raise UnusableRow("an answer starts with white space that belongs to the prompt")
            ids += part.ids
            trained += [number % 2 == 1] * len(part.ids)
        return Encoded(ids, trained)

    def read(self, row: Row) -> list[int]:
        """Encode with the template, which may rewrite earlier messages, since there is no mask."""
        if isinstance(row, TextRow):
            return self._encode_text(row.text).ids
        _refuse_images(row)
        template = self._require_template()
        with self._explaining():
            return self._ids(template.text(Conversation.of(row)))

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Encode prefix, suffix and middle, each after its control token."""
        find = self._tokenizer.token_to_id
        known = next((names for names in _FILL_IN if None not in map(find, names)), None)
        if known is None:
            raise _no_filling_in(repr(self._model))
        ids, counts = [*self._head], [False] * len(self._head)
        for name, text in zip(known, (prefix, suffix, middle), strict=True):
            tokens = self._plain(text)
            ids += [self._id(name), *tokens]
            counts += [False] + [True] * len(tokens)
        return Encoded([*ids, self.eos_id], [*counts, True])

    def prompt(self, row: ChatRow) -> list[int]:
        """Encode the messages, or the only one as text for a model without a chat template."""
        if self._template is None and len(row.messages) == 1:
            return self._encode_text(row.messages[0].text).ids[:-1]
        template = self._require_template()
        with self._explaining():
            return self._ids(template.prompt(Conversation.of(row).messages))

    def decode(self, ids: list[int], *, keep_controls: bool = False) -> str:
        """Decode with the tokenizer."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=not keep_controls))

    def save(self, directory: Path) -> None:
        """Copy the tokenizer files, with the template that was used."""
        _copy_tokenizer(self._directory, directory)
        if self._own_template is not None:
            (directory / _TEMPLATE_FILE).write_text(self._own_template, encoding="utf-8")
            shutil.rmtree(directory / _TEMPLATE_FOLDER, ignore_errors=True)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _text_tokenizer(self) -> Any:
        """The tokenizer for texts in which nothing is a control token.

        Another object, because the setting would also affect chats in other threads.
        """
        tokenizer = copy(self._tokenizer)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _plain(self, text: str) -> list[int]:
        return list(self._text_tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_text(self, text: str) -> Encoded:
        ids, head = self._plain(text), self._head
        return Encoded([*head, *ids, self.eos_id], [False] * len(head) + [True] * (len(ids) + 1))

    def _require_template(self) -> ChatRenderer:
        if self._template is None:
            raise TokenizerError(
                f"The tokenizer of {self._model!r} has no chat template, so conversations cannot "
                "be encoded. Use the instruct version of the model, set chat_template, or use "
                "rows with `text`."
            )
        return self._template

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except RejectedByTemplate as error:
            raise UnusableRow(str(error)) from error
        except EndlessTemplate as error:
            # An error of the model, not of the row: every row would take as long.
            raise TokenizerError(
                f"The tokenizer of {self._model!r} is not usable: {error}."
            ) from error


def _tokens_between(encoding: Any, start: int, end: int, length: int) -> slice | None:
    """Return the tokens that start in a span; None if one before them extends into it."""
    # Asked for single tokens where possible: a list of all offsets costs more than the encoding.
    first = _token_at(encoding, start)
    last = len(encoding) if end == length else _token_at(encoding, end)
    if first is not None and last is not None and encoding.token_to_chars(last - 1)[0] < end:
        return slice(first, last)
    offsets = encoding.offsets
    first = bisect_left(offsets, start, key=_start)
    if first and offsets[first - 1][1] > start:
        return None
    return slice(first, bisect_left(offsets, end, first, key=_start))


def _token_at(encoding: Any, place: int) -> int | None:
    """Return the first token that starts at a character, if the one before it ends there."""
    found: int | None = encoding.char_to_token(place)
    if found is None or encoding.token_to_chars(found)[0] != place:
        return None
    if found:
        start, end = encoding.token_to_chars(found - 1)
        if start >= place or end > place:
            return None
    return found


def _start(offset: tuple[int, int]) -> int:
    return offset[0]


def _load_tokenizer(model: str, directory: Path) -> tuple[Any, TokenizerSettings]:
    """Load a tokenizer; with transformers, which loads torch, only if it has to be converted."""
    settings = TokenizerSettings.read(directory)
    try:
        if (directory / "tokenizer.json").is_file() and not settings.declared:
            from tokenizers import Tokenizer  # noqa: PLC0415  # optional

            return Tokenizer.from_file(str(directory / "tokenizer.json")), settings
        from transformers import AutoTokenizer  # noqa: PLC0415  # takes seconds to import

        loaded: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        tokenizer: Any = loaded.backend_tokenizer
    except ImportError as error:
        raise TokenizerError(
            f"The tokenizer of {model!r} requires {error.name}: "
            "pip install 'training-backends[local]'"
        ) from error
    except Exception as error:  # untrusted files
        raise TokenizerError(
            f"Could not load the tokenizer of {model!r}: {first_line(error)}"
        ) from error
    added = (token.content for token in loaded.added_tokens_decoder.values() if token.special)
    named = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    special = frozenset({*loaded.all_special_tokens, *added})
    return tokenizer, settings._replace(named=named, special=special)
