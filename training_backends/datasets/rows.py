"""Typed rows of training files, and the byte-level chat encoding of `tiny-mistral`.

`parse_row` decodes one JSON line into typed structs; `parse_any_row` also supports classifier and
preference rows. They check shape and types only; `datasets.check_fast` checks the rules. The
encoding is implemented here in plain Python, so that tokens can be counted exactly without torch;
the trainer makes tensors of the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal

import msgspec

__all__ = [
    "BYTE_VOCABULARY_SIZE",
    "CONTROL_TEXT",
    "ChatRow",
    "ClassifierRow",
    "ContentPart",
    "Control",
    "FunctionCall",
    "FunctionDefinition",
    "ImageURL",
    "Message",
    "PreferenceRow",
    "Role",
    "SourceMessage",
    "SourceTool",
    "TextRow",
    "Tool",
    "ToolCall",
    "Weight",
    "byte_encode",
    "byte_token_count",
    "parse_any_row",
    "parse_row",
]

Weight = Annotated[float, msgspec.Meta(ge=0, le=1, multiple_of=1)]
"""0 or 1; 0.0 and 1.0 (written by pandas) are accepted, as in mistral-common 1.13."""

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ImageURL(msgspec.Struct, frozen=True, gc=False):
    """An image URL, or the image itself as a `data:` URL."""

    url: str
    detail: str | None = None


class ContentPart(msgspec.Struct, frozen=True, gc=False):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None
    image_url: str | ImageURL | None = None


class FunctionCall(msgspec.Struct, frozen=True, gc=False):
    """Function and arguments of a tool call; arguments are a JSON string or an object."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A tool call of an assistant message; the tool message repeats its `id`."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class FunctionDefinition(msgspec.Struct, frozen=True, gc=False):
    """A declared function; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True, gc=False):
    """One entry of a row's `tools`."""

    function: FunctionDefinition
    type: str = "function"


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message in the format of Mistral and OpenAI; unknown keys are ignored."""

    role: Role
    content: str | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    weight: Weight | None = None

    @property
    def text(self) -> str:
        """The text content; text parts are joined, other parts are skipped."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text or "" for part in self.content if part.type == "text")

    @property
    def has_other_parts(self) -> bool:
        """Whether the content has parts that are not text, such as images."""
        return isinstance(self.content, list) and any(p.type != "text" for p in self.content)

    @property
    def is_trained(self) -> bool:
        """Whether the message is in the loss: an assistant message, unless its weight is 0."""
        return self.role == "assistant" and self.weight != 0


class SourceMessage(Message, frozen=True, gc=False, kw_only=True):
    """A message with its own JSON, which has all of its keys in their order."""

    source: dict[str, Any]


class SourceTool(Tool, frozen=True, gc=False, kw_only=True):
    """A declared function with its own JSON."""

    source: dict[str, Any]


class ChatRow(msgspec.Struct, frozen=True, gc=False):
    """A conversation, with the declared tools."""

    messages: list[Message]
    tools: list[Tool] | None = None


class TextRow(msgspec.Struct, frozen=True, gc=False):
    """Plain text for continued pretraining."""

    text: str


class ClassifierRow(msgspec.Struct, frozen=True, gc=False):
    """A text or conversation to classify, and its label or labels by target."""

    content: ChatRow | TextRow
    labels: dict[str, str | list[str]]


class PreferenceRow(msgspec.Struct, frozen=True, gc=False):
    """Two answers to one prompt, which is empty if each answer is a complete conversation."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Tool] | None = None


class _AnyRow(msgspec.Struct, frozen=True, gc=False):
    """A chat or a text; null is the same as a missing key."""

    messages: list[Message] | None = None
    text: str | None = None
    tools: list[Tool] | None = None


class _Input(msgspec.Struct, frozen=True, gc=False):
    messages: list[Message]
    tools: list[Tool] | None = None


class _Labelled(_AnyRow, frozen=True, gc=False):
    labels: dict[str, str | list[str]] | None = None


class _Pair(msgspec.Struct, frozen=True, gc=False):
    """A preference row in the format of OpenAI or TRL."""

    input: _Input | None = None
    preferred_output: list[Message] | None = None
    non_preferred_output: list[Message] | None = None
    prompt: str | list[Message] | None = None
    chosen: str | list[Message] | None = None
    rejected: str | list[Message] | None = None
    tools: list[Tool] | None = None


_DECODER: Final = msgspec.json.Decoder(_AnyRow)
_LABELLED: Final = msgspec.json.Decoder(_Labelled)
_PAIR: Final = msgspec.json.Decoder(_Pair)


def parse_row(line: bytes, *, keep_source: bool = False) -> ChatRow | TextRow:
    """Decode one line of a JSONL file: a chat if it has `messages`, else a text.

    Args:
        keep_source: Keep the JSON of messages and tools, as `SourceMessage` and `SourceTool`.

    Raises:
        msgspec.ValidationError: Valid JSON of the wrong shape, or of two formats at once; the
            message ends with the place, such as "- at `$.messages[0].role`", where there is one.
        msgspec.DecodeError: Not JSON (the parent class of the former).
    """
    row = _DECODER.decode(line)
    return _content(row, line if keep_source else None)


def parse_any_row(
    line: bytes, *, keep_source: bool = False
) -> ChatRow | TextRow | ClassifierRow | PreferenceRow:
    """Decode one line of a JSONL file for any training method.

    Args:
        keep_source: As in `parse_row`.

    Raises:
        msgspec.DecodeError: As `parse_row` does.
    """
    row = _LABELLED.decode(line)
    source = line if keep_source else None
    if row.labels is not None:
        return ClassifierRow(_content(row, source), row.labels)
    if row.messages is not None or row.text is not None:
        return _content(row, source)
    pair = _PAIR.decode(line)
    if pair.input is not None:
        prompt, tools = pair.input.messages, pair.input.tools
        chosen, rejected = pair.preferred_output, pair.non_preferred_output
    else:
        prompt, tools = _as_messages("user", pair.prompt) or [], pair.tools
        chosen, rejected = (
            _as_messages("assistant", pair.chosen),
            _as_messages("assistant", pair.rejected),
        )
    if chosen is None or rejected is None:
        raise msgspec.ValidationError("Object is of no known format")
    if not keep_source:
        return PreferenceRow(prompt, chosen, rejected, tools)
    given = msgspec.json.decode(line)
    if pair.input is not None:
        asked, names = given["input"], ("messages", "preferred_output", "non_preferred_output")
    else:
        asked, names = given, ("prompt", "chosen", "rejected")
    return PreferenceRow(
        _sourced(prompt, asked.get(names[0])),
        _sourced(chosen, given[names[1]]),
        _sourced(rejected, given[names[2]]),
        _sourced_tools(tools, asked.get("tools")),
    )


def _content(row: _AnyRow, source: bytes | None) -> ChatRow | TextRow:
    if row.messages is not None:
        if row.text is not None:
            raise msgspec.ValidationError("Object has both `messages` and `text`: keep one of them")
        if source is None:
            return ChatRow(row.messages, row.tools)
        given = msgspec.json.decode(source)
        return ChatRow(
            _sourced(row.messages, given["messages"]), _sourced_tools(row.tools, given.get("tools"))
        )
    if row.text is not None:
        return TextRow(row.text)
    raise msgspec.ValidationError("Object has neither `messages` nor `text`")


def _sourced(messages: list[Message], given: Any) -> list[Message]:
    """Add to each message its JSON; a single text has none."""
    if not isinstance(given, list):
        return messages
    return [
        SourceMessage(
            message.role,
            message.content,
            message.tool_calls,
            message.tool_call_id,
            message.name,
            message.weight,
            source=source,
        )
        for message, source in zip(messages, given, strict=True)
    ]


def _sourced_tools(tools: list[Tool] | None, given: Any) -> list[Tool] | None:
    if tools is None:
        return None
    return [
        SourceTool(tool.function, tool.type, source=source)
        for tool, source in zip(tools, given, strict=True)
    ]


def _as_messages(role: Role, given: str | list[Message] | None) -> list[Message] | None:
    return [Message(role, given)] if isinstance(given, str) else given


class Control(IntEnum):
    """Control tokens of the byte-level vocabulary; ids 0-255 are the bytes."""

    BOS = 256
    EOS = 257
    PAD = 258
    INST = 259
    INST_END = 260
    SYSTEM = 261
    SYSTEM_END = 262
    TOOLS = 263
    TOOLS_END = 264
    TOOL_CALLS = 265
    CALL_ID = 266
    ARGS = 267
    TOOL_RESULTS = 268
    TOOL_CONTENT = 269
    TOOL_RESULTS_END = 270


CONTROL_TEXT: Final[Mapping[Control, str]] = MappingProxyType(
    {
        Control.BOS: "<s>",
        Control.EOS: "</s>",
        Control.PAD: "<pad>",
        Control.INST: "[INST]",
        Control.INST_END: "[/INST]",
        Control.SYSTEM: "[SYSTEM_PROMPT]",
        Control.SYSTEM_END: "[/SYSTEM_PROMPT]",
        Control.TOOLS: "[AVAILABLE_TOOLS]",
        Control.TOOLS_END: "[/AVAILABLE_TOOLS]",
        Control.TOOL_CALLS: "[TOOL_CALLS]",
        Control.CALL_ID: "[CALL_ID]",
        Control.ARGS: "[ARGS]",
        Control.TOOL_RESULTS: "[TOOL_RESULTS]",
        Control.TOOL_CONTENT: "[TOOL_CONTENT]",
        Control.TOOL_RESULTS_END: "[/TOOL_RESULTS]",
    }
)

BYTE_VOCABULARY_SIZE: Final = 272  # 256 bytes + 15 control tokens, rounded up to a multiple of 8

Piece = tuple[Control | str, bool]
"""A control token or a text, and whether it is in the loss."""


def _row_pieces(row: ChatRow | TextRow) -> Iterator[Piece]:
    """Yield the control tokens and texts of a row in the order of `tiny-mistral`'s template."""
    yield Control.BOS, False
    if isinstance(row, TextRow):
        yield row.text, True
        yield Control.EOS, True
        return
    if row.tools:
        yield Control.TOOLS, False
        yield _tools_json(row.tools), False
        yield Control.TOOLS_END, False
    for message in row.messages:
        yield from _message_pieces(message)


def _message_pieces(message: Message) -> Iterator[Piece]:
    if message.role == "assistant":
        yield from _assistant_pieces(message)
    elif message.role == "user":
        yield Control.INST, False
        yield message.text, False
        yield Control.INST_END, False
    elif message.role == "tool":
        yield Control.TOOL_RESULTS, False
        yield message.tool_call_id or "", False
        yield Control.TOOL_CONTENT, False
        yield message.text, False
        yield Control.TOOL_RESULTS_END, False
    else:
        yield Control.SYSTEM, False
        yield message.text, False
        yield Control.SYSTEM_END, False


def _assistant_pieces(message: Message) -> Iterator[Piece]:
    trained = message.is_trained
    yield message.text, trained
    for call in message.tool_calls or ():
        arguments = call.function.arguments
        yield Control.TOOL_CALLS, trained
        yield call.function.name, trained
        yield Control.CALL_ID, trained
        yield call.id or "", trained
        yield Control.ARGS, trained
        yield arguments if isinstance(arguments, str) else _dumps(arguments), trained
    yield Control.EOS, trained


def _tools_json(tools: list[Tool]) -> str:
    return "[" + ", ".join(_function_json(tool.function) for tool in tools) + "]"


def _function_json(function: FunctionDefinition) -> str:
    # Fixed key order, so that the saved chat template renders the same text.
    return _dumps(
        {
            "name": function.name,
            "description": function.description or "",
            "parameters": function.parameters or {},
        }
    )


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def byte_encode(row: ChatRow | TextRow) -> tuple[list[int], list[bool]]:
    """Encode a row for `tiny-mistral`.

    Text is encoded as bytes only: "[INST]" in a message never becomes the control token.

    Returns:
        The token ids, and for each whether it is in the loss.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for piece, is_trained in _row_pieces(row):
        tokens = [int(piece)] if isinstance(piece, Control) else piece.encode("utf-8", "replace")
        ids.extend(tokens)
        trained.extend([is_trained] * len(tokens))
    return ids, trained


def byte_token_count(row: ChatRow | TextRow) -> int:
    """Count the tokens of `byte_encode` without creating them."""
    count = 0
    for piece, _ in _row_pieces(row):
        if isinstance(piece, Control):
            count += 1
        else:
            count += len(piece) if piece.isascii() else len(piece.encode("utf-8", "replace"))
    return count
