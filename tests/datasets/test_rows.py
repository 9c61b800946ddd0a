"""Rows of a training file and the byte-level encoding."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets.rows import line, rows
from training_backends.core.data_rules import RowFormat
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.provider_formats import LOCAL
from training_backends.datasets.rows import (
    ChatRow,
    ClassifierRow,
    ContentPart,
    Control,
    ImageURL,
    Message,
    PreferenceRow,
    TextRow,
    byte_encode,
    byte_token_count,
    parse_any_row,
    parse_row,
)

# A busy machine is slow for a while; that says nothing of the strategy.
CALM = settings(suppress_health_check=[HealthCheck.too_slow])
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
        (b'{"messages": [], "text": ""}', "both `messages` and `text`"),
        (b'{"messages": [', "truncated"),
    ],
)
def test_a_bad_row_says_what_and_where(line: bytes, said: str) -> None:
    """The error names the place in the row."""
    with pytest.raises(msgspec.DecodeError, match=said):
        parse_row(line)


STRUCTS: dict[RowFormat, type] = {
    "messages": ChatRow,
    "text": TextRow,
    "labels": ClassifierRow,
    "preference": PreferenceRow,
    "chosen": PreferenceRow,
}


@pytest.mark.parametrize("form", STRUCTS)
@CALM
@given(data=st.data())
def test_each_format_has_its_struct(form: RowFormat, data: st.DataObject) -> None:
    """A row of any method is read as what it is."""
    content = data.draw(rows(LOCAL, form))
    parsed = parse_any_row(line(content))
    assert type(parsed) is STRUCTS[form]
    if isinstance(parsed, PreferenceRow):
        assert parsed.chosen[-1].role == parsed.rejected[-1].role == "assistant"
        assert parsed.chosen != parsed.rejected


def test_a_pair_is_the_same_in_openai_s_words_and_in_trl_s() -> None:
    """Who wrote the row does not matter to whoever learns from it."""
    answers = {"chosen": "b", "rejected": "c"}
    keys = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    asked = {"role": "user", "content": "a"}
    pair = {keys[key]: [{"role": "assistant", "content": text}] for key, text in answers.items()}
    first = parse_any_row(line({"prompt": "a", **answers}))
    assert first == parse_any_row(line({"input": {"messages": [asked]}, **pair}))
    assert first == PreferenceRow(
        [Message("user", "a")], [Message("assistant", "b")], [Message("assistant", "c")]
    )


@pytest.mark.parametrize("image", ["https://a/b.png", {"url": "https://a/b.png", "detail": "low"}])
def test_an_image_is_an_address_or_an_object(image: Any) -> None:
    """Both ways to write it are read, and neither is text."""
    part = {"type": "image_url", "image_url": image}
    parsed = row(messages=[{"role": "user", "content": [part]}])
    assert isinstance(parsed, ChatRow)
    found = image if isinstance(image, str) else ImageURL(**image)
    assert parsed.messages[0].content == [ContentPart("image_url", None, found)]
    assert parsed.messages[0].has_other_parts
    assert parsed.messages[0].text == ""


@pytest.mark.parametrize("beside", [{}, {"labels": {"topic": "x"}}])
def test_a_row_of_two_formats_is_refused_wherever_the_inspection_does(
    beside: dict[str, Any],
) -> None:
    """Nobody can tell which of the two is meant; null stands for a key that is left out."""
    both = {"messages": [{"role": "user", "content": "a"}], "text": "b", **beside}
    _, findings = RowRules(LOCAL).judge(line(both))
    assert [finding.code for finding in findings] == ["ambiguous_row"]
    with pytest.raises(msgspec.ValidationError, match="both"):
        parse_any_row(line(both))
    for key in ("messages", "text"):
        parse_any_row(line({**both, key: None}))


def test_a_row_of_no_format_is_refused() -> None:
    """Half a pair is no pair."""
    with pytest.raises(msgspec.ValidationError, match="no known format"):
        parse_any_row(b'{"prompt": "a", "chosen": "b"}')
