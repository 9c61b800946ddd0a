"""Encode rows as token ids with a loss mask.

Text never becomes a control token, and loss masks are never guessed: a row that cannot be encoded
exactly raises `UnusableRow`; a model that can encode no row exactly raises `TokenizerError`.
"""

import shutil
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from training_backends.core.config import TINY_MODEL
from training_backends.core.errors import first_line
from training_backends.datasets.rows import (
    ChatRow,
    Control,
    Message,
    TextRow,
    byte_encode,
)
from training_backends.tokens.counters import EndlessTemplate, chat_request, rendered

__all__ = [
    "ByteEncoder",
    "Encoder",
    "MistralEncoder",
    "TemplateEncoder",
    "TokenizerError",
    "UnusableRow",
    "encoder_for",
    "has_tokenizer",
]

Row = ChatRow | TextRow
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

_TOKENIZER_FILES: Final = (
    *("tekken.json", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "SYSTEM_PROMPT.txt", "vocab.json", "merges.txt"),
)

Encoded = tuple[list[int], list[bool]]


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

    def encode(self, row: Row) -> Encoded:
        """Return the token ids, and for each whether it is in the loss.

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

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a user message as a generation prompt."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Decode an answer; invalid UTF-8 is replaced."""
        ...

    def save(self, directory: Path) -> None:
        """Save the tokenizer to the model directory."""
        ...


def encoder_for(model: str, directory: Path | None) -> Encoder:
    """Return the encoder of a model.

    Args:
        model: Name of the model, for messages.
        directory: Directory of the model; None for `tiny-mistral`.

    Raises:
        TokenizerError: The model's chats cannot be encoded exactly.
    """
    if directory is None or _is_byte_level(directory):
        return ByteEncoder()
    if source := _mistral_tokenizer(directory):
        return MistralEncoder(source)
    return TemplateEncoder(model, directory)


def _is_byte_level(directory: Path) -> bool:
    from training_backends.tokens.byte_tokenizer import CHAT_TEMPLATE  # noqa: PLC0415  # loads torch

    template = directory / "chat_template.jinja"
    return template.is_file() and template.read_text(encoding="utf-8") == CHAT_TEMPLATE


def _mistral_tokenizer(directory: Path) -> Path | None:
    named = [directory / "tekken.json", *sorted(directory.glob("tokenizer.model.v*"))]
    return next((path for path in named if path.is_file()), None)


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

    def encode(self, row: Row) -> Encoded:
        """Encode with `datasets.rows.byte_encode`."""
        if isinstance(row, ChatRow):
            _refuse_images(row)
        return byte_encode(row)

    def read(self, row: Row) -> list[int]:
        """Encode with `datasets.rows.byte_encode`."""
        return self.encode(row)[0]

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Raise: the vocabulary has no fill-in-the-middle tokens."""
        del prefix, middle, suffix
        raise _no_filling_in(TINY_MODEL)

    def prompt(self, text: str) -> list[int]:
        """Encode one user message."""
        return byte_encode(ChatRow([Message("user", text)]))[0]

    def decode(self, ids: list[int]) -> str:
        """Decode the bytes, without control tokens."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, directory: Path) -> None:
        """Save the equivalent transformers tokenizer."""
        from training_backends.tokens.byte_tokenizer import save_tiny_tokenizer  # noqa: PLC0415

        save_tiny_tokenizer(directory)


class MistralEncoder:
    """Encodes with mistral-common; the loss mask is derived from control tokens."""

    def __init__(self, source: Path) -> None:
        # Imported here, because it takes half a second and only Mistral's models need it.
        from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: PLC0415
        from mistral_common.protocol.instruct.validator import ValidationMode  # noqa: PLC0415
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: PLC0415

        self._source = source
        self._request = ChatCompletionRequest
        try:
            self._training = MistralTokenizer.from_file(source, ValidationMode.finetuning)
            self._asking = MistralTokenizer.from_file(source, ValidationMode.test)
        except ImportError as error:
            raise TokenizerError(
                f"The tokenizer {source.name} requires sentencepiece: "
                "pip install 'mistral-common[sentencepiece]'"
            ) from error
        self._tokens = self._training.instruct_tokenizer.tokenizer
        self.eos_id: int = self._tokens.eos_id
        self.pad_id: int = self._tokens.pad_id if self._tokens.pad_id >= 0 else self.eos_id
        self._opening = {self._control("[/INST]")} | self._optional("[/TOOL_RESULTS]")
        self._closing = {self._control("[INST]")} | self._optional(
            "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]"
        )

    def _control(self, text: str) -> int:
        found = self._optional(text)
        if not found:
            raise TokenizerError(
                f"{self._source.name} has no control token {text}, so its chats cannot be masked. "
                "Use a model with a tokenizer of version 2 or later."
            )
        return found.pop()

    def _optional(self, *texts: str) -> set[int]:
        found = set()
        for text in texts:
            try:
                found.add(int(self._tokens.get_special_token(text)))
            except (KeyError, ValueError, AttributeError):
                continue  # not in every version
        return found

    def encode(self, row: Row) -> Encoded:
        """Encode with mistral-common; tokens from `[/INST]` through `</s>` are in the loss."""
        if isinstance(row, TextRow):
            ids = self._tokens.encode(row.text, bos=True, eos=True)
            return ids, [False] + [True] * (len(ids) - 1)
        _refuse_images(row)
        ids = self._encode_chat(row, self._training)
        spans = self._answers(ids)
        messages = [message for message in row.messages if message.role == "assistant"]
        if len(spans) != len(messages):
            raise UnusableRow("consecutive assistant messages cannot be told apart")
        trained = [False] * len(ids)
        for (start, end), message in zip(spans, messages, strict=True):
            trained[start:end] = [message.is_trained] * (end - start)
        return ids, trained

    def read(self, row: Row) -> list[int]:
        """Encode with mistral-common."""
        if isinstance(row, TextRow):
            return self.encode(row)[0]
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
        return ids, [token not in controls for token in ids]

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
        spans = []
        start: int | None = None
        for position, token in enumerate(ids):
            if token in self._closing:
                start = None
            elif token in self._opening:
                start = position + 1
            elif token == self.eos_id and start is not None:
                spans.append((start, position + 1))
                # `</s>` is followed by a user message, tool results or another answer.
                start = position + 1
        return spans

    def prompt(self, text: str) -> list[int]:
        """Encode one user message."""
        row = ChatRow([Message("user", text)])
        request = self._request.model_validate(chat_request(row))
        return list(self._asking.encode_chat_completion(request).tokens)

    def decode(self, ids: list[int]) -> str:
        """Decode without control tokens."""
        return str(self._training.decode(ids))

    def save(self, directory: Path) -> None:
        """Copy the tokenizer files, and those for other programs, such as the chat template."""
        for pattern in _TOKENIZER_FILES:
            for path in self._source.parent.glob(pattern):
                if path.is_file():
                    shutil.copy(path, directory / path.name)


class TemplateEncoder:
    """Encodes with the chat template of a model, if answers can be located exactly."""

    def __init__(self, model: str, directory: Path) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415  # takes seconds to import

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TokenizerError(
                f"Could not load the tokenizer of {model!r}: {first_line(error)}"
            ) from error
        if self._tokenizer.eos_token_id is None:
            raise TokenizerError(f"The tokenizer of {model!r} has no end-of-text token.")
        self._model = model
        self.eos_id: int = int(self._tokenizer.eos_token_id)
        pad = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else int(pad)
        specials = {*self._tokenizer.all_special_tokens}
        added = self._tokenizer.added_tokens_decoder.values()
        self._specials = specials | {token.content for token in added if token.special}

    def encode(self, row: Row) -> Encoded:
        """Encode with the template; an answer is the difference between two rendered prefixes."""
        if isinstance(row, TextRow):
            return self._encode_text(row.text)
        self._require_plain(row)
        content = _openai_row(row)
        ids = self._render(content, len(row.messages), waiting=False)
        trained = [False] * len(ids)
        for index, message in enumerate(row.messages):
            if message.is_trained:
                start = self._render(content, index, waiting=True)
                end = self._render(content, index + 1, waiting=False)
                if ids[: len(start)] != start or ids[: len(end)] != end:
                    raise UnusableRow(
                        "the chat template rewrites earlier messages, so answers cannot be located"
                    )
                trained[len(start) : len(end)] = [True] * (len(end) - len(start))
        return ids, trained

    def _require_plain(self, row: ChatRow) -> None:
        _refuse_images(row)
        if self._tokenizer.chat_template is None:
            raise TokenizerError(
                f"The tokenizer of {self._model!r} has no chat template, so conversations cannot "
                "be encoded. Use the instruct version of the model, or rows with `text`."
            )
        self._refuse_control_text(row)

    def read(self, row: Row) -> list[int]:
        """Encode with the template, which may rewrite earlier messages, since there is no mask."""
        if isinstance(row, TextRow):
            return self._encode_text(row.text)[0]
        self._require_plain(row)
        return self._render(_openai_row(row), len(row.messages), waiting=False)

    def fill_in(self, prefix: str, middle: str, suffix: str) -> Encoded:
        """Encode prefix, suffix and middle, each after its control token."""
        vocabulary = self._tokenizer.get_vocab()
        known = next((names for names in _FILL_IN if vocabulary.keys() >= {*names}), None)
        if known is None:
            raise _no_filling_in(repr(self._model))
        head = self._head()
        ids, counts = list(head), [False] * len(head)
        for name, text in zip(known, (prefix, suffix, middle), strict=True):
            tokens = self._plain(text)
            ids += [int(vocabulary[name]), *tokens]
            counts += [False] + [True] * len(tokens)
        return [*ids, self.eos_id], [*counts, True]

    def _head(self) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return [] if bos is None else [int(bos)]

    def _plain(self, text: str) -> list[int]:
        return list(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )

    def _encode_text(self, text: str) -> Encoded:
        ids, head = self._plain(text), self._head()
        return [*head, *ids, self.eos_id], [False] * len(head) + [True] * (len(ids) + 1)

    def _refuse_control_text(self, row: ChatRow) -> None:
        text = msgspec.json.encode(row).decode()
        escaped = (msgspec.json.encode(special).decode()[1:-1] for special in self._specials)
        if found := next((special for special in escaped if special in text), None):
            raise UnusableRow(f"the text contains the control token {found}")

    def _render(self, content: dict[str, Any], count: int, *, waiting: bool) -> list[int]:
        from jinja2.exceptions import TemplateError  # noqa: PLC0415  # comes with transformers

        try:
            return list(
                rendered(
                    lambda: self._tokenizer.apply_chat_template(
                        content["messages"][:count],
                        tools=content.get("tools"),
                        add_generation_prompt=waiting,
                        tokenize=True,
                        return_dict=False,
                    )
                )
            )
        except EndlessTemplate as error:
            # An error of the model, not of the row: every row would take as long.
            raise TokenizerError(
                f"The tokenizer of {self._model!r} is not usable: {error}."
            ) from error
        except (TemplateError, TypeError, ValueError) as error:
            raise UnusableRow(f"the chat template rejects the row: {first_line(error)}") from error

    def prompt(self, text: str) -> list[int]:
        """Encode one user message, or plain text for a model without a chat template."""
        if self._tokenizer.chat_template is None:
            return self._encode_text(text)[0][:-1]
        content = _openai_row(ChatRow([Message("user", text)]))
        return self._render(content, 1, waiting=True)

    def decode(self, ids: list[int]) -> str:
        """Decode without control tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Save the tokenizer in transformers format."""
        self._tokenizer.save_pretrained(directory)


def _openai_row(row: ChatRow) -> dict[str, Any]:
    """Return a row in OpenAI's format, without weights and empty keys."""
    messages = []
    for message in row.messages:
        plain: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        if message.tool_calls:
            plain["tool_calls"] = msgspec.to_builtins(message.tool_calls)
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        messages.append(plain)
    tools = msgspec.to_builtins(row.tools) if row.tools else None
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}
