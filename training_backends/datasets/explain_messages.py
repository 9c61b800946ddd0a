"""Check the messages of a row, decoded as plain JSON, and explain every issue.

Speed does not matter here: valid rows are accepted by `check_fast` before.
"""

import binascii
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.findings import (
    NO_WORDS,
    Finding,
    brief,
    empty,
    is_blank,
    nearest_name,
    short,
    type_name,
    wrong_type,
)

__all__ = ["Talk", "image_count", "read_object", "unknown_keys"]

_OTHER_ROLES: Final = {
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "developer": "system",
    "function": "tool",
    "gpt": "assistant",
    "human": "user",
    "model": "assistant",
}
_SPEECH: Final = frozenset({"role", "content"})
_PARTS: Final = frozenset({"text", "image_url"})
_DETAILS: Final = ("auto", "low", "high")
_CALL_KEYS: Final = frozenset({"id", "type", "function", "index"})
_WEB: Final = re.compile(r"(?P<scheme>[a-z]+)://[^\s/?#]+\S*", re.IGNORECASE)
_DATA: Final = re.compile(r"data:image/(?P<type>[a-z0-9.+-]+);base64,", re.IGNORECASE)


class _Object(msgspec.Struct, gc=False):
    """Any JSON object; its contents are validated but not decoded."""


read_object: Final = msgspec.json.Decoder(_Object).decode
_Checked = Generator[Finding, None, bool]


def image_count(message: Mapping[str, Any]) -> int:
    """Count the images in a message."""
    content = message.get("content")
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") == "image_url" for part in content)


def _is_base64(text: str) -> bool:
    try:
        return bool(binascii.a2b_base64(text, strict_mode=True))
    except ValueError:
        return False


def _bad_arguments(arguments: object) -> str | None:
    """Return why a value is not valid as the arguments of a call, or None."""
    if not isinstance(arguments, str):
        return f"the arguments must be a JSON string, got {type_name(arguments)}"
    try:
        read_object(arguments)
    except msgspec.ValidationError:
        return "the arguments must be a JSON object"
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return "the arguments are not valid JSON"
    return None


class Talk:
    """Checks lists of messages against a provider format."""

    def __init__(self, provider_format: ProviderFormat) -> None:
        self._provider_format = provider_format
        self._message_keys = frozenset(provider_format.message_keys)
        self._roles = frozenset(provider_format.roles)
        words = [*provider_format.roles]
        self._role_words = ", ".join(words[:-1]) + f" or {words[-1]}"
        self._is_call_id: Callable[[str], object] = (
            re.compile(provider_format.call_id).fullmatch
            if provider_format.call_id
            else lambda _: True
        )
        self._is_name = re.compile(provider_format.function_name).fullmatch

    # Whole conversations

    def conversation(
        self, messages: Any, tools: Any, *, field: str = "messages"
    ) -> Iterator[Finding]:
        """Check a conversation to train on."""
        if (yield from self._each_of(messages, field)):
            yield from self._order(messages, field)
            yield from self._calls(messages, tools, field)
            yield from self._answered(messages, field)

    def prompt(self, messages: Any, tools: Any, *, field: str) -> Iterator[Finding]:
        """Check messages that precede an answer or that are to be classified."""
        if (yield from self._each_of(messages, field)):
            yield from self._calls(messages, tools, field)

    def answer(self, messages: Any, tools: Any, *, field: str) -> Iterator[Finding]:
        """Check one answer of a preference pair."""
        if not (yield from self._each_of(messages, field)):
            return
        for index, message in enumerate(messages):
            if message["role"] not in {"assistant", "tool"}:
                text = f"an answer cannot contain a message with role {message['role']}"
                place = f"{field}[{index}].role"
                yield Finding("misplaced_role", place, text, "move the message to the prompt")
                return
        most = self._provider_format.max_answer_messages
        if most is not None and len(messages) > most:
            text = f"the answer has {len(messages)} messages; the limit is {most}"
            yield Finding("too_many_messages", field, text, "remove the others")
        yield from self._calls(messages, tools, field)
        last = messages[-1]["role"]
        if last != "assistant":
            yield self._not_last(f"{field}[{len(messages) - 1}].role", last)

    # Single messages

    def _each_of(self, messages: Any, field: str) -> _Checked:
        """Check each message on its own; return whether all of them have a valid role."""
        if not isinstance(messages, list):
            yield wrong_type(field, messages, "an array of messages")
            return False
        if not messages:
            yield empty(field, "the conversation")
            return False
        comparable = True
        images = 0
        for index, message in enumerate(messages):
            place = f"{field}[{index}]"
            if not isinstance(message, dict):
                yield wrong_type(place, message, "an object with `role` and `content`")
                comparable = False
                continue
            if not self._message_keys.issuperset(message):
                yield from self._keys(message, place)
            problem = self._role(message, place)
            if problem:
                yield problem
                comparable = False
                continue
            yield from self._content(message, place)
            if not _SPEECH.issuperset(message):
                yield from self._extras(message, place)
            images += image_count(message)
        most = self._provider_format.max_images
        if most is not None and images > most:
            text = f"the row has {images} images; the limit is {most}"
            yield Finding("too_many_images", field, text, "remove the others")
        return comparable

    def _keys(self, message: Mapping[str, Any], place: str) -> Iterator[Finding]:
        unread = (key for key in message if key not in self._message_keys)
        meant = self._message_keys - message.keys()
        yield from unknown_keys((key for key in unread if key != "function_call"), place, meant)

    def _role(self, message: Mapping[str, Any], place: str) -> Finding | None:
        if "role" not in message:
            return Finding("missing_field", f"{place}.role", "`role` is missing", "add `role`")
        role = message["role"]
        if not isinstance(role, str):
            return wrong_type(f"{place}.role", role, "a string")
        if role in self._roles or (role == "function" and self._provider_format.legacy_functions):
            return None
        meant = _OTHER_ROLES.get(role.lower()) or nearest_name(role, self._roles)
        fix = f"use {meant}" if meant in self._roles else f"use {self._role_words}"
        return Finding("unknown_role", f"{place}.role", f"unknown role {short(role)}", fix)

    def _content(self, message: Mapping[str, Any], place: str) -> Iterator[Finding]:
        content = message.get("content")
        field = f"{place}.content"
        role = message["role"]
        has_text = bool(content) and not is_blank(content)
        if isinstance(content, list):
            has_text = bool(content)
            has_findings = False
            for number, part in enumerate(content):
                for finding in self._part(part, role, f"{field}[{number}]"):
                    has_findings = True
                    yield finding
            if has_findings:
                return
        elif content is not None and not isinstance(content, str):
            yield wrong_type(field, content, "a string or an array of parts")
            return
        calls = role == "assistant" and (message.get("tool_calls") or "function_call" in message)
        if calls:
            if has_text:
                # mistral-common 1.13 rejects it for tokenizers up to version 3.
                text = "the message has both content and tool calls"
                fix = "remove one of them; some models do not accept both"
                yield Finding("content_with_tool_calls", field, text, fix, "warning")
        elif not has_text and not self._may_be_empty(message, content):
            yield self._no_content(message, field)

    def _may_be_empty(self, message: Mapping[str, Any], content: object) -> bool:
        if message["role"] in {"tool", "function"}:
            # A function may return nothing.
            return isinstance(content, str)
        refusal = message.get("refusal")
        return "refusal" in self._message_keys and isinstance(refusal, str) and bool(refusal)

    def _no_content(self, message: Mapping[str, Any], field: str) -> Finding:
        if "content" in message:
            return empty(field, "the content")
        others = message.keys() - self._message_keys
        meant = next((key for key in sorted(others) if nearest_name(key, ["content"])), None)
        fix = f"rename {short(meant)} to `content`" if meant else NO_WORDS
        return Finding("empty_content", field, "the content is missing", fix)

    def _part(self, part: Any, role: str, place: str) -> Iterator[Finding]:
        if not isinstance(part, dict):
            yield wrong_type(place, part, "an object with `type`")
            return
        kind = part.get("type")
        allowed: Sequence[str] = self._provider_format.parts.get(role, ("text",))  # type: ignore[call-overload]
        if not isinstance(kind, str) or kind not in _PARTS:
            what = "has no type" if kind is None else f"has the unknown type {short(kind)}"
            fix = "use " + " or ".join(allowed)
            yield Finding("unknown_part", f"{place}.type", f"the content part {what}", fix)
        elif kind not in allowed:
            text = f"{role} messages cannot have {kind} parts"
            fix = "use " + " or ".join(allowed)
            yield Finding("misplaced_part", f"{place}.type", text, fix)
        elif kind == "text":
            words = part.get("text")
            if words is not None and not isinstance(words, str):
                yield wrong_type(f"{place}.text", words, "a string")
            elif not words:
                yield empty(f"{place}.text", "the text")
        else:
            yield from self._image(part.get("image_url"), f"{place}.image_url")

    def _image(self, image: Any, place: str) -> Iterator[Finding]:
        if isinstance(image, str) and self._provider_format.bare_image:
            url: Any = image
        elif isinstance(image, dict):
            detail = image.get("detail")
            if detail is not None and detail not in _DETAILS:
                text = f"invalid detail {short(detail)}"
                yield Finding("bad_image", f"{place}.detail", text, f"use {' or '.join(_DETAILS)}")
            place = f"{place}.url"
            url = image.get("url")
        else:
            wanted = "an object with `url`" + (
                " or a string" if self._provider_format.bare_image else ""
            )
            yield wrong_type(place, image, wanted)
            return
        if not isinstance(url, str):
            yield wrong_type(place, url, "a string")
        elif reason := self._bad_url(url):
            schemes = " or ".join(
                "data:image/…;base64,…" if one == "data" else f"{one}://…"
                for one in self._provider_format.image_schemes
            )
            yield Finding("bad_image", place, reason, f"use {schemes}")

    def _bad_url(self, url: str) -> str | None:
        schemes = self._provider_format.image_schemes
        if url[:5].lower() == "data:":
            if "data" not in schemes:
                return "inline images (data: URLs) are not supported"
            found = _DATA.match(url)
            if not found or not _is_base64(url[found.end() :]):
                return "the image is not valid base64 data"
            kind = found["type"].lower()
            if kind not in self._provider_format.image_types and kind != "jpg":
                return f"image type {short(kind)} is not supported"
            return None
        found = _WEB.fullmatch(url)
        if not found:
            return f"{short(url)} is not an image URL"
        scheme = found["scheme"].lower()
        return None if scheme in schemes else f"{scheme}:// URLs are not supported"

    def _extras(self, message: Mapping[str, Any], place: str) -> Iterator[Finding]:
        role = message["role"]
        weight = message.get("weight")
        if weight is not None:
            if type(weight) not in {int, float} or weight not in self._provider_format.weights:
                known = " or ".join(map(str, self._provider_format.weights)) or "none"
                text = f"invalid weight {short(weight)}"
                yield Finding("bad_weight", f"{place}.weight", text, f"use {known}")
            elif role not in self._provider_format.weighted_roles:
                fix = "set it only on messages with role " + " or ".join(
                    self._provider_format.weighted_roles
                )
                text = f"{role} messages cannot have a weight"
                yield Finding("misplaced_weight", f"{place}.weight", text, fix)
        for key in ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content"):
            value = message.get(key)
            if value is not None and key in self._message_keys and not isinstance(value, str):
                yield wrong_type(f"{place}.{key}", value, "a string")
        if "function_call" in message and message["function_call"] is not None:
            yield from self._function_call(message["function_call"], f"{place}.function_call")
        calls = message.get("tool_calls")
        if calls is None:
            return
        if role != "assistant":
            text = f"{role} messages cannot have tool calls"
            yield Finding(
                "misplaced_tool_calls", f"{place}.tool_calls", text, "remove `tool_calls`"
            )
        elif not isinstance(calls, list):
            yield wrong_type(f"{place}.tool_calls", calls, "an array of tool calls")
        else:
            for number, call in enumerate(calls):
                yield from self._call(call, f"{place}.tool_calls[{number}]")

    def _function_call(self, call: Any, place: str) -> Iterator[Finding]:
        taken = self._provider_format.legacy_functions
        severity: Literal["error", "warning"] = "warning" if taken else "error"
        text = "`function_call` is deprecated in favor of `tool_calls`"
        fix = "rewrite it as a tool call with an id, and `functions` as `tools`"
        yield Finding("legacy_functions", place, text, fix, severity)
        if taken:
            yield from self._function(call, place)

    def _call(self, call: Any, place: str) -> Iterator[Finding]:
        if not isinstance(call, dict):
            yield wrong_type(place, call, "an object with `id` and `function`")
            return
        unread = (key for key in call if key not in _CALL_KEYS)
        yield from unknown_keys(unread, place, _CALL_KEYS - call.keys())
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id or not self._is_call_id(call_id):
            found = "has no id" if call_id is None else f"has the invalid id {short(call_id)}"
            fix = (
                f"use {self._provider_format.call_id_words}, and repeat the id in the tool message"
            )
            yield Finding("bad_call_id", f"{place}.id", f"the tool call {found}", fix)
        kind = call.get("type")
        if kind is not None and kind != "function":
            text = f"unsupported tool call type {short(kind)}"
            yield Finding("wrong_type", f"{place}.type", text, "use function")
        yield from self._function(call.get("function"), f"{place}.function")

    def _function(self, function: Any, place: str) -> Iterator[Finding]:
        if not isinstance(function, dict):
            yield wrong_type(place, function, "an object with `name` and `arguments`")
            return
        yield from self._name(function.get("name"), f"{place}.name")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, dict) and "object" in self._provider_format.arguments:
            return
        if reason := _bad_arguments(arguments):
            fix = 'use a string with a JSON object, such as "{\\"city\\": \\"Rome\\"}"'
            yield Finding("bad_arguments", f"{place}.arguments", reason, fix)

    def _name(self, name: Any, place: str) -> Iterator[Finding]:
        if not isinstance(name, str):
            yield wrong_type(place, name, "a string")
        elif not self._is_name(name):
            text = f"invalid function name {short(name)}"
            fix = f"use {self._provider_format.function_name_words}"
            yield Finding("bad_function_name", place, text, fix)

    # Message order

    def _order(self, messages: Sequence[Mapping[str, Any]], field: str) -> Iterator[Finding]:
        """Check the order of roles; tool messages are checked against their calls instead."""
        order = self._provider_format.order
        before = "start"
        for index, message in enumerate(messages):
            role = message["role"]
            if role in self._roles and role != "tool" and before in self._roles | {"start"}:
                allowed = order.get(before, ())  # type: ignore[call-overload]
                if role not in allowed:
                    code = "bad_start" if before == "start" else "bad_order"
                    where = "at the start" if before == "start" else f"after one with role {before}"
                    text = f"a message with role {role} is not allowed {where}"
                    words = [one for one in allowed if one != "end"]
                    fix = "insert a message with role " + " or ".join(words) + " before it"
                    yield Finding(code, f"{field}[{index}].role", text, fix)
            before = role

    def _answered(self, messages: Sequence[Mapping[str, Any]], field: str) -> Iterator[Finding]:
        answers = [one for one in messages if one["role"] == "assistant"]
        last = messages[-1]["role"]
        if not answers:
            fix = "add an assistant message to train on"
            yield Finding("no_assistant", field, "there is no assistant message", fix)
            return
        if "end" not in self._provider_format.order.get(last, ()):
            yield self._not_last(f"{field}[{len(messages) - 1}].role", last)
        if len(messages) == 1 and not self._provider_format.lone_answer:
            text = "the assistant message is the only message"
            yield Finding("lone_answer", field, text, "add the message that it answers")
        if all(one.get("weight") == 0 for one in answers):
            text = "every assistant message has weight 0, so nothing is trained"
            yield Finding("nothing_trained", field, text, "remove the row", "warning")

    @staticmethod
    def _not_last(place: str, role: str) -> Finding:
        text = f"the last message has role {role}, not assistant"
        return Finding(
            "last_not_assistant", place, text, "end the conversation with an assistant message"
        )

    def _calls(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, field: str
    ) -> Iterator[Finding]:
        """Match each call with its answer and its declaration.

        Calls in the last message need no answer.
        """
        known = _names(tools)
        waiting: dict[str, str] = {}
        for index, message in enumerate(messages):
            place = f"{field}[{index}]"
            if message["role"] == "tool":
                yield from self._answer(message.get("tool_call_id"), waiting, place)
                continue
            yield from _unanswered(waiting)
            waiting = {}
            for number, call in enumerate(_calls_of(message)):
                where = f"{place}.tool_calls[{number}]"
                call_id = call.get("id")
                if isinstance(call_id, str):
                    if call_id in waiting:
                        text = f"duplicate tool call id {short(call_id)}"
                        fix = "give each call a unique id"
                        yield Finding("duplicate_call_id", f"{where}.id", text, fix)
                    waiting[call_id] = f"{where}.id"
                yield from self._declared(call, known, where)
        if messages[-1]["role"] == "tool":
            yield from _unanswered(waiting)

    def _answer(self, call_id: Any, waiting: dict[str, str], place: str) -> Iterator[Finding]:
        field = f"{place}.tool_call_id"
        if call_id is None and waiting and not self._provider_format.answers_name_calls:
            waiting.pop(next(iter(waiting)))
        elif call_id is None:
            text = "the tool message has no `tool_call_id`"
            fix = "set it to the id of the call that it answers"
            yield Finding("unmatched_answer", field, text, fix)
        elif isinstance(call_id, str) and waiting.pop(call_id, None) is None:
            text = f"no pending tool call has the id {short(call_id)}"
            fix = "place the tool message directly after its call, with the same id"
            yield Finding("unmatched_answer", field, text, fix)

    def _declared(
        self, call: Mapping[str, Any], known: frozenset[str], where: str
    ) -> Iterator[Finding]:
        function = call.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and self._is_name(name) and name not in known:
            text = f"function {short(name)} is not declared in `tools`"
            meant = nearest_name(name, known)
            fix = (
                f"declare it in `tools`, or call {short(meant)}"
                if meant
                else "declare it in `tools`"
            )
            # Without any `tools` the row can still be trained on; with them it is a mistake.
            field = f"{where}.function.name"
            yield Finding("undeclared_tool", field, text, fix, "error" if known else "warning")

    def tools(self, tools: Any, *, field: str = "tools") -> Iterator[Finding]:
        """Check the declared tools."""
        if tools is None:
            return
        if not isinstance(tools, list):
            yield wrong_type(field, tools, "an array of tools")
            return
        seen: set[str] = set()
        for index, tool in enumerate(tools):
            place = f"{field}[{index}]"
            if not isinstance(tool, dict):
                yield wrong_type(place, tool, "an object with `type` and `function`")
                continue
            kind = tool.get("type")
            if kind is not None and kind != "function":
                text = f"unsupported tool type {short(kind)}"
                yield Finding("wrong_type", f"{place}.type", text, "use function")
            yield from self._tool(tool.get("function"), f"{place}.function", seen)

    def _tool(self, function: Any, place: str, seen: set[str]) -> Iterator[Finding]:
        if not isinstance(function, dict):
            yield wrong_type(place, function, "an object with `name`")
            return
        name = function.get("name")
        yield from self._name(name, f"{place}.name")
        if isinstance(name, str):
            if name in seen:
                text = f"function {short(name)} is declared twice"
                yield Finding(
                    "duplicate_tool", f"{place}.name", text, "remove one of the declarations"
                )
            seen.add(name)
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            yield wrong_type(f"{place}.parameters", parameters, "an object")
        description = function.get("description")
        if description is not None and not isinstance(description, str):
            yield wrong_type(f"{place}.description", description, "a string")


def unknown_keys(keys: Iterable[str], place: str, meant: Collection[str]) -> Iterator[Finding]:
    """Yield a warning for each unknown key, with the key that was probably meant.

    Args:
        meant: The known keys that are missing.
    """
    for key in keys:
        field = f"{place}.{brief(key)}" if place else brief(key)
        found = nearest_name(key, meant)
        fix = f"rename it to `{found}`" if found else "remove it"
        yield Finding("unknown_key", field, f"unknown key {short(key)} is ignored", fix, "warning")


def _names(tools: Any) -> frozenset[str]:
    """Return the names of the declared functions."""
    if not isinstance(tools, list):
        return frozenset()
    functions = (tool.get("function") for tool in tools if isinstance(tool, dict))
    names = (one.get("name") for one in functions if isinstance(one, dict))
    return frozenset(name for name in names if isinstance(name, str))


def _calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return []
    return [call if isinstance(call, dict) else {} for call in calls]


def _unanswered(waiting: Mapping[str, str]) -> Iterator[Finding]:
    for call_id, place in waiting.items():
        text = f"tool call {short(call_id)} has no answer"
        fix = "add a tool message with this tool_call_id directly after it"
        yield Finding("unanswered_call", place, text, fix)
