"""Find and explain every issue of one line; thorough rather than fast.

`check_fast` accepts rows that are clearly valid; only the others are passed to this module.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import msgspec

from training_backends.core.data_rules import ProviderFormat, RowFormat, SampleType
from training_backends.datasets.explain_messages import Talk, image_count, unknown_keys
from training_backends.datasets.findings import (
    Facts,
    Finding,
    brief,
    empty,
    is_blank,
    nearest_name,
    short,
    wrong_type,
)

if TYPE_CHECKING:
    # Worker processes start faster without pydantic.
    from training_backends.core.config import ClassifierTarget

__all__ = ["RIGHT", "TYPES", "RowFaults", "Verdict", "has_duplicate_keys"]

TYPES: Final[Mapping[RowFormat, SampleType]] = {
    "messages": "instruct",
    "completion": "instruct",
    "text": "pretrain",
    "labels": "classifier",
    "preference": "preference",
    "chosen": "preference",
}
"""Sample type of each row format."""

_KEYS: Final[Mapping[RowFormat, frozenset[str]]] = {
    "messages": frozenset({"messages"}),
    "completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "labels": frozenset({"labels", "text", "messages"}),
    "preference": frozenset({"input", "preferred_output", "non_preferred_output"}),
    "chosen": frozenset({"prompt", "chosen", "rejected"}),
}
_TELLING: Final[Mapping[RowFormat, frozenset[str]]] = {
    "labels": frozenset({"labels"}),
    "preference": frozenset({"preferred_output", "non_preferred_output"}),
    "chosen": frozenset({"chosen", "rejected"}),
}
"""Keys that identify a format."""

_PLAIN: Final[Sequence[RowFormat]] = ("messages", "text", "completion")
_MOST_FINDINGS: Final = 100
"""Maximum number of findings per row."""

_MOST_VALUES: Final = 200_000
"""Commas per row; small values take up to a hundred times their text in memory."""

_WORDS: Final[Mapping[RowFormat, str]] = {
    "messages": "`messages` (instruct)",
    "completion": "`prompt` and `completion` (instruct)",
    "text": "`text` (pretrain)",
    "labels": "`labels` with `text` or `messages` (classifier)",
    "preference": "`input`, `preferred_output` and `non_preferred_output` (preference)",
    "chosen": "`prompt`, `chosen` and `rejected` (preference)",
}
_FOREIGN: Final[Mapping[str, str]] = {
    "conversations": "this looks like ShareGPT: convert it with `training-backends data convert`",
    "contents": "this looks like Gemini: convert it with `training-backends data convert`",
    "instruction": "this looks like Alpaca: convert it with `training-backends data convert`",
    "interactions": "rename `interactions` to `messages`",
    "question": "convert question and answer to `messages`",
}
_SURROGATE: Final = re.compile(
    rb"(?<!\\)(?:\\\\)*\\u(?:d[89ab][0-9a-f]{2}(?!\\ud[c-f])|(?<!\\ud[89ab]..\\u)d[c-f][0-9a-f]{2})",
    re.IGNORECASE,
)
_BYTE: Final = re.compile(r" \(byte (\d+)\)$")


Verdict = tuple[SampleType | None, Sequence[Finding]]
"""Type of a line, or None if it was not recognized, and its findings."""

RIGHT: Final[Mapping[SampleType, Verdict]] = {one: (one, ()) for one in get_args(SampleType)}
"""The verdicts on valid rows; compared by identity."""


class RowFaults:
    """Checks one line at a time and explains its issues.

    Args:
        targets: Allowed classifier targets; empty for any.
    """

    def __init__(
        self, provider_format: ProviderFormat, targets: "Sequence[ClassifierTarget]" = ()
    ) -> None:
        self._provider_format = provider_format
        self._talk = Talk(provider_format)
        self._targets = {target.name: target for target in targets}
        self._judges: Mapping[RowFormat, Callable[[dict[str, Any]], Iterator[Finding]]] = {
            "messages": self._messages,
            "completion": self._completion,
            "text": self._text,
            "labels": self._labels,
            "preference": self._preference,
            "chosen": self._trl,
        }

    def describe(self, line: bytes, facts: Facts) -> Verdict:
        """Return the findings of a line and count its contents; never raises for bad data."""
        # Otherwise a row truncated inside a string would seem to contain a line break.
        line = line.rstrip(b"\r\n")
        try:
            row = _parsed(line)
            if isinstance(row, Finding):
                return None, (row,)
            return self._described(row, line, facts)
        except RecursionError:
            text = "the JSON is nested too deeply"
            return None, (Finding("bad_json", None, text, "flatten the row"),)

    def _described(self, row: Any, line: bytes, facts: Facts) -> Verdict:
        form, problem = self._recognise(row)
        if form is None:
            return None, tuple(self._leveled([problem] if problem else []))
        self._count(row, form, facts)
        if form not in self._provider_format.formats:
            return TYPES[form], (self._unsupported(form),)
        found = chain(self._judges[form](row), self._other_keys(row, form))
        findings = self._leveled(islice(found, _MOST_FINDINGS))
        findings += _duplicate_keys(line)
        return (TYPES[form], tuple(findings)) if findings else RIGHT[TYPES[form]]

    def _leveled(self, findings: Iterable[Finding]) -> list[Finding]:
        levels = self._provider_format.levels
        made = []
        for finding in findings:
            level = levels.get(finding.code, finding.severity)
            if level == finding.severity:
                made.append(finding)
            elif level != "ignored":
                made.append(finding._replace(severity=level))
        return made

    # Row format

    def _recognise(self, row: Any) -> tuple[RowFormat | None, Finding | None]:
        if not isinstance(row, dict):
            return None, wrong_type(None, row, "an object")
        keys = {key for key, value in row.items() if value is not None}
        for form, telling in _TELLING.items():
            if not telling.isdisjoint(keys):
                return form, None
        if "messages" not in keys and (problem := self._other_meaning(row, keys)):
            return None, problem
        found = [form for form in _PLAIN if _KEYS[form] <= keys]
        if len(found) == 1:
            return found[0], None
        if found:
            text = "the row has more than one of `messages`, `text` and `completion`"
            field = "completion" if found[-1] == "completion" else "text"
            return None, Finding("ambiguous_row", field, text, "keep one of them")
        return None, self._unknown(row)

    def _other_meaning(self, row: Mapping[str, Any], keys: AbstractSet[str]) -> Finding | None:
        """Return a finding for a row with `text` that is not plain pretraining text."""
        if {"text", "instruction", "output"} <= keys:
            text = "the row has `text` as well as `instruction` and `output`"
            return Finding("unknown_format", "instruction", text, _FOREIGN["instruction"])
        if {"text", "label"} <= keys and "labels" in self._provider_format.formats:
            label = row["label"]
            value = json.dumps(brief(label) if isinstance(label, str) else str(label))
            fix = (
                f'for a classifier, write `"labels": {{"TARGET": {value}}}`; '
                "to train on the text alone, remove `label`"
            )
            return Finding("unknown_format", "label", "the row has `label` and `text`", fix)
        return None

    def _unknown(self, row: Mapping[str, Any]) -> Finding:
        text = "unknown row format"
        known = {key for form in self._provider_format.formats for key in _KEYS[form]} - row.keys()
        for key in islice(row, _MOST_FINDINGS):
            if meant := nearest_name(key, known):
                text += f" with the key {short(key)}"
                return Finding("unknown_format", brief(key), text, f"rename it to `{meant}`")
        for key, fix in _FOREIGN.items():
            if key in row:
                return Finding("unknown_format", key, text, fix)
        return Finding("unknown_format", None, text, self._formats())

    def _formats(self) -> str:
        words = [_WORDS[form] for form in self._provider_format.formats]
        return "use " + ", ".join(words[:-1]) + (", or " if words[:-1] else "") + words[-1]

    def _unsupported(self, form: RowFormat) -> Finding:
        text = f"rows with {_WORDS[form]} are not supported"
        return Finding("unsupported_format", None, text, self._formats())

    def _other_keys(self, row: Mapping[str, Any], form: RowFormat) -> Iterator[Finding]:
        """Check the keys that do not define the format."""
        known = _KEYS[form] | {*self._provider_format.row_keys}
        unread = [key for key in row if key not in known and key != "functions"]
        yield from unknown_keys(unread, "", known - row.keys())
        if "functions" in row and not self._provider_format.legacy_functions:
            text = "`functions` is deprecated in favor of `tools`"
            yield Finding("legacy_functions", "functions", text, "rewrite them as `tools`")
        if "tools" in self._provider_format.row_keys:
            yield from self._talk.tools(row.get("tools"))
        yield from _flag(row, "")
        weight = row.get("weight")
        if weight is not None and "weight" in self._provider_format.row_keys:
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or weight < 0:
                text = f"invalid row weight {short(weight)}"
                yield Finding("bad_weight", "weight", text, "use a number of at least 0")

    # Checks by format

    def _messages(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        yield from self._talk.conversation(row["messages"], row.get("tools"))

    @staticmethod
    def _text(row: Mapping[str, Any]) -> Iterator[Finding]:
        yield from _check_text(row["text"], "text", "the text")

    @staticmethod
    def _completion(row: Mapping[str, Any]) -> Iterator[Finding]:
        if not isinstance(row["prompt"], str):
            yield wrong_type("prompt", row["prompt"], "a string")
        yield from _check_text(row["completion"], "completion", "the completion")

    def _labels(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        text, messages = row.get("text"), row.get("messages")
        if (text is None) == (messages is None):
            message = "a classifier row needs either `text` or `messages`"
            yield Finding("ambiguous_row", None, message, "keep exactly one of them")
        if text is not None:
            yield from _check_text(text, "text", "the text")
        if messages is not None:
            yield from self._talk.prompt(messages, row.get("tools"), field="messages")
        labels = row["labels"]
        if not isinstance(labels, dict):
            yield wrong_type("labels", labels, "an object that maps targets to labels")
        elif not labels:
            yield empty("labels", "`labels`")
        else:
            for target, value in labels.items():
                yield from self._label(target, value)
            if not self._targets.keys().isdisjoint(labels):
                for target in self._targets.keys() - labels.keys():
                    text = f"no label for target {short(target)}"
                    field = f"labels.{brief(target)}"
                    yield Finding("missing_target", field, text, "add it", "warning")

    def _label(self, target: str, value: Any) -> Iterator[Finding]:
        field = f"labels.{brief(target)}"
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            yield wrong_type(field, value, "a string or an array of strings")
            return
        several = target in self._targets and self._targets[target].loss_function == "multi_class"
        if (not given and not several) or any(is_blank(label) for label in given):
            yield empty(field, "the label")
            return
        if len(set(given)) < len(given):
            yield Finding("duplicate_label", field, "duplicate label", "remove it")
        if self._targets:
            yield from self._against_target(target, given, field)

    def _against_target(self, target: str, given: Sequence[str], field: str) -> Iterator[Finding]:
        known = self._targets.get(target)
        if known is None:
            fix = "known targets: " + ", ".join(sorted(self._targets))
            text = f"{short(target)} is not in classifier_targets"
            yield Finding("unknown_target", field, text, fix)
            return
        if known.loss_function != "multi_class" and len(given) > 1:
            text = f"{len(given)} labels for a single-label target"
            fix = "keep one, or set loss_function: multi_class"
            sure: Literal["error", "warning"] = "error" if known.loss_function else "warning"
            yield Finding("label_count", field, text, fix, sure)
        for label in given:
            if label not in known.labels:
                fix = "known labels: " + ", ".join(sorted(known.labels))
                yield Finding("unknown_label", field, f"unknown label {short(label)}", fix)

    def _preference(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        given = row.get("input")
        tools = None
        if given is None:
            yield _missing("input")
        elif not isinstance(given, dict):
            yield wrong_type("input", given, "an object with `messages`")
        else:
            yield from unknown_keys(
                (key for key in given if key not in {"messages", "tools", "parallel_tool_calls"}),
                "input",
                {"messages", "tools"} - given.keys(),
            )
            tools = given.get("tools")
            yield from self._talk.tools(tools, field="input.tools")
            yield from _flag(given, "input.")
            if given.get("messages") is None:
                yield _missing("input.messages")
            else:
                yield from self._talk.prompt(given["messages"], tools, field="input.messages")
        chosen, rejected = row.get("preferred_output"), row.get("non_preferred_output")
        for field, answer in (("preferred_output", chosen), ("non_preferred_output", rejected)):
            if answer is None:
                yield _missing(field)
            else:
                yield from self._talk.answer(answer, tools, field=field)
        if chosen is not None and chosen == rejected:
            yield _same("non_preferred_output")

    def _trl(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if (
            isinstance(row.get("prompt"), str)
            and isinstance(chosen, list)
            and isinstance(rejected, list)
        ):
            yield _mixed_types(chosen, rejected)
        else:
            yield from self._chosen(row)

    def _chosen(self, row: Mapping[str, Any]) -> Iterator[Finding]:
        prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
        complete = prompt is None
        wanted = str if isinstance(prompt, str) else list
        words = "a string like the prompt" if wanted is str else "an array of messages"
        if isinstance(prompt, str):
            yield from _check_text(prompt, "prompt", "the prompt")
        elif not complete:
            yield from self._talk.prompt(prompt, row.get("tools"), field="prompt")
        for field, answer in (("chosen", chosen), ("rejected", rejected)):
            if answer is None:
                yield _missing(field)
            elif complete and isinstance(answer, str):
                yield _missing("prompt")
                return
            elif not isinstance(answer, wanted):
                yield wrong_type(field, answer, words)
            elif isinstance(answer, str):
                yield from _check_text(answer, field, "the answer")
            elif complete:
                yield from self._talk.conversation(answer, row.get("tools"), field=field)
            else:
                yield from self._talk.answer(answer, row.get("tools"), field=field)
        if chosen is None or rejected is None:
            return
        if chosen == rejected:
            yield _same("rejected")
        elif (
            complete
            and isinstance(chosen, list)
            and isinstance(rejected, list)
            and chosen[:1] != rejected[:1]
        ):
            text = "`chosen` and `rejected` start differently, so they answer different prompts"
            yield Finding("different_prompts", "rejected", text, "start both with the same prompt")

    # Counts

    def _count(self, row: Mapping[str, Any], form: RowFormat, facts: Facts) -> None:
        facts.rows[TYPES[form]] += 1
        facts.formats[form] += 1
        given = row.get("input")
        asked = given if isinstance(given, dict) else row
        talks = [asked.get("messages")] if form != "chosen" else [row.get("prompt")]
        talks += [row.get(key) for key in ("preferred_output", "non_preferred_output")]
        talks += [row.get(key) for key in ("chosen", "rejected")]
        messages = [one for talk in talks if isinstance(talk, list) for one in talk]
        self._count_messages([one for one in messages if isinstance(one, dict)], asked, facts)
        if form == "labels" and isinstance(row["labels"], dict):
            count_labels(facts, row["labels"])

    def _count_messages(
        self, messages: list[dict[str, Any]], row: Mapping[str, Any], facts: Facts
    ) -> None:
        facts.turns += len(messages)
        known = self._provider_format.roles
        facts.roles.update(
            role
            for one in messages
            if (role := one.get("role")) in known  # others are errors
        )
        lists = (one.get("tool_calls") for one in messages)
        calls = sum(len(one) for one in lists if isinstance(one, list))
        images = sum(map(image_count, messages))
        facts.tool_calls += calls
        facts.tool_rows += bool(calls or row.get("tools"))
        facts.images += images
        facts.image_rows += bool(images)
        facts.weighted_rows += any(one.get("weight") is not None for one in messages)


def count_labels(facts: Facts, labels: Mapping[str, Any]) -> None:
    """Count the labels of a classifier row."""
    for target, value in labels.items():
        given = value if isinstance(value, list) else [value]
        facts.count_label_kind(target, "multi" if isinstance(value, list) else "single")
        for label in given:
            if isinstance(label, str):
                facts.count_label(target, label)


def _check_text(value: Any, field: str, what: str) -> Iterator[Finding]:
    if not isinstance(value, str):
        yield wrong_type(field, value, "a string")
    elif is_blank(value):
        yield empty(field, what)


def _missing(field: str) -> Finding:
    name = field.rpartition(".")[2]
    return Finding("missing_field", field, f"`{name}` is missing", f"add `{name}`")


def _same(field: str) -> Finding:
    text = "the chosen and rejected answers are identical"
    return Finding("same_answers", field, text, "remove the row")


def _mixed_types(chosen: list[Any], rejected: list[Any]) -> Finding:
    """Return the finding for a string prompt with answers that are messages."""
    firsts = [one[0].get("role") for one in (chosen, rejected) if one and isinstance(one[0], dict)]
    if "assistant" in firsts or not firsts:
        fix = 'write it as messages: [{"role": "user", "content": ...}]'
        return Finding(
            "wrong_type", "prompt", "the prompt is a string, but the answers are messages", fix
        )
    text = "`chosen` and `rejected` are complete conversations and already include the prompt"
    return Finding("wrong_type", "prompt", text, "remove `prompt`")


def _flag(row: Mapping[str, Any], place: str) -> Iterator[Finding]:
    value = row.get("parallel_tool_calls")
    if value is not None and not isinstance(value, bool):
        yield wrong_type(f"{place}parallel_tool_calls", value, "true or false")


# Decoding


def _parsed(line: bytes) -> Any:
    """Decode a line; return a `Finding` if it cannot be decoded."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        text = f"invalid UTF-8: byte 0x{line[error.start]:02x} at column {column}"
        return Finding("bad_utf8", None, text, "save the file as UTF-8")
    if line.count(b",") > _MOST_VALUES:
        text = f"the row has more than {_MOST_VALUES:,} commas, too many to check"
        return Finding("row_too_large", None, text, "split it into several rows")
    try:
        return msgspec.json.decode(line)
    except msgspec.ValidationError as error:
        field = brief(str(error).partition("`$.")[2].rstrip("`")) or None
        text = "the number is too large"
        return Finding("bad_number", field, text, "write it as a string")
    except msgspec.DecodeError as error:
        return _bad_json(line, str(error))


def _bad_json(line: bytes, text: str) -> Finding:
    nul = line.find(b"\0")
    if nul >= 0:
        message = f"NUL byte at column {_column(line, nul)}"
        return Finding("nul_byte", None, message, "remove it; check that the file is JSON Lines")
    if lone := _SURROGATE.search(line):
        message = f"lone surrogate at column {_column(line, lone.start())}"
        return Finding("lone_surrogate", None, message, "write the complete character")
    found = _BYTE.search(text)
    if found is None:
        message = f"invalid JSON: unexpected end at column {_column(line, len(line))}"
        return Finding(
            "bad_json", None, message, "complete the object; each row must be on one line"
        )
    what = _BYTE.sub("", text).removeprefix("JSON is malformed: ")
    if what == "trailing characters" and line.rstrip().endswith(b","):
        row = line.rstrip()[:-1]
        if _is_json(row):
            message = f"invalid JSON: trailing comma at column {_column(line, len(row))}"
            return Finding("bad_json", None, message, "remove the comma")
    # msgspec 0.22 reports trailing characters one byte too late.
    offset = int(found[1]) - (what == "trailing characters")
    message = f"invalid JSON: {what} at column {_column(line, offset)}"
    return Finding("bad_json", None, message, "write one JSON object per line")


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True


def _column(line: bytes, offset: int) -> int:
    return len(line[:offset].decode("utf-8", "replace")) + 1


def has_duplicate_keys(line: bytes) -> bool:
    """Return whether an object of a row may have a duplicate key."""
    try:
        return bool(_keys_twice(line))
    except (ValueError, RecursionError):
        return True  # cannot be decoded, so unknown


def _duplicate_keys(line: bytes) -> list[Finding]:
    try:
        twice = _keys_twice(line)
    except (ValueError, RecursionError):
        return []
    return [
        Finding("duplicate_key", None, f"duplicate key {short(key)}", "keep one of them")
        for key in islice(twice, _MOST_FINDINGS)
    ]


def _keys_twice(line: bytes) -> Collection[str]:
    """Return the duplicate keys of all objects; JSON parsers read only the last value."""
    twice: dict[str, None] = {}

    def collect(items: list[tuple[str, Any]]) -> None:
        if len(dict(items)) < len(items):
            counts = Counter(key for key, _ in items)
            twice.update((key, None) for key, count in counts.items() if count > 1)

    json.loads(line, object_pairs_hook=collect)
    return twice
