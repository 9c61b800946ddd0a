"""Rows of a training file and the byte-level encoding."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends.datasets.chat import (
    ChatRow,
    Control,
    Message,
    TextRow,
    byte_encode,
    byte_token_count,
    parse_row,
)

# A busy machine is slow for a while; that says nothing of the strategy.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TEXT = st.text(max_size=20)
CALLS = st.fixed_dictionaries(
    {
        "id": st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True),
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": TEXT, "arguments": TEXT | st.dictionaries(TEXT, TEXT, max_size=2)}
        ),
    }
)
CONTENT = TEXT | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=3
)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": CONTENT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": TEXT | st.none(),
            "tool_calls": st.lists(CALLS, max_size=2),
            "weight": st.sampled_from([0, 1]),
            "refusal": st.none(),
        },
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": TEXT, "content": TEXT}),
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": TEXT}, optional={"description": TEXT}),
        }
    ),
    max_size=2,
)
ROWS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=5)}, optional={"tools": TOOLS, "extra": TEXT}
)


def row(**content: Any) -> ChatRow | TextRow:
    """Parse a row given as keywords."""
    return parse_row(json.dumps(content).encode())


@CALM
@given(ROWS)
def test_every_openai_chat_is_read_and_counted_as_it_is_encoded(content: dict[str, Any]) -> None:
    """A lawful chat parses, keeps its text, and its count is the number of its tokens."""
    parsed = parse_row(json.dumps(content).encode())
    assert isinstance(parsed, ChatRow)
    assert [message.role for message in parsed.messages] == [
        message["role"] for message in content["messages"]
    ]
    ids, trained = byte_encode(parsed)
    assert byte_token_count(parsed) == len(ids) == len(trained)
    answers = sum(m["role"] == "assistant" and m.get("weight") != 0 for m in content["messages"])
    assert sum(t for i, t in zip(ids, trained, strict=True) if i == Control.EOS) == answers


@CALM
@given(st.binary(max_size=60))
def test_any_other_line_is_refused_by_one_kind_of_error(line: bytes) -> None:
    """Whatever stands in a line, it is a row or a DecodeError, nothing else."""
    try:
        parsed = parse_row(line)
    except msgspec.DecodeError:
        return
    assert isinstance(parsed, ChatRow | TextRow)


@CALM
@given(TEXT)
def test_text_never_becomes_a_control_token(text: str) -> None:
    """Between the markers of a user's message there are only bytes, exactly the text's."""
    written = f"[INST]{text}</s>[/INST]"
    ids, trained = byte_encode(ChatRow([Message("user", written)]))
    assert bytes(ids[2:-1]).decode() == written
    assert ids[:2] == [Control.BOS, Control.INST]
    assert ids[-1] == Control.INST_END
    assert not any(trained)


def test_only_the_answers_count_token_by_token() -> None:
    """The loss counts an assistant's text through its end token, and weight 0 leaves it out."""
    parsed = row(
        messages=[
            {"role": "system", "content": "S"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "de"},
        ]
    )
    ids, trained = byte_encode(parsed)
    assert list(zip(ids, trained, strict=True)) == [
        (Control.BOS, False),
        (Control.SYSTEM, False),
        (ord("S"), False),
        (Control.SYSTEM_END, False),
        (Control.INST, False),
        (ord("a"), False),
        (Control.INST_END, False),
        (ord("b"), False),
        (Control.EOS, False),
        (Control.INST, False),
        (ord("c"), False),
        (Control.INST_END, False),
        (ord("d"), True),
        (ord("e"), True),
        (Control.EOS, True),
    ]


def test_a_tool_call_counts_and_its_result_does_not() -> None:
    """What the assistant calls is learnt, what the tool answers is read only."""
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parsed = row(
        messages=[
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "123456789", "content": "42"},
        ]
    )
    ids, trained = byte_encode(parsed)
    learnt = [i for i, t in zip(ids, trained, strict=True) if t]
    assert learnt == [
        Control.TOOL_CALLS,
        ord("f"),
        Control.CALL_ID,
        *b"123456789",
        Control.ARGS,
        *b"{}",
        Control.EOS,
    ]


def test_plain_text_counts_whole() -> None:
    """A pretrain row is learnt from its first byte through the end token."""
    ids, trained = byte_encode(row(text="é"))
    assert ids == [Control.BOS, *"é".encode(), Control.EOS]
    assert trained == [False, True, True, True]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"messages": [{"role": "bot"}]}', r"\$\.messages\[0\]\.role"),
        (b'{"messages": [{"role": "user", "weight": 2}]}', r"\$\.messages\[0\]\.weight"),
        (b'{"prompt": "x"}', "neither `messages` nor `text`"),
        (b'{"messages": [', "truncated"),
    ],
)
def test_a_bad_row_says_what_and_where(line: bytes, said: str) -> None:
    """The error names the place in the row."""
    with pytest.raises(msgspec.DecodeError, match=said):
        parse_row(line)
