"""Repair one row without changing what is trained on.

Everything else keeps its bytes: numbers, escapes and the order of keys are preserved.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from training_backends.core.data_rules import ProviderFormat
from training_backends.core.escape import plural
from training_backends.datasets.explain import has_duplicate_keys

__all__ = ["Mend", "is_empty", "mend"]

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ID_LENGTH: Final = 9

_CUT: Final = frozenset({"last_not_assistant"})
_IDS: Final = frozenset({"bad_call_id", "unmatched_answer", "unanswered_call"})
_ARGUMENTS: Final = frozenset({"bad_arguments"})
"""Codes of the findings that each repair fixes."""

_UNLEARNT: Final = frozenset({"user", "system", "developer"})
"""Roles whose trailing messages can be removed: they are not trained on."""

_LISTS: Final[Sequence[tuple[str, ...]]] = (
    ("messages",),
    ("input", "messages"),
    ("preferred_output",),
    ("non_preferred_output",),
    ("prompt",),
    ("chosen",),
    ("rejected",),
    ("completion",),
)
"""Paths of message lists in all row formats."""

_Object = dict[str, Raw]
_decode = msgspec.json.decode
_encode = msgspec.json.encode


class _Fields(dict[str, Raw]):
    """A message that keeps its original bytes until a value is replaced."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(_decode(raw, type=_Object))
        self._raw: Raw | None = raw

    def __setitem__(self, key: str, value: Raw) -> None:
        self._raw = None
        super().__setitem__(key, value)

    @property
    def raw(self) -> Raw:
        """The message as JSON."""
        return self._raw or _raw(dict(self))


class Mend(NamedTuple):
    """One repair of a row."""

    code: str
    message: str


def is_empty(line: bytes) -> bool:
    """Return whether a row is an object of only empty strings, lists and objects."""
    if len(line) > 4096:
        return False
    try:
        row = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(row, dict) and _is_nothing(row)


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_nothing(inner) for inner in value.values())
    if isinstance(value, list):
        return all(_is_nothing(inner) for inner in value)
    return value is None or (isinstance(value, str) and not value.strip())


def mend(
    line: bytes, codes: Collection[str], provider_format: ProviderFormat
) -> tuple[bytes, Sequence[Mend]]:
    """Repair what can be repaired in a row; return it unchanged if nothing can.

    The caller must check the result again: one repair may reveal another issue.

    Args:
        line: Valid JSON of a known format.
        codes: Codes of its findings.
    """
    wanted = (_CUT | _IDS | _ARGUMENTS).intersection(codes)
    if not wanted or has_duplicate_keys(line):
        return line, ()
    try:
        row = _EditableRow(line)
        mends = [
            *(row.cut() if wanted & _CUT else ()),
            *(row.new_ids(provider_format) if wanted & _IDS else ()),
            *(row.write_arguments() if wanted & _ARGUMENTS else ()),
        ]
        return (row.written(), mends) if mends else (line, ())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # Unexpected shape: leave it unchanged.
        return line, ()


class _EditableRow:
    """A row, decoded only as far as necessary."""

    def __init__(self, line: bytes) -> None:
        self._row = _decode(line, type=_Object)
        self._lists: dict[tuple[str, ...], list[_Fields]] = {}
        for path in _LISTS:
            raw = self._row.get(path[0])
            for key in path[1:]:
                raw = _decode(raw, type=_Object).get(key) if raw and _is(raw, b"{") else None
            if raw and _is(raw, b"["):
                self._lists[path] = [_Fields(one) for one in _decode(raw, type=list[Raw])]

    def written(self) -> bytes:
        """Return the row as JSON."""
        for path, messages in self._lists.items():
            raw = _raw([message.raw for message in messages])
            if len(path) == 2:
                outer = _decode(self._row[path[0]], type=_Object)
                outer[path[1]] = raw
                raw = _raw(outer)
            self._row[path[0]] = raw
        return _encode(self._row)

    def cut(self) -> Iterator[Mend]:
        """Remove the messages after the last assistant message."""
        messages = self._lists.get(("messages",), [])
        roles = [_text(message.get("role")) for message in messages]
        if "assistant" not in roles:
            return
        end = len(roles) - roles[::-1].index("assistant")
        rest = roles[end:]
        if rest and _UNLEARNT.issuperset(rest):
            del messages[end:]
            count = plural(len(rest), "message")
            yield Mend("trailing_turns", f"removed {count} after the last assistant message")

    def write_arguments(self) -> Iterator[Mend]:
        """Convert arguments that are objects to strings of the same JSON."""
        count = 0
        for message in itertools.chain(*self._lists.values()):
            calls = _calls(message)
            changed = [call for call in calls if _rewrite_arguments(call)]
            if changed:
                count += len(changed)
                message["tool_calls"] = _raw(calls)
        if count:
            yield Mend(
                "arguments", f"converted the arguments of {plural(count, 'tool call')} to a string"
            )

    def new_ids(self, provider_format: ProviderFormat) -> Iterator[Mend]:
        """Assign valid ids to calls and their answers."""
        pattern = re.compile(provider_format.call_id or ".+", re.DOTALL)
        taken: set[str | None] = set()
        for message in itertools.chain(*self._lists.values()):
            taken.add(_text(message.get("tool_call_id")))
            taken.update(_text(call.get("id")) for call in _calls(message))
        count = 0
        for path, messages in self._lists.items():
            for index, message in enumerate(messages):
                calls = _calls(message)
                if not calls:
                    continue
                answers = list(
                    itertools.takewhile(
                        lambda one: _text(one.get("role")) == "tool", messages[index + 1 :]
                    )
                )
                made = _Exchange(calls, answers).agree(pattern, f"{path}:{index}", taken)
                if made:
                    message["tool_calls"] = _raw(calls)
                    count += made
        if count:
            yield Mend("call_ids", f"assigned new ids to {plural(count, 'tool call')}")


class _Exchange:
    """The tool calls of one message and the answers directly after it."""

    def __init__(self, calls: Sequence[_Object], answers: Sequence[_Object]) -> None:
        self._calls = calls
        self._answers = answers
        self._call_ids = [_text(call.get("id")) for call in calls]
        self._answer_ids = [_text(answer.get("tool_call_id")) for answer in answers]

    def agree(self, pattern: re.Pattern[str], place: str, taken: set[str | None]) -> int:
        """Assign new ids to calls with invalid ids if their answers are unambiguous."""
        if any(many > 1 for one, many in Counter(self._call_ids).items() if one is not None):
            # The answers cannot be matched to the calls.
            return 0
        lone = self._lone_pair()
        count = 0
        for number, (call, old) in enumerate(zip(self._calls, self._call_ids, strict=True)):
            partners = [
                answer
                for answer, answer_id in zip(self._answers, self._answer_ids, strict=True)
                if answer_id is not None and answer_id == old
            ]
            if lone and lone[0] == number:
                partners.append(self._answers[lone[1]])
            elif old is not None and pattern.fullmatch(old):
                continue
            new = old if old is not None and pattern.fullmatch(old) else None
            if new is None:
                new = _new_id(f"{place}:{number}:{old}", taken)
                taken.add(new)
            call["id"] = _raw(new)
            for answer in partners:
                answer["tool_call_id"] = _raw(new)
            count += 1
        return count

    def _lone_pair(self) -> tuple[int, int] | None:
        """Return the only unmatched call and answer if one of them has no id."""
        calls = [
            n for n, one in enumerate(self._call_ids) if one not in self._answer_ids or one is None
        ]
        answers = [
            n for n, one in enumerate(self._answer_ids) if one not in self._call_ids or one is None
        ]
        if len(calls) != 1 or len(answers) != 1:
            return None
        missing = None in (self._call_ids[calls[0]], self._answer_ids[answers[0]])
        return (calls[0], answers[0]) if missing else None


def _new_id(seed: str, taken: Collection[str | None]) -> str:
    for attempt in itertools.count():
        digest = hashlib.sha256(f"{seed}:{attempt}".encode("utf-8", "surrogatepass")).digest()
        number = int.from_bytes(digest[:8])
        made = "".join(
            _ALPHABET[number // len(_ALPHABET) ** place % len(_ALPHABET)]
            for place in range(_ID_LENGTH)
        )
        if made not in taken:
            return made
    raise AssertionError


def _rewrite_arguments(call: _Object) -> bool:
    raw = call.get("function")
    if raw is None or not _is(raw, b"{"):
        return False
    function = _decode(raw, type=_Object)
    arguments = function.get("arguments")
    if arguments is None:
        return False
    if not _is(arguments, b"{"):
        return False
    function["arguments"] = _raw(bytes(arguments).decode())
    call["function"] = _raw(function)
    return True


def _calls(message: _Object) -> list[_Object]:
    raw = message.get("tool_calls")
    return _decode(raw, type=list[_Object]) if raw and _is(raw, b"[") else []


def _text(raw: Raw | None) -> str | None:
    return _decode(raw, type=str) if raw and _is(raw, b'"') else None


def _is(raw: Raw, start: bytes) -> bool:
    return bytes(raw)[:1] == start


def _raw(value: object) -> Raw:
    return Raw(_encode(value))
