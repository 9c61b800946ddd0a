"""The rules that a row of training data must keep, whoever trains on it.

Sources: the provider's dataset documentation and its published specification, as of
2026-08. `describe` decodes one line and says all that is wrong with it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from training_backends.core.config import ClassifierTarget
from training_backends.core.dataset import SampleType
from training_backends.datasets.chat import Message, Tool, ToolCall

__all__ = ["Finding", "Row", "RowRules", "Verdict"]

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<field>.*)`)?$", re.DOTALL)
_BYTE = re.compile(r" \(byte (\d+)\)$")
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")
_PART_TYPES = frozenset({"text", "image_url"})
_ROLES = "system, user, assistant or tool"
_FORMATS = "`messages` (instruct), `text` (pretrain), or `labels` beside one of them (classifier)"


class Row(msgspec.Struct, frozen=True, gc=False):
    """Any row; which keys it has says what it is. Null stands for a key that is left out."""

    messages: list[Message] | None = None
    text: str | None = None
    labels: dict[str, str | list[str]] | None = None
    tools: list[Tool] | None = None


class Finding(NamedTuple):
    """One thing wrong with a row."""

    code: str
    field: str | None
    message: str
    fix: str | None = None
    severity: Literal["error", "warning"] = "error"


Verdict = tuple[SampleType | None, int, Sequence[Finding]]
"""What one line is, None where that cannot be told; its messages; what is wrong with it.

A plain tuple, because one is made for every row.
"""

_NOTHING: Final[Sequence[Finding]] = ()


class RowRules:
    """Judges one line at a time.

    Args:
        targets: What a classifier may be asked; empty for anything.
    """

    def __init__(self, targets: Sequence[ClassifierTarget] = ()) -> None:
        self._decode: Callable[[bytes], Row] = msgspec.json.Decoder(Row).decode
        self._targets: Mapping[str, frozenset[str]] = {
            target.name: frozenset(target.labels) for target in targets
        }

    def judge(self, line: bytes) -> Verdict:
        """Decode one line and say what is wrong with it; never raises for bad data."""
        if not line.isascii() and (finding := _bad_utf8(line)):
            return None, 0, (finding,)
        try:
            row = self._decode(line)
        except msgspec.ValidationError as error:
            return None, 0, (_bad_shape(str(error)),)
        except msgspec.DecodeError as error:
            return None, 0, (_bad_json(line, str(error)),)
        except RecursionError:
            message = "the JSON is nested too deeply to be read"
            return None, 0, (Finding("bad_json", None, message, "flatten the row"),)
        messages = row.messages
        if messages is not None and row.labels is None and row.text is None:
            if _is_plain(messages):
                return "instruct", len(messages), _NOTHING
            return "instruct", len(messages), tuple(_conversation(messages, row.tools))
        return self._other(row)

    def _other(self, row: Row) -> Verdict:
        turns = len(row.messages or ())
        if row.labels is not None:
            return "classifier", turns, tuple(self._classifier(row))
        if row.messages is not None:
            fix = "keep one of them"
            message = "a row has either `messages` or `text`, this one has both"
            return None, turns, (Finding("ambiguous_row", "text", message, fix),)
        if row.text is not None:
            found = () if row.text.strip() else (_empty("text", "the text"),)
            return "pretrain", 0, found
        message = "the row is of no known format"
        return None, 0, (Finding("unknown_format", None, message, f"give {_FORMATS}"),)

    def _classifier(self, row: Row) -> Iterator[Finding]:
        if (row.messages is None) == (row.text is None):
            message = "a classifier row has either `text` or `messages`"
            yield Finding("ambiguous_row", None, message, "keep exactly one of them")
        if row.text is not None and not row.text.strip():
            yield _empty("text", "the text")
        if row.messages is not None:
            if not row.messages:
                yield _empty("messages", "the conversation")
            yield from _each_message(row.messages)
        if not row.labels:
            yield _empty("labels", "the mapping of labels")
        for target, value in (row.labels or {}).items():
            yield from self._label(target, value)

    def _label(self, target: str, value: str | list[str]) -> Iterator[Finding]:
        field = f"labels.{target}"
        given = [value] if isinstance(value, str) else value
        if not given or not all(label.strip() for label in given):
            yield _empty(field, "a label")
        if not self._targets:
            return
        known = self._targets.get(target)
        if known is None:
            fix = "known targets: " + ", ".join(sorted(self._targets))
            message = f"{target!r} is not one of classifier_targets"
            yield Finding("unknown_target", field, message, fix)
            return
        for label in given:
            if label not in known:
                fix = "known labels: " + ", ".join(sorted(known))
                yield Finding("unknown_label", field, f"{label!r} is not a label of it", fix)


def _is_plain(messages: list[Message]) -> bool:
    """Tell whether a conversation is so simple that no rule can be broken.

    Nearly all rows are, and this is four times as fast as finding out in full.
    """
    role = None
    trained = False
    for message in messages:
        role = message.role
        content = message.content
        if (
            type(content) is not str
            or not content
            or content.isspace()
            or role == "tool"
            or message.tool_calls is not None
            or message.tool_call_id is not None
        ):
            return False
        if role == "assistant":
            trained = trained or message.weight != 0
        elif message.weight is not None:
            return False
    return trained and role == "assistant"


def _conversation(messages: list[Message], tools: list[Tool] | None) -> Iterator[Finding]:
    if not messages:
        yield _empty("messages", "the conversation")
        return
    yield from _each_message(messages)
    yield from _answers(messages)
    yield from _declared(messages, tools)
    answers = [m for m in messages if m.role == "assistant"]
    if not answers:
        fix = "add the answer to learn, with role assistant"
        yield Finding("no_assistant", "messages", "no message is the assistant's", fix)
    elif messages[-1].role != "assistant":
        field = f"messages[{len(messages) - 1}].role"
        message = f"the last message is the {messages[-1].role}'s, not the assistant's"
        yield Finding("last_not_assistant", field, message, "end with the answer to learn")
    if answers and not any(message.is_trained for message in answers):
        message = "every assistant message has weight 0, so nothing is learnt from this row"
        yield Finding("nothing_trained", "messages", message, "leave the row out", "warning")


def _each_message(messages: list[Message]) -> Iterator[Finding]:
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        yield from _content(message, field)
        if message.weight is not None and message.role != "assistant":
            text = f"the {message.role}'s message has a weight"
            yield Finding("misplaced_weight", f"{field}.weight", text, "only an assistant's may")
        if message.tool_calls is not None and message.role != "assistant":
            text = f"the {message.role} calls tools"
            yield Finding("misplaced_tool_calls", f"{field}.tool_calls", text, "remove them")
        for number, call in enumerate(message.tool_calls or ()):
            yield from _call(call, f"{field}.tool_calls[{number}]")


def _content(message: Message, field: str) -> Iterator[Finding]:
    calls = message.role == "assistant" and message.tool_calls
    if isinstance(message.content, list):
        yield from _parts(message, field)
    if message.content is not None and (message.text.strip() or message.has_other_parts):
        if calls:
            text = "the message has content beside its tool calls"
            fix = "keep one of them; the hosted service refuses both"
            yield Finding("content_with_tool_calls", f"{field}.content", text, fix, "warning")
    elif not calls and not (message.role == "tool" and message.content == ""):
        # A function may rightly return nothing, so an empty tool answer is no fault.
        yield _empty(f"{field}.content", "the content")


def _parts(message: Message, field: str) -> Iterator[Finding]:
    parts = message.content if isinstance(message.content, list) else ()
    for number, part in enumerate(parts):
        place = f"{field}.content[{number}]"
        if part.type not in _PART_TYPES:
            text = f"the part's type {part.type!r} is not known"
            yield Finding("unknown_part", f"{place}.type", text, "use text or image_url")
        elif part.type == "text" and not part.text:
            yield _empty(f"{place}.text", "the text")


def _call(call: ToolCall, field: str) -> Iterator[Finding]:
    if call.id is None or not _CALL_ID.fullmatch(call.id):
        found = "has no id" if call.id is None else f"has the id {_short(call.id)}"
        fix = "give an id of exactly 9 letters or digits, the same in its answer"
        yield Finding("bad_call_id", f"{field}.id", f"the tool call {found}", fix)
    if not call.function.name:
        yield _empty(f"{field}.function.name", "the name of the function")
    if reason := _bad_arguments(call.function.arguments):
        fix = 'write them as a string that holds a JSON object, such as "{\\"city\\": \\"Paris\\"}"'
        yield Finding("bad_arguments", f"{field}.function.arguments", reason, fix)


def _bad_arguments(arguments: str | dict[str, Any]) -> str | None:
    if not isinstance(arguments, str):
        return "the arguments are an object, not a JSON string"
    try:
        msgspec.json.decode(arguments, type=dict[str, Any])
    except msgspec.ValidationError:
        return "the arguments hold JSON that is not an object"
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return "the arguments are not JSON"
    return None


def _answers(messages: list[Message]) -> Iterator[Finding]:
    """Match each call with its answer; calls at the very end wait for theirs rightly."""
    waiting: dict[str, str] = {}
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if message.role == "tool":
            if message.tool_call_id is None:
                fix = "repeat the id of the call that it answers"
                text = "the tool's message does not say which call it answers"
                yield Finding("unmatched_answer", f"{field}.tool_call_id", text, fix)
            elif waiting.pop(message.tool_call_id, None) is None:
                text = f"no open tool call has the id {_short(message.tool_call_id)}"
                fix = "put the answer right behind its call, with the same id"
                yield Finding("unmatched_answer", f"{field}.tool_call_id", text, fix)
            continue
        yield from _unanswered(waiting)
        waiting = {}
        for number, call in enumerate(message.tool_calls or ()):
            place = f"{field}.tool_calls[{number}].id"
            if call.id in waiting:
                text = f"two calls have the id {_short(call.id)}"
                yield Finding("duplicate_call_id", place, text, "give each call its own id")
            elif call.id is not None:
                waiting[call.id] = place
    if messages[-1].role == "tool":
        yield from _unanswered(waiting)


def _unanswered(waiting: Mapping[str, str]) -> Iterator[Finding]:
    for call_id, place in waiting.items():
        text = f"the tool call {_short(call_id)} is not answered"
        fix = "add a message with role tool and this tool_call_id right behind it"
        yield Finding("unanswered_call", place, text, fix)


def _declared(messages: list[Message], tools: list[Tool] | None) -> Iterator[Finding]:
    known = {tool.function.name for tool in tools or ()}
    for index, message in enumerate(messages):
        for number, call in enumerate(message.tool_calls or ()):
            if call.function.name and call.function.name not in known:
                field = f"messages[{index}].tool_calls[{number}].function.name"
                text = f"`tools` does not declare {_short(call.function.name)}"
                # Without any `tools` the call can still be learnt; with them it is a slip.
                severity: Literal["error", "warning"] = "error" if known else "warning"
                yield Finding("undeclared_tool", field, text, "declare it in `tools`", severity)


def _bad_utf8(line: bytes) -> Finding | None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        message = f"byte 0x{line[error.start]:02x} at column {column} is not UTF-8"
        return Finding("bad_utf8", None, message, "save the file as UTF-8")
    return None


def _bad_shape(text: str) -> Finding:
    found = _PLACE.match(text)
    what, field = (found["what"], found["field"] or None) if found else (text, None)
    if what.startswith("Object missing required field"):
        name = what.split("`")[1]
        field = f"{field}.{name}" if field else name
        return Finding("missing_field", field, f"`{name}` is missing", f"add `{name}`")
    if what.startswith("Invalid enum value") and field:
        value = what.removeprefix("Invalid enum value ")
        if field.endswith(".role"):
            return Finding("unknown_role", field, f"the role {value} is not known", f"use {_ROLES}")
        if field.endswith(".weight"):
            return Finding("bad_weight", field, f"the weight is {value}", "use 0 or 1")
    return Finding("wrong_type", field, what[:1].lower() + what[1:], "correct the value's type")


def _bad_json(line: bytes, text: str) -> Finding:
    nul = line.find(b"\0")
    if nul >= 0:
        message = f"there is a NUL byte at column {_column(line, nul)}"
        return Finding("nul_byte", None, message, "remove it; is the file really JSON Lines?")
    found = _BYTE.search(text)
    if found is None:
        column = _column(line, len(line))
        message = f"the JSON ends too early, at column {column}"
        return Finding("bad_json", None, message, "complete it; each row stands on one line")
    what = _BYTE.sub("", text).removeprefix("JSON is malformed: ")
    # msgspec 0.22 points one byte behind a character that follows the whole value.
    offset = int(found[1]) - (what == "trailing characters")
    message = f"not JSON: {what} at column {_column(line, offset)}"
    return Finding("bad_json", None, message, "write one JSON object on each line")


def _column(line: bytes, offset: int) -> int:
    return len(line[:offset].decode("utf-8", "replace")) + 1


def _empty(field: str, what: str) -> Finding:
    return Finding("empty_content", field, f"{what} is empty", "fill it or remove the row")


def _short(text: str | None) -> str:
    """Quote a value of the user's; data is not poured into messages at full length."""
    value = text or ""
    return repr(value if len(value) <= 40 else value[:37] + "...")
