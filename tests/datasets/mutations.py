"""Makers of rows with a single fault.

faulty_rows(provider format)         Fault(row, code, field): a right row with one thing changed
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from hypothesis import assume
from hypothesis import strategies as st

from tests.datasets.rows import Row, chats, json_values, rows
from training_backends.core.data_rules import ProviderFormat, Role, RowFormat


class Fault(NamedTuple):
    """A row with one thing wrong, and what is to be said of it."""

    row: Any
    code: str
    field: str | None


class Mutation(NamedTuple):
    """One way to spoil a row.

    Attributes:
        formats: The rows that can be spoilt so.
        spoil: Changes the row and returns the field.
        calling: The row must call tools.
        holds: Whether a provider format has the rule.
    """

    code: str
    formats: tuple[RowFormat, ...]
    spoil: Callable[[st.DrawFn, Row, ProviderFormat], str | None]
    calling: bool = False
    holds: Callable[[ProviderFormat], bool] = lambda _: True

    def formats_of(self, provider_format: ProviderFormat) -> list[RowFormat]:
        """Return the formats of a provider format that can be spoilt so."""
        if not self.holds(provider_format):
            return []
        return [one for one in self.formats if one in provider_format.formats]


_ANY: tuple[RowFormat, ...] = get_args(RowFormat)


def _pick(draw: st.DrawFn, row: Row, role: str, *, plain: bool = True) -> tuple[int, Row]:
    """Choose a message of a role, one with neither calls nor parts if it is to be plain."""
    found = [
        (index, message)
        for index, message in enumerate(row["messages"])
        if message["role"] == role
        and (not plain or (isinstance(message.get("content"), str) and "tool_calls" not in message))
    ]
    assume(found)
    chosen_one: tuple[int, Row] = draw(st.sampled_from(found))
    return chosen_one


def _call(draw: st.DrawFn, row: Row) -> tuple[str, int, Row]:
    """Choose a tool call: its field, the place of its message, and itself."""
    found = [
        (f"messages[{index}].tool_calls[{number}]", index, call)
        for index, message in enumerate(row["messages"])
        for number, call in enumerate(message.get("tool_calls") or ())
    ]
    assume(found)
    chosen_one: tuple[str, int, Row] = draw(st.sampled_from(found))
    return chosen_one


def _unknown_role(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    index, message = _pick(draw, row, draw(st.sampled_from(["user", "assistant"])))
    message["role"] = draw(st.sampled_from(["robot", "User", "", "human"]))
    del provider_format
    return f"messages[{index}].role"


def _no_role(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    del message["role"]
    return f"messages[{index}].role"


def _asks_last(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["messages"].append({"role": "user", "content": "And now?"})
    return f"messages[{len(row['messages']) - 1}].role"


def _empty(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, draw(st.sampled_from(["user", "assistant"])))
    message["content"] = draw(st.sampled_from(["", " ", "\n\t", "\u00a0", None, []]))
    return f"messages[{index}].content"


def _no_content(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "assistant")
    del message["content"]
    return f"messages[{index}].content"


def _number(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    message["content"] = draw(st.sampled_from([3, True, {"text": "a"}, 10**40]))
    return f"messages[{index}].content"


def _weight(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "assistant")
    message["weight"] = draw(st.sampled_from([2, -1, 0.5, "1", True, 10**40]))
    return f"messages[{index}].weight"


def _no_messages(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["messages"].clear()
    return "messages"


def _renamed(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    assume("tools" not in row)
    name = draw(st.sampled_from(["mesages", "message", "Messages"]))
    row[name] = row.pop("messages")
    return name


def _misspelt(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    message["contents"] = message.pop("content")
    return f"messages[{index}].content"


def _extra_key(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    name = draw(st.sampled_from(["source", "toolz", "id"]))
    assume(name not in provider_format.row_keys)
    row[name] = draw(json_values)
    return name


def _extra_message_key(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user", plain=False)
    message["wieght"] = 1
    return f"messages[{index}].wieght"


def _two_formats(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["text"] = "x"
    return "text"


def _stray_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    place = len(row["messages"]) - 1
    assume(row["messages"][place - 1]["role"] == "user")
    row["messages"].insert(place, {"role": "tool", "tool_call_id": "zzzzzzzzz", "content": "x"})
    return f"messages[{place}].tool_call_id"


def _lost_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, place, call = _call(draw, row)
    place += 1
    while row["messages"][place]["tool_call_id"] != call["id"]:
        place += 1
    del row["messages"][place]
    return f"{field}.id"


def _wrong_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "tool")
    message["tool_call_id"] = "zzzzzzzzz"
    return f"messages[{index}].tool_call_id"


def _call_id(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, place, call = _call(draw, row)
    old, call["id"] = call["id"], draw(st.sampled_from(["short", "", "abcdefgh12", "abc-efgh1"]))
    for message in row["messages"][place:]:
        if message.get("tool_call_id") == old:
            message["tool_call_id"] = call["id"]
            break
    return f"{field}.id"


def _no_call_id(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, _, call = _call(draw, row)
    del call["id"]
    return f"{field}.id"


def _same_call_ids(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, place, call = _call(draw, row)
    calls_made = row["messages"][place]["tool_calls"]
    calls_made.append(copy.deepcopy(call))
    return f"{field.rpartition('[')[0]}[{len(calls_made) - 1}].id"


def _arguments(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    field, _, call = _call(draw, row)
    wrong: list[Any] = ["", "{", "[1]", "3", '{"a": }', '{"a": "\\ud800"}', "[" * 5000, [1], 3]
    if "object" not in provider_format.arguments:
        wrong.append({"a": 1})
    call["function"]["arguments"] = draw(st.sampled_from(wrong))
    return f"{field}.function.arguments"


def _function_name(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, _, call = _call(draw, row)
    name = draw(st.sampled_from(["", "look up", "é", "x" * 65]))
    call["function"]["name"] = name
    return f"{field}.function.name"


def _undeclared(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    field, _, call = _call(draw, row)
    call["function"]["name"] = "look_down"
    return f"{field}.function.name"


def _same_tools(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["tools"].append(copy.deepcopy(row["tools"][0]))
    return f"tools[{len(row['tools']) - 1}].function.name"


def _asker_calls(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    message["tool_calls"] = []
    return f"messages[{index}].tool_calls"


def _unknown_part(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    message["content"] = [{"type": "sound", "sound": "x"}]
    return f"messages[{index}].content[0].type"


def _empty_part(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    message["content"] = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    return f"messages[{index}].content[1].text"


def _misplaced_image(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    role: Role = draw(st.sampled_from(["assistant", "user"]))
    assume("image_url" not in provider_format.parts[role])
    index, message = _pick(draw, row, role)
    message["content"] = [{"type": "image_url", "image_url": {"url": "https://example.org/a"}}]
    return f"messages[{index}].content[0].type"


def _bad_image(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    index, message = _pick(draw, row, "user")
    wrong = ["", "example.org/a.png", "file:///a.png", "https://", "data:image/png;base64,***"]
    wrong += ["data:text/plain;base64,aaaa", "data:image/png,aaaa", "data:image/png;base64,"]
    wrong += ["data:image/png;base64,aaaaa", "data:image/tiff;base64,aaaa"]
    url = draw(st.sampled_from(wrong))
    message["content"] = [{"type": "image_url", "image_url": {"url": url}}]
    return f"messages[{index}].content[0].image_url.url"


def _no_labels(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["labels"] = {}
    return "labels"


def _empty_label(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    target = draw(st.sampled_from(sorted(row["labels"])))
    row["labels"][target] = draw(st.sampled_from(["", " ", [], ["a", ""]]))
    return f"labels.{target}"


def _number_label(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    target = draw(st.sampled_from(sorted(row["labels"])))
    row["labels"][target] = draw(st.sampled_from([3, True, None, {"a": "b"}, [1]]))
    return f"labels.{target}"


def _nothing_to_label(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> None:
    del draw, provider_format
    row.pop("text", None)
    row.pop("messages", None)


def _empty_text(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    row["text"] = draw(st.sampled_from(["", " ", "\n"]))
    return "text"


def _same_answers(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["non_preferred_output"] = copy.deepcopy(row["preferred_output"])
    return "non_preferred_output"


def _no_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    key = draw(st.sampled_from(["preferred_output", "non_preferred_output"]))
    del row[key]
    return key


def _empty_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    key = draw(st.sampled_from(["preferred_output", "non_preferred_output"]))
    row[key][0]["content"] = ""
    return f"{key}[0].content"


def _asked_answer(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    key = draw(st.sampled_from(["preferred_output", "non_preferred_output"]))
    row[key][0]["role"] = "user"
    return f"{key}[0].role"


def _no_prompt(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["input"]["messages"].clear()
    return "input.messages"


def _same_chosen(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    row["rejected"] = copy.deepcopy(row["chosen"])
    return "rejected"


def _different_prompts(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del draw, provider_format
    assume("prompt" not in row)
    row["rejected"][0] = {"role": "user", "content": "something else \U0001f600"}
    return "rejected"


def _no_rejected(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    key = draw(st.sampled_from(["chosen", "rejected"]))
    del row[key]
    return key


def _empty_completion(draw: st.DrawFn, row: Row, provider_format: ProviderFormat) -> str:
    del provider_format
    row["completion"] = draw(st.sampled_from(["", " "]))
    return "completion"


MUTATIONS: dict[str, Mutation] = {
    "unknown role": Mutation("unknown_role", ("messages",), _unknown_role),
    "no role": Mutation("missing_field", ("messages",), _no_role),
    "the user is last": Mutation("last_not_assistant", ("messages",), _asks_last),
    "empty content": Mutation("empty_content", ("messages",), _empty),
    "no content": Mutation("empty_content", ("messages",), _no_content),
    "content of a wrong type": Mutation("wrong_type", ("messages",), _number),
    "wrong weight": Mutation("bad_weight", ("messages",), _weight),
    "no messages": Mutation("empty_content", ("messages",), _no_messages),
    "messages misspelt": Mutation("unknown_format", ("messages",), _renamed),
    "content misspelt": Mutation("empty_content", ("messages",), _misspelt),
    "unknown key": Mutation("unknown_key", _ANY, _extra_key),
    "unknown key of a message": Mutation("unknown_key", ("messages",), _extra_message_key),
    "text beside messages": Mutation("ambiguous_row", ("messages",), _two_formats),
    "answer to no call": Mutation("unmatched_answer", ("messages",), _stray_answer),
    "call without answer": Mutation("unanswered_call", ("messages",), _lost_answer, calling=True),
    "answer to another call": Mutation(
        "unmatched_answer",
        ("messages",),
        _wrong_answer,
        calling=True,
        holds=lambda one: one.answers_name_calls,
    ),
    "malformed call id": Mutation(
        "bad_call_id",
        ("messages",),
        _call_id,
        calling=True,
        holds=lambda one: one.call_id is not None,
    ),
    "call without id": Mutation("bad_call_id", ("messages",), _no_call_id, calling=True),
    "two calls of one id": Mutation(
        "duplicate_call_id", ("messages",), _same_call_ids, calling=True
    ),
    "wrong arguments": Mutation("bad_arguments", ("messages",), _arguments, calling=True),
    "wrong name of a function": Mutation(
        "bad_function_name", ("messages",), _function_name, calling=True
    ),
    "undeclared tool": Mutation("undeclared_tool", ("messages",), _undeclared, calling=True),
    "tool declared twice": Mutation("duplicate_tool", ("messages",), _same_tools, calling=True),
    "the user calls tools": Mutation("misplaced_tool_calls", ("messages",), _asker_calls),
    "unknown part": Mutation("unknown_part", ("messages",), _unknown_part),
    "empty part": Mutation("empty_content", ("messages",), _empty_part),
    "image where none may be": Mutation("misplaced_part", ("messages",), _misplaced_image),
    "malformed image": Mutation(
        "bad_image", ("messages",), _bad_image, holds=lambda one: "image_url" in one.parts["user"]
    ),
    "no labels": Mutation("empty_content", ("labels",), _no_labels),
    "empty label": Mutation("empty_content", ("labels",), _empty_label),
    "label of a wrong type": Mutation("wrong_type", ("labels",), _number_label),
    "nothing to label": Mutation("ambiguous_row", ("labels",), _nothing_to_label),
    "empty text": Mutation("empty_content", ("text",), _empty_text),
    "equal answers": Mutation("same_answers", ("preference",), _same_answers),
    "one answer missing": Mutation("missing_field", ("preference",), _no_answer),
    "one answer empty": Mutation("empty_content", ("preference",), _empty_answer),
    "the user answers": Mutation("misplaced_role", ("preference",), _asked_answer),
    "no prompt": Mutation("empty_content", ("preference",), _no_prompt),
    "equal choices": Mutation("same_answers", ("chosen",), _same_chosen),
    "different prompts": Mutation("different_prompts", ("chosen",), _different_prompts),
    "one choice missing": Mutation("missing_field", ("chosen",), _no_rejected),
    "empty completion": Mutation("empty_content", ("completion",), _empty_completion),
}
"""Ways to spoil a row by one change each."""


@st.composite
def faulty_rows(draw: st.DrawFn, provider_format: ProviderFormat, name: str | None = None) -> Fault:
    """Make a right row and change one thing in it.

    Args:
        name: The mutation, a key of `MUTATIONS`; any if not given.
    """
    mutation = MUTATIONS[name or draw(st.sampled_from(sorted(MUTATIONS)))]
    forms = mutation.formats_of(provider_format)
    assume(forms)
    if mutation.calling:
        row = copy.deepcopy(draw(chats(provider_format, calling=True)))
    else:
        row = copy.deepcopy(draw(rows(provider_format, draw(st.sampled_from(forms)))))
    field = mutation.spoil(draw, row, provider_format)
    return Fault(row, mutation.code, field)
