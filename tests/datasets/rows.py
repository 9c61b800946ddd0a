"""Makers of right rows for every provider format and format; see `mutations` for wrong ones.

rows(provider format)                any row that the provider format takes
rows(provider_format, "messages")    one of a format
line(row)                    its bytes, as they stand in a file
"""

import base64
import copy
import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from hypothesis import strategies as st

from training_backends.core.data_rules import MessagePosition, ProviderFormat, Role, RowFormat

Row = dict[str, Any]

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
names = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
labels = st.dictionaries(
    names, texts | st.lists(texts, min_size=1, max_size=2, unique=True), min_size=1, max_size=2
)
_ASCII = st.characters(max_codepoint=127)
_ARGUMENTS = st.dictionaries(names, json_values, max_size=2)
_RESULTS = st.text("ab", max_size=5)
_ANSWERS = st.lists(texts, min_size=2, max_size=2, unique=True)


def line(row: object, *, ascii_only: bool = False) -> bytes:
    """Write a row as a line of a file, without its end."""
    return json.dumps(row, ensure_ascii=ascii_only).encode()


# Strategies are kept: to make and to check one takes longer than to draw from it.


@cache
def _images(
    schemes: tuple[str, ...], types: tuple[str, ...], *, bare: bool
) -> st.SearchStrategy[Any]:
    """Make addresses of images, as an object or as a bare string where that is taken."""
    data = st.tuples(st.sampled_from(types), st.binary(min_size=1, max_size=9)).map(
        lambda made: f"data:image/{made[0]};base64,{base64.b64encode(made[1]).decode()}"
    )
    made = [data] if "data" in schemes else []
    made += [
        names.map(f"{scheme}://example.org/{{}}.png".format)
        for scheme in schemes
        if scheme != "data"
    ]
    urls = st.one_of(made)
    as_object = st.fixed_dictionaries(
        {"url": urls}, optional={"detail": st.sampled_from(["auto", "low", "high"])}
    )
    return as_object | urls if bare else as_object


_TEXT_PART = texts.map(lambda one: {"type": "text", "text": one})
_PARTS = st.lists(_TEXT_PART, min_size=1, max_size=2)
_CONTENTS: st.SearchStrategy[Any] = st.one_of(texts, texts, _PARTS)


@cache
def _contents_with_images(
    schemes: tuple[str, ...], types: tuple[str, ...], *, bare: bool
) -> st.SearchStrategy[Any]:
    image = _images(schemes, types, bare=bare).map(
        lambda one: {"type": "image_url", "image_url": one}
    )
    return st.one_of(texts, texts, _PARTS | st.tuples(_TEXT_PART, image).map(list))


def contents(provider_format: ProviderFormat, role: Role) -> st.SearchStrategy[Any]:
    """Make the content of one message."""
    if "image_url" not in provider_format.parts[role]:
        return _CONTENTS
    return _contents_with_images(
        provider_format.image_schemes, provider_format.image_types, bare=provider_format.bare_image
    )


@cache
def call_ids(pattern: str | None) -> st.SearchStrategy[list[str]]:
    """Make the ids of one or two tool calls."""
    if pattern is None:
        ids = names.map("call_{}".format)
    else:
        ids = st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True, alphabet=_ASCII)
    return st.lists(ids, min_size=1, max_size=2, unique=True)


@st.composite
def messages_of(draw: st.DrawFn, provider_format: ProviderFormat, role: Role) -> Row:
    """Make one message without tools."""
    message: Row = {"role": role, "content": draw(contents(provider_format, role))}
    if role != "assistant" and role in provider_format.weighted_roles and draw(st.booleans()):
        message["weight"] = draw(st.sampled_from(provider_format.weights))
    return message


@st.composite
def calls(draw: st.DrawFn, provider_format: ProviderFormat) -> list[Row]:
    """Make an assistant's tool calls with all their answers."""
    ids = draw(call_ids(provider_format.call_id))
    given = draw(_ARGUMENTS)
    arguments = (
        given if draw(st.sampled_from(provider_format.arguments)) == "object" else json.dumps(given)
    )
    made = [
        {"id": one, "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        for one in ids
    ]
    caller: Row = {"role": "assistant", "tool_calls": made}
    if draw(st.booleans()):
        caller["content"] = draw(st.sampled_from(["", None]))
    answers = [
        {"role": "tool", "tool_call_id": one, "content": draw(_RESULTS)}
        for one in (draw(st.permutations(ids)) if provider_format.answers_name_calls else ids)
    ]
    return [caller, *answers]


TOOLS: list[Row] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
    for name in ("look_up", "search")
]


_ASKING: tuple[Role, ...] = ("system", "developer", "user")


@st.composite
def conversations(
    draw: st.DrawFn,
    provider_format: ProviderFormat,
    *,
    answered: bool = True,
    calling: bool = False,
) -> list[Row]:
    """Walk through the provider format's order, to an assistant's answer or to what waits for one.

    Args:
        calling: Tools are certainly called before the answer.
    """
    made: list[Row] = []
    place: MessagePosition = "start"
    for _ in range(draw(st.integers(1, 4))):
        asking = [one for one in _ASKING if one in provider_format.order[place]]
        if asking:
            asks = draw(st.sampled_from(asking))
            made.append(draw(messages_of(provider_format, asks)))
            place = asks
        if "assistant" in provider_format.order[place] and draw(st.booleans()):
            place = "assistant"
            if draw(st.integers(0, 2)) == 0:
                made += draw(calls(provider_format))
                place = "tool"
            else:
                made.append(draw(messages_of(provider_format, "assistant")))
    # What comes last is the same in all provider formats: somebody asks, the assistant answers.
    while place != "user":
        speaks: Role = "user" if "user" in provider_format.order[place] else "assistant"
        made.append(draw(messages_of(provider_format, speaks)))
        place = speaks
    if calling:
        made += draw(calls(provider_format))
    if answered:
        made.append(draw(messages_of(provider_format, "assistant")))
        if "assistant" in provider_format.weighted_roles and draw(st.booleans()):
            made[-1]["weight"] = 1
    return made


def uses_tools(messages: list[Row]) -> bool:
    """Tell whether a conversation calls tools."""
    return any(message.get("tool_calls") for message in messages)


@st.composite
def chats(draw: st.DrawFn, provider_format: ProviderFormat, *, calling: bool = False) -> Row:
    """Make a conversation with the tools that it uses."""
    row: Row = {"messages": draw(conversations(provider_format, calling=calling))}
    if uses_tools(row["messages"]) or draw(st.integers(0, 4)) == 0:
        row["tools"] = copy.deepcopy(TOOLS)
    return row


@st.composite
def classified(draw: st.DrawFn, provider_format: ProviderFormat) -> Row:
    """Make a row for a classifier."""
    row: Row = {"labels": draw(labels)}
    if draw(st.booleans()):
        row["text"] = draw(texts)
    else:
        row["messages"] = [draw(messages_of(provider_format, "user"))]
    return row


@st.composite
def preferences(draw: st.DrawFn, provider_format: ProviderFormat) -> Row:
    """Make a preference pair in OpenAI's words."""
    asked: Row = {"messages": draw(conversations(provider_format, answered=False))}
    if uses_tools(asked["messages"]):
        asked["tools"] = copy.deepcopy(TOOLS)
    good, bad = draw(_ANSWERS)
    return {
        "input": asked,
        "preferred_output": [{"role": "assistant", "content": good}],
        "non_preferred_output": [{"role": "assistant", "content": bad}],
    }


@st.composite
def chosen(draw: st.DrawFn, provider_format: ProviderFormat) -> Row:
    """Make a preference pair in TRL's words: texts, messages, or whole conversations."""
    good, bad = draw(_ANSWERS)
    style = draw(st.sampled_from(["texts", "messages", "whole"]))
    if style == "texts":
        return {"prompt": draw(texts), "chosen": good, "rejected": bad}
    asked = draw(conversations(provider_format, answered=False))
    answers = [[{"role": "assistant", "content": one}] for one in (good, bad)]
    if style == "whole":
        row: Row = {"chosen": [*asked, *answers[0]], "rejected": [*asked, *answers[1]]}
    else:
        row = {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
    return {**row, "tools": copy.deepcopy(TOOLS)} if uses_tools(asked) else row


_MAKERS: dict[RowFormat, Callable[[ProviderFormat], st.SearchStrategy[Row]]] = {
    "messages": chats,
    "text": lambda _: st.fixed_dictionaries({"text": texts}),
    "labels": classified,
    "preference": preferences,
    "chosen": chosen,
    "completion": lambda _: st.fixed_dictionaries({"prompt": texts, "completion": texts}),
}

TYPES: dict[RowFormat, str] = {
    "messages": "instruct",
    "text": "pretrain",
    "labels": "classifier",
    "preference": "preference",
    "chosen": "preference",
    "completion": "instruct",
}
"""What each format is taken for."""


def rows(provider_format: ProviderFormat, form: RowFormat | None = None) -> st.SearchStrategy[Row]:
    """Make right rows of one format, or of any that the provider format takes."""
    if form is not None:
        return _MAKERS[form](provider_format)
    return st.one_of([_MAKERS[one](provider_format) for one in provider_format.formats])
