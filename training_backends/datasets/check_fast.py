"""Check rows against a provider format: a fast path that accepts valid rows.

`RowRules.judge` checks one line (without a byte order mark, not blank) and counts its contents.
Valid rows of one type all get the identical verdict object, so callers can compare with `is`.
`RowRules.facts` is updated on access: read it once at the end, not per row; `longest_row` is left
to the caller. `file_findings` checks a file as a whole, from its facts merged over all parts.

Why it is fast: rows are decoded into strict structs, so that an unknown key, a wrong type or
role, or invalid UTF-8 fails in the decoder (msgspec 0.22 decodes every string that it keeps, and
with unknown keys forbidden it skips none). The order of roles is checked once per sequence and
cached in a tree, which also counts the rows. A row that is not certainly valid is passed on to
`explain`, which decodes it again and produces the findings.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from training_backends.core.data_rules import ProviderFormat, Role, RowFormat
from training_backends.datasets.explain import (
    RIGHT,
    TYPES,
    RowFaults,
    Verdict,
    count_labels,
    has_duplicate_keys,
)
from training_backends.datasets.explain_messages import read_object
from training_backends.datasets.findings import Facts, Finding, brief, short
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.rows import Weight

if TYPE_CHECKING:
    # Worker processes start faster without pydantic.
    from training_backends.core.config import ClassifierTarget

__all__ = ["Facts", "Finding", "RowRules", "Verdict", "file_findings"]

_MOST_TURNS: Final = 20_000
"""Maximum number of cached role sequences; a conversation needs one per message."""

_MOST_TOOLS: Final = 1 << 20
"""Bytes of tool declarations that are cached."""

_NO_TOOLS: Final = msgspec.Raw(b"null")

_INSTRUCT: Final = RIGHT["instruct"]
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Strict(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Base of structs that reject unknown keys."""


class _Function(_Strict):
    name: str
    arguments: str


class _Call(_Strict):
    id: str
    function: _Function
    type: Literal["function"] = "function"


class _Offer(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Strict):
    function: _Offer
    type: Literal["function"] = "function"


class _Message(_Strict):
    """One struct for all roles, which is the fastest to decode and access."""

    role: Role
    content: str | None = None
    tool_calls: list[_Call] | None = None
    weight: Weight | None = None
    tool_call_id: str | None = None
    name: str | None = None


class _Chat(_Strict):
    messages: list[_Message]
    tools: msgspec.Raw = _NO_TOOLS


class _Other(_Strict):
    """A pretraining row, or a classifier row with `text`."""

    text: str | None = None
    labels: dict[str, str | list[str]] | None = None


@dataclass(slots=True, eq=False)
class _Turns:
    """A sequence of roles.

    Attributes:
        before: The sequence without the last role.
        answers: Number of assistant messages.
        fits: The provider format accepts a conversation with this sequence.
        plain: The same, without tool messages.
        rows: Number of rows with this sequence since the last `move_to`.
    """

    before: "_Turns | None"
    role: str
    in_order: bool
    answers: int = 0
    uses_tools: bool = False
    fits: bool = False
    plain: bool = False
    rows: int = 0


_Steps = dict[str, Any]
"""A tree of role sequences: children by role, and under "" the `_Turns` of this node.

Nested plain dicts, because there is a lookup for each message.
"""

_HERE: Final = ""


class _Memory:
    """Cache of the role sequences seen so far, each checked once."""

    def __init__(self, provider_format: ProviderFormat) -> None:
        self._order: Mapping[str, Sequence[str]] = dict(provider_format.order.items())
        self._roles = frozenset(provider_format.roles)
        self._lone_answer = provider_format.lone_answer
        # A provider format that supports less than the structs is left to `explain` altogether.
        takes_chats = (
            "messages" in provider_format.formats
            and "tools" in provider_format.row_keys
            and "string" in provider_format.arguments
            and {*_Message.__struct_fields__} <= {*provider_format.message_keys}
        )
        self._room = _MOST_TURNS if takes_chats else 0
        start = _Turns(before=None, role="start", in_order=True)
        self.start: _Steps = {_HERE: start}
        self._all = [start]

    def turns(self, messages: Iterable[_Message]) -> _Turns | None:
        """Return the cached role sequence of messages; None if the cache is full."""
        steps = self.start
        for message in messages:
            role = message.role
            if role not in steps:
                if len(self._all) > self._room:
                    return None
                longer = self._longer(steps[_HERE], role)
                self._all.append(longer)
                steps[role] = {_HERE: longer}
            steps = steps[role]
        found: _Turns = steps[_HERE]
        return found

    def _longer(self, before: _Turns, role: str) -> _Turns:
        # Tool messages are checked against their calls instead.
        follows = role == "tool" or role in self._order.get(before.role, ())
        turns = _Turns(
            before=before,
            role=role,
            in_order=before.in_order and follows and role in self._roles,
            answers=before.answers + (role == "assistant"),
            uses_tools=before.uses_tools or role == "tool",
        )
        may_end = "end" in self._order.get(role, ())
        is_lone = before.before is None and not self._lone_answer
        turns.fits = turns.in_order and turns.answers > 0 and may_end and not is_lone
        turns.plain = turns.fits and not turns.uses_tools
        return turns

    def move_to(self, facts: Facts) -> None:
        """Add the counts to `facts` and reset them."""
        for turns in self._all:
            if rows := turns.rows:
                turns.rows = 0
                facts.rows["instruct"] += rows
                facts.formats["messages"] += rows
                while turns.before is not None:
                    facts.turns += rows
                    facts.roles[turns.role] += rows
                    turns = turns.before  # noqa: PLW2901  # from the last turn to the first


class RowRules:
    """Checks one line at a time and counts its contents.

    Args:
        provider_format: The provider format.
        targets: Allowed classifier targets; empty for any.

    Attributes:
        closely: Also search rows for duplicate keys; takes about 50% longer.
    """

    def __init__(
        self, provider_format: ProviderFormat = MISTRAL, targets: "Sequence[ClassifierTarget]" = ()
    ) -> None:
        self.provider_format = provider_format
        self.closely = True
        self._facts = Facts()
        self._faults = RowFaults(provider_format, targets)
        self._memory = _Memory(provider_format)
        self._start = self._memory.start
        self._decode: Callable[[bytes], _Chat] = msgspec.json.Decoder(_Chat).decode
        self._decode_other: Callable[[bytes], _Other] = msgspec.json.Decoder(_Other).decode
        self._targets = {target.name: frozenset(target.labels) for target in targets}
        self._most_labels = {
            target.name: len(target.labels) if target.loss_function == "multi_class" else 1
            for target in targets
        }
        self._is_call_id = re.compile(provider_format.call_id or ".+", re.DOTALL).fullmatch
        self._is_name = re.compile(provider_format.function_name).fullmatch
        self._decode_tools = msgspec.json.Decoder(list[_Tool] | None).decode
        self._tools: dict[bytes, frozenset[str] | None] = {}
        self._room = _MOST_TOOLS
        self._takes_text = "text" in provider_format.formats
        self._takes_labels = "labels" in provider_format.formats

    @property
    def facts(self) -> Facts:
        """The counts so far; updated on access."""
        facts = self._facts
        self._memory.move_to(facts)
        return facts

    @facts.setter
    def facts(self, facts: Facts) -> None:
        """Count into `facts` from now on."""
        self._memory.move_to(self._facts)
        self._facts = facts

    def judge(self, line: bytes) -> Verdict:
        """Return the type and the findings of a line; never raises for bad data."""
        try:
            row = self._decode(line)
        except _UNREADABLE:
            return self._other(line)
        if row.tools is not _NO_TOOLS:
            return self._judge_closely(row, line)
        steps = self._start
        try:
            for message in row.messages:
                content = message.content
                if (
                    not content
                    or content.isspace()
                    or message.tool_calls is not None
                    or message.weight is not None
                ):
                    return self._judge_closely(row, line)
                steps = steps[message.role]
            turns: _Turns = steps[_HERE]
        except KeyError:
            return self._judge_closely(row, line)
        if turns.plain:
            # Quotes inside strings are escaped, so more matches than messages mean duplicate keys.
            count = len(row.messages)
            if self.closely and (
                line.count(b'"role"') != count
                or line.count(b'"content"') != count
                or line.count(b'"messages"') != 1
            ):
                return self._judge_closely(row, line)
            turns.rows += 1
            return _INSTRUCT
        return self._judge_closely(row, line)

    def _judge_closely(self, row: _Chat, line: bytes) -> Verdict:
        """Check a row with tools, weights, a new role sequence or a possible error."""
        known = self._declared(row.tools)
        if known is None or (self.closely and has_duplicate_keys(line)):
            return self._faults.describe(line, self._facts)
        steps: _Steps | None = self._start
        waiting: set[str | None] = set()
        calls = weights = silent = 0
        for message in row.messages:
            role = message.role
            content = message.content
            if message.weight is not None:
                weights += 1
                silent += message.weight == 0 and role == "assistant"
                if not self._may_weigh(role):
                    break
            if message.tool_calls is not None:
                if content or waiting or role != "assistant":
                    break
                waiting = self._valid_calls(message.tool_calls, known)
                calls += len(waiting)
                if not waiting:
                    break
            elif role == "tool":
                if content is None or message.tool_call_id not in waiting:
                    break
                waiting.remove(message.tool_call_id)
            elif waiting or not content or content.isspace():
                break
            steps = steps and steps.get(role)
        else:
            turns = steps[_HERE] if steps else self._memory.turns(row.messages)
            # Calls in the last message need no answer.
            waits = waiting and turns and turns.role == "tool"
            if turns and turns.fits and turns.answers > silent and not waits:
                turns.rows += 1
                self._count(calls, declares=bool(known), weighted=weights > 0)
                return _INSTRUCT
        return self._faults.describe(line, self._facts)

    def _declared(self, tools: msgspec.Raw) -> frozenset[str] | None:
        """Return the names of the declared functions; None if they may be invalid.

        Cached, because many rows have byte-identical tools.
        """
        text = bytes(tools)
        if text in self._tools:
            return self._tools[text]
        if len(text) > _MOST_TOOLS:
            return None
        try:
            names = [tool.function.name for tool in self._decode_tools(text) or ()]
        except _UNREADABLE:
            names = [""]  # not a name
        found = frozenset(names)
        known = found if len(found) == len(names) and all(map(self._is_name, found)) else None
        if len(text) <= self._room:
            self._room -= len(text)
            self._tools[text] = known
        return known

    def _valid_calls(self, calls: list[_Call], known: frozenset[str]) -> set[str | None]:
        """Return the ids of calls; empty if one of the calls may be invalid."""
        ids: set[str | None] = set()
        for call in calls:
            function = call.function
            if function.name not in known or not self._is_call_id(call.id):
                return set()
            try:
                read_object(function.arguments)
            except _UNREADABLE:
                return set()
            ids.add(call.id)
        return ids if len(ids) == len(calls) else set()

    def _may_weigh(self, role: str) -> bool:
        provider_format = self.provider_format
        return (
            role in provider_format.weighted_roles
            and 0 in provider_format.weights
            and 1 in provider_format.weights
        )

    def _count(self, calls: int, *, declares: bool, weighted: bool) -> None:
        facts = self._facts
        facts.tool_calls += calls
        facts.tool_rows += declares
        facts.weighted_rows += weighted

    def _other(self, line: bytes) -> Verdict:
        """Check a row that is not a conversation."""
        try:
            row = self._decode_other(line)
        except _UNREADABLE:
            return self._faults.describe(line, self._facts)
        text, labels = row.text, row.labels
        if text is None or text.isspace() or not text:
            return self._faults.describe(line, self._facts)
        if self.closely and (labels or line.count(b'"text"') != 1) and has_duplicate_keys(line):
            return self._faults.describe(line, self._facts)
        facts = self._facts
        if labels is None and self._takes_text:
            facts.rows["pretrain"] += 1
            facts.formats["text"] += 1
            return RIGHT["pretrain"]
        if labels and self._takes_labels and self._are_valid_labels(labels):
            facts.rows["classifier"] += 1
            facts.formats["labels"] += 1
            count_labels(facts, labels)
            return RIGHT["classifier"]
        return self._faults.describe(line, facts)

    def _are_valid_labels(self, labels: Mapping[str, str | list[str]]) -> bool:
        targets = self._targets
        if targets and targets.keys() != labels.keys():
            return False
        for target, value in labels.items():
            given = (value,) if isinstance(value, str) else value
            known = targets.get(target)
            if known and (not known.issuperset(given) or self._most_labels[target] < len(given)):
                return False
            blank = any(not label or label.isspace() for label in given)
            if blank or not given or len(set(given)) < len(given):
                return False
        return True


def file_findings(facts: Facts, provider_format: ProviderFormat) -> Iterator[Finding]:
    """Yield the findings of a file as a whole, from the counts over all its rows."""
    rows = facts.rows.total()
    if rows < provider_format.min_rows:
        text = f"too few rows: {rows:,}; at least {provider_format.min_rows:,} required"
        yield Finding("too_few_rows", None, text, "add rows")
    if provider_format.max_rows is not None and rows > provider_format.max_rows:
        text = f"too many rows: {rows:,}; the limit is {provider_format.max_rows:,}"
        yield Finding("too_many_rows", None, text, "remove some of them")
    if (
        provider_format.max_image_rows is not None
        and facts.image_rows > provider_format.max_image_rows
    ):
        many, limit = facts.image_rows, provider_format.max_image_rows
        text = f"too many rows with images: {many:,}; the limit is {limit:,}"
        yield Finding("too_many_images", None, text, "remove some of them")
    for target in sorted({target for target, _ in facts.label_kinds}):
        single, multi = (facts.label_kinds[target, kind] for kind in ("single", "multi"))
        if single and multi:
            text = f"{short(target)} has a single label in {single:,} rows and a list in {multi:,}"
            fix = "use one form in all rows"
            yield Finding("mixed_labels", f"labels.{brief(target)}", text, fix, "warning")
    for one in sorted({TYPES[form] for form in _forms(facts)}):
        forms = [form for form in _forms(facts) if TYPES[form] == one]
        if len(forms) > 1:
            text = "the rows have several formats: " + ", ".join(
                f"{facts.formats[form]:,} with `{form}`" for form in forms
            )
            yield Finding("mixed_formats", None, text, "put each format in its own file")


def _forms(facts: Facts) -> list[RowFormat]:
    return [form for form in TYPES if facts.formats[form]]
