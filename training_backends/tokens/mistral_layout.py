"""Layout of conversations in Mistral's tokenizers: texts with control tokens between them.

Implements mistral-common 1.13 in fine-tuning mode (`tokens/tokenizers/instruct.py`, `protocol/
instruct/normalize.py` and `validator.py`, read 2026-11). Unusual rows, in particular every row
that might be rejected, are left to mistral-common itself.
"""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from training_backends.datasets.rows import ChatRow, FunctionCall, Message, Tool, ToolCall
from training_backends.tokens.images import ImageCount
from training_backends.tokens.text_counters import TextCount

__all__ = ["VERSIONS", "Layout", "chat_request"]

VERSIONS: Final = frozenset({"v1", "v2", "v3", "v7", "v11", "v13"})
"""Versions whose layout is implemented here; later ones are left to mistral-common."""

_FOLLOWERS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "system": frozenset({"user", "assistant", "system"}),
        "user": frozenset({"assistant", "system", "user"}),
        "assistant": frozenset({"assistant", "user", "tool"}),
        "tool": frozenset({"assistant", "tool", "user"}),
    }
)
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_JOIN: Final = "\n\n"
_REMEMBERED_TOOLS: Final = 4096

_dumps: Final = json.JSONEncoder(ensure_ascii=False).encode


class _Unsupported(Exception):
    """The row is left to mistral-common."""


class _Turn(NamedTuple):
    """One message to encode, or several consecutive ones of the same role merged.

    Attributes:
        chunks: With images: the texts, and the number of tokens of each image.
    """

    role: str
    text: str
    calls: Sequence[ToolCall] = ()
    message: Message | None = None
    chunks: Sequence[str | int] = ()


class Layout:
    """Counts the tokens of conversations for one tokenizer version."""

    def __init__(self, version: str, count: TextCount, images: ImageCount | None = None) -> None:
        self._version = int(version.removeprefix("v"))
        self._count = count
        self._images = images
        self._tools: dict[bytes, int | None] = {}

    def chat(self, row: ChatRow) -> int | None:
        """Count a conversation; None if it is left to mistral-common."""
        try:
            turns = self._turns(row.messages)
            tools = self._tools_block(row.tools) if row.tools else 0
            if self._version == 1:
                return 1 + self._first_version(turns)
            if self._version <= 3:
                return 1 + self._early(turns, tools)
            return 1 + self._late(turns, tools)
        except (_Unsupported, RecursionError, ValueError):
            return None

    def _turns(self, messages: Sequence[Message]) -> list[_Turn]:
        """Validate and merge messages as mistral-common does."""
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise _Unsupported
        turns: list[_Turn] = []
        previous = ""
        has_calls = False
        for message in messages:
            role = "system" if message.role == "developer" else message.role
            if previous and role not in _FOLLOWERS[previous]:
                raise _Unsupported
            text = message.content
            chunks: Sequence[str | int] = ()
            if type(text) is not str:
                text, chunks = self._parts(message)
            calls = message.tool_calls or ()
            if role == "assistant":
                if (not text and not calls) or (text and calls and self._version <= 3):
                    raise _Unsupported
            elif message.content is None or calls:
                raise _Unsupported
            if role == previous and role in ("user", "assistant"):
                before = turns.pop()
                if calls or before.calls:
                    raise _Unsupported
                if chunks or before.chunks:
                    chunks = _merged(*(before.chunks or (before.text,)), *(chunks or (text,)))
                text = _JOIN.join(part for part in (before.text, text) if part)
            turns.append(_Turn(role, text, calls, message, chunks))
            has_calls = has_calls or bool(calls) or role == "tool"
            previous = role
        if has_calls:
            self._check_calls(turns)
        return turns

    def _parts(self, message: Message) -> tuple[str, Sequence[str | int]]:
        """Return the text of a message with parts, and the parts if not all of them are text."""
        if not isinstance(message.content, list):
            return "", ()
        chunks: list[str | int] = []
        for part in message.content:
            if part.type == "text" and part.text is not None:
                chunks.append(part.text)
            elif self._images and self._version >= 3 and message.role == "user":
                chunks.append(self._images(part))
            else:
                raise _Unsupported
        merged = _merged(*chunks)
        if len(merged) == 1 and isinstance(merged[0], str) and merged[0]:
            return merged[0], ()
        if not any(isinstance(each, int) for each in merged):
            raise _Unsupported
        return "", merged

    def _check_calls(self, turns: Sequence[_Turn]) -> None:
        """Accept only calls that are valid in every version: each answered once, by id."""
        open_ids: set[str] = set()
        if self._version == 1 or turns[0].role in ("assistant", "tool"):
            raise _Unsupported
        for turn in turns:
            if turn.role == "assistant":
                ids = [self._checked_call(call) for call in turn.calls]
                if open_ids or len(set(ids)) < len(ids):
                    raise _Unsupported
                open_ids = set(ids)
            elif turn.role == "tool" and turn.message:
                name, call_id = turn.message.name, turn.message.tool_call_id
                if call_id not in open_ids or (name is not None and not _NAME.fullmatch(name)):
                    raise _Unsupported
                open_ids.remove(call_id)

    def _checked_call(self, call: ToolCall) -> str:
        is_known = call.type == "function" and _NAME.fullmatch(call.function.name)
        if not is_known or not call.id or not _ID.fullmatch(call.id):
            raise _Unsupported
        return call.id

    def _first_version(self, turns: Sequence[_Turn]) -> int:
        system, turns, _ = _without_system(turns)
        total = 0
        for turn in turns:
            text = turn.text
            if turn.role == "user":
                text = f"[INST] {_joined(system, text)} [/INST]"
                system = None  # only in the first user message
            else:
                total += 1
            total += self._count(text)
        return total

    def _early(self, turns: Sequence[_Turn], tools: int) -> int:
        """Versions 2 and 3: the system prompt and the tools are in the last user message."""
        system, turns, last = _without_system(turns)
        count = self._count
        total = tools
        for position, turn in enumerate(turns):
            if turn.role == "user":
                total += 2 + self._user(turn, system if position == last else None)
            elif turn.role == "assistant" and not turn.calls:
                total += 1 + count(turn.text.rstrip(" "))
            elif self._version == 2 and position < last:
                pass  # calls and results before the last user message are dropped
            elif turn.calls:
                if self._version == 2 and len(turn.calls) > 1:
                    raise _Unsupported
                total += 2 + count(_dumps([self._call(call) for call in turn.calls]))
            else:
                total += 2 + count(_dumps(self._result(turn)))
        return total

    def _late(self, turns: Sequence[_Turn], tools: int) -> int:
        """Versions 7 to 13: the system prompt keeps its position."""
        count = self._count
        # Tools precede a user message, so without one they are dropped.
        total = tools if any(turn.role == "user" for turn in turns) else 0
        for turn in turns:
            if turn.role == "assistant":
                total += 1 + (count(turn.text.rstrip(" ")) if turn.text else 0)
                total += self._calls(turn.calls) if turn.calls else 0
            elif turn.role == "user":
                total += 2 + self._user(turn, None)
            elif turn.role == "tool" and self._version < 13 and turn.message:
                total += 3 + count(turn.message.tool_call_id or "") + count(turn.text)
            else:
                total += 2 + count(turn.text)
        return total

    def _user(self, turn: _Turn, system: str | None) -> int:
        count = self._count
        if not turn.chunks:
            return count(_joined(system, turn.text))
        total = count(f"{system}{_JOIN}") if system else 0
        return total + sum(each if isinstance(each, int) else count(each) for each in turn.chunks)

    def _calls(self, calls: Sequence[ToolCall]) -> int:
        count = self._count
        if self._version == 7:
            return 1 + count(_dumps([self._call(call) for call in calls]))
        total = 0
        for call in calls:
            total += 2 + count(call.function.name) + count(_dumps(_arguments(call.function)))
            if self._version == 11:
                total += 1 + count(call.id or "")
        return total

    def _call(self, call: ToolCall) -> dict[str, Any]:
        written = {"name": call.function.name, "arguments": _arguments(call.function)}
        return written if self._version == 2 else {**written, "id": call.id}

    def _result(self, turn: _Turn) -> Any:
        content = _json_or_text(turn.text)
        if turn.message is None:
            raise _Unsupported
        if self._version == 2:
            return [{"name": turn.message.name, "content": content}]
        return {"content": content, "call_id": turn.message.tool_call_id}

    def _tools_block(self, tools: Sequence[Tool]) -> int:
        """Count tool definitions; cached, because the rows of a file often share them."""
        key = blake2b(msgspec.json.encode(tools), digest_size=16).digest()
        if key not in self._tools:
            if len(self._tools) >= _REMEMBERED_TOOLS:
                self._tools.clear()
            self._tools[key] = self._count_tools(tools) if _are_valid(tools) else None
        counted = self._tools[key]
        if counted is None:
            raise _Unsupported
        return counted

    def _count_tools(self, tools: Sequence[Tool]) -> int:
        if self._version == 1:
            return 0
        functions = [
            {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {},
            }
            for tool in tools
        ]
        written = [{"type": "function", "function": function} for function in functions]
        return 2 + self._count(_dumps(written))


def chat_request(row: ChatRow) -> dict[str, Any]:
    """Return the content of mistral-common's request for a conversation."""
    request: dict[str, Any] = {"messages": [_message(message) for message in row.messages]}
    if row.tools:
        request["tools"] = [
            {
                "type": tool.type,
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": tool.function.parameters or {},
                },
            }
            for tool in row.tools
        ]
    return request


def _message(message: Message) -> dict[str, Any]:
    """Return a message in mistral-common's format: without weight, which it rejects."""
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content
    if isinstance(content, list):
        # Missing keys must not be null.
        content = [
            {key: value for key, value in msgspec.to_builtins(part).items() if value is not None}
            for part in content
        ]
    written: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "type": call.type,
                "function": msgspec.to_builtins(call.function),
                **({"id": call.id} if call.id is not None else {}),
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        written["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            written["name"] = message.name
    return written


def _merged(*chunks: str | int) -> Sequence[str | int]:
    """Join adjacent texts, as mistral-common does."""
    merged: list[str | int] = []
    for chunk in chunks:
        if isinstance(chunk, str) and merged and isinstance(merged[-1], str):
            merged[-1] = _JOIN.join(text for text in (merged[-1], chunk) if text)
        else:
            merged.append(chunk)
    return merged


def _without_system(turns: Sequence[_Turn]) -> tuple[str | None, Sequence[_Turn], int]:
    """Return the system prompt, the other turns and the index of the last user turn.

    Versions up to 3 start with a user message, if necessary an empty one.
    """
    prompts = [turn.text for turn in turns if turn.role == "system" and turn.text]
    others = [turn for turn in turns if turn.role != "system"]
    if not others or others[0].role != "user":
        others.insert(0, _Turn("user", ""))
    last = max(place for place, turn in enumerate(others) if turn.role == "user")
    return _JOIN.join(prompts) or None, others, last


def _joined(system: str | None, text: str) -> str:
    return f"{system}{_JOIN}{text}" if system else text


def _arguments(function: FunctionCall) -> Any:
    arguments = function.arguments
    return _json_or_text(arguments) if isinstance(arguments, str) else arguments


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError:
        return text


def _are_valid(tools: Sequence[Tool]) -> bool:
    """Return whether mistral-common accepts the definitions: names and JSON schemas."""
    try:
        from jsonschema import Draft7Validator, SchemaError  # noqa: PLC0415  # comes with it
    except ImportError:
        return False
    try:
        for tool in tools:
            if tool.type != "function" or not _NAME.fullmatch(tool.function.name):
                return False
            Draft7Validator.check_schema(tool.function.parameters or {})
    except SchemaError:
        return False
    return True
