"""Rules hold for every row that can be made: right ones pass, each single fault is named."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets.mutations import MUTATIONS, Fault, faulty_rows
from tests.datasets.rows import TOOLS, TYPES, json_values, line, rows
from tests.effort import searching
from training_backends.core.config import ClassifierTarget
from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.check_fast import Finding, RowRules, file_findings
from training_backends.datasets.explain import RowFaults
from training_backends.datasets.findings import Facts
from training_backends.datasets.provider_formats import (
    LOCAL,
    MISTRAL,
    OPENAI,
    PROVIDER_FORMATS,
    TOGETHER,
)

# A busy machine is slow for a while; that says nothing of the strategy.
CALM = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
ALL = pytest.mark.parametrize(
    "provider_format", PROVIDER_FORMATS.values(), ids=list(PROVIDER_FORMATS)
)

USER: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is sunny."}
CALL: dict[str, Any] = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"what": "weather"}'},
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "sunny"}
CALLER: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
PAIR: dict[str, Any] = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "No idea."}],
}
PNG = "data:image/png;base64,aGVsbG8="


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def judged(
    row: object, provider_format: ProviderFormat = MISTRAL, **rules: Any
) -> Sequence[Finding]:
    return RowRules(provider_format, **rules).judge(line(row))[1]


def told(findings: Sequence[Finding]) -> list[tuple[str, str | None, str]]:
    return [(one.code, one.field, one.severity) for one in findings]


def only(row: object, provider_format: ProviderFormat = MISTRAL, **rules: Any) -> Finding:
    (finding,) = judged(row, provider_format, **rules)
    return finding


# Right rows


@ALL
@given(data=st.data())
@CALM
def test_a_right_row_passes(provider_format: ProviderFormat, data: st.DataObject) -> None:
    """No rule refuses what its provider format takes, and each format is told from the others."""
    form = data.draw(st.sampled_from(provider_format.formats))
    row = data.draw(rows(provider_format, form))
    rules = RowRules(provider_format)
    for ascii_only in (True, False):
        verdict = rules.judge(line(row, ascii_only=ascii_only))
        assert verdict == (TYPES[form], ())
        assert verdict is rules.judge(line(row))
    assert rules.facts.formats == {form: 4}


@ALL
@given(data=st.data())
@CALM
def test_what_passes_quickly_would_pass_slowly(
    provider_format: ProviderFormat, data: st.DataObject
) -> None:
    """The short way lets through exactly the rows of which the long way has nothing to say."""
    made = data.draw(
        rows(provider_format) | faulty_rows(provider_format).map(lambda fault: fault.row)
    )
    text = line(made)
    quick, slow = RowRules(provider_format), Facts()
    assert quick.judge(text) == RowFaults(provider_format).describe(text, slow)
    assert quick.facts == slow


CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "formats": st.sampled_from([("messages",), ("text", "labels")]),
    "roles": st.just(("user", "assistant")),
    "order": st.just({"start": ("user",), "user": ("assistant",), "assistant": ("user", "end")}),
    "lone_answer": st.booleans(),
    "weights": st.sampled_from([(), (1,), (0, 1, 2)]),
    "weighted_roles": st.sampled_from([(), ("user", "assistant")]),
    "call_id": st.sampled_from([None, r"call_\w+"]),
    "answers_name_calls": st.booleans(),
    "function_name": st.just("search"),
    "arguments": st.sampled_from([("string",), ("object",), ("string", "object")]),
    "row_keys": st.sampled_from([(), ("tools", "source")]),
    "message_keys": st.sampled_from([("role", "content"), ("role", "content", "tool_calls")]),
    "levels": st.just({"bad_call_id": "ignored", "undeclared_tool": "error"}),
}


@given(
    st.sampled_from([*PROVIDER_FORMATS.values()]),
    st.fixed_dictionaries({}, optional=CHANGES),
    st.data(),
)
@CALM
def test_a_provider_format_that_nobody_has_met_is_judged_alike(
    base: ProviderFormat, changes: dict[str, Any], data: st.DataObject
) -> None:
    """No rule is taken for granted on the short way because all known providers share it."""
    provider_format = replace(base, **changes, name="new")
    text = line(data.draw(rows(base) | faulty_rows(base).map(lambda fault: fault.row)))
    assert RowRules(provider_format).judge(text) == RowFaults(provider_format).describe(
        text, Facts()
    )


@given(st.lists(rows(MISTRAL) | faulty_rows(MISTRAL).map(lambda fault: fault.row), max_size=6))
@CALM
def test_what_was_judged_before_changes_nothing(made: list[Any]) -> None:
    """A row is judged alike first and last, by rules that are new and by rules that are not."""
    rules = RowRules()
    first = [rules.judge(line(row)) for row in made]
    assert [rules.judge(line(row)) for row in made] == first
    assert [RowRules().judge(line(row)) for row in made] == first


# Wrong rows


@pytest.mark.parametrize("name", sorted(MUTATIONS))
@given(data=st.data())
@searching(4, CALM)
def test_each_single_fault_is_named(name: str, data: st.DataObject) -> None:
    """One change to a right row is found, by its code and in its field."""
    those = [one for one in PROVIDER_FORMATS.values() if MUTATIONS[name].formats_of(one)]
    provider_format = data.draw(st.sampled_from(those))
    fault = data.draw(faulty_rows(provider_format, name))
    findings = judged(fault.row, provider_format)
    assert (fault.code, fault.field) in {(one.code, one.field) for one in findings}
    assert all(one.message and one.fix for one in findings)


@given(st.binary(max_size=200) | st.lists(st.sampled_from(b'{}[]":,\\'.split()), max_size=30))
@CALM
def test_any_bytes_are_judged(content: Any) -> None:
    """Junk is refused in words, never by an exception."""
    text = content if isinstance(content, bytes) else b"".join(content)
    findings = RowRules().judge(text)[1]
    assert all(one.message for one in findings)


@ALL
@given(
    row=st.dictionaries(
        st.sampled_from(
            [
                "messages",
                "text",
                "labels",
                "tools",
                "prompt",
                "completion",
                "chosen",
                "rejected",
                "input",
                "preferred_output",
            ]
        ),
        json_values,
    )
)
@CALM
def test_any_json_is_judged(provider_format: ProviderFormat, row: dict[str, Any]) -> None:
    """Known keys with any values in them are judged, too."""
    RowRules(provider_format).judge(line(row))


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        (b'{"text": "a"} x', "bad_json", "column 15"),
        (b'{"text": "\xc3\xa9", }', "bad_json", "column 15"),
        (b'{"text": "a"', "bad_json", "unexpected end"),
        (b"\xff{}", "bad_utf8", "column 1"),
        (b'{"text": "\xc3\xa9\xff"}', "bad_utf8", "column 12"),
        (b'{"text": "a", "other": "\xff"}', "bad_utf8", "column 25"),
        (b'{"text": "a\x00b"}', "nul_byte", "column 12"),
        (b'{"text": "\\ud800"}', "lone_surrogate", "column 11"),
        (b'{"text": "a\\udc00"}', "lone_surrogate", "column 12"),
        (b'{"text": "\xed\xa0\x80"}', "bad_utf8", "column 11"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "bad_number", "too large"),
        (b'{"text": "a", "n": 1e999}', "bad_number", "too large"),
        (b'{"text": ' + b"[" * 100_000, "bad_json", "nested"),
        (b'{"other": ' + b"[" * 100_000, "bad_json", "nested"),
        (b"[1]", "wrong_type", "an array"),
        (b"3", "wrong_type", "a number"),
    ],
)
def test_a_line_that_is_no_row_says_where(content: bytes, code: str, text: str) -> None:
    """Broken text names the column, counted in characters."""
    sample_type, findings = RowRules().judge(content)
    assert sample_type is None
    assert [one.code for one in findings] == [code]
    assert text in findings[0].message


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00"', '"\\\\ud800"', '"\U0001f600"'])
def test_whole_characters_are_no_halves(text: str) -> None:
    """A surrogate pair and a backslash before a u are ordinary text."""
    assert RowRules().judge(f'{{"text": {text}}}'.encode()) == ("pretrain", ())


def test_a_key_that_stands_twice_is_told_beside_what_it_broke() -> None:
    """The last of two equal keys wins, which explains a row that looks right."""
    text = b'{"messages": [{"role": "user", "content": "a", "content": ""}]}'
    codes = [one.code for one in RowRules().judge(text)[1]]
    assert codes == ["empty_content", "no_assistant", "duplicate_key"]


def test_the_user_s_data_is_not_poured_into_messages() -> None:
    """Whatever a row holds, what is said of it stays short."""
    long = "x" * 10_000
    for row in (
        {long: 1},
        chat({"role": long, "content": "a"}),
        chat({**USER, long: 1}, ANSWER),
        {"text": "a", "labels": {long: long}, long: 1},
        {"text": "a", "labels": {long: 3}},
        chat(USER, {**CALLER, "tool_calls": [{**CALL, "id": long}]}, tools=TOOLS),
    ):
        for finding in judged(row):
            assert len(finding.message) + len(finding.field or "") + len(finding.fix or "") < 400


@pytest.mark.parametrize(
    "content",
    [
        {f"key {number}": 1 for number in range(100_000)},
        {"text": "a", **{f"key {number}": 1 for number in range(100_000)}},
        {"messages": [{"role": "robot"}] * 100_000},
        {"messages": [{**USER, "wieght": 1}] * 50_000},
        {"messages": [0] * 100_000},
        {"text": [[]] * 300_000},
        {"text": "a", "labels": {f"key {number}": 1 for number in range(100_000)}},
        chat(*[{**CALLER, "content": None}] * 10_000, tools=TOOLS * 10_000),
    ],
)
def test_a_monstrous_row_is_judged_shortly(content: dict[str, Any]) -> None:
    """However many faults a row has, not all of them are told."""
    findings = RowRules().judge(line(content))[1]
    assert 0 < len(findings) <= 100


# What is said


@pytest.mark.parametrize(
    ("row", "field", "fix"),
    [
        ({"mesages": [USER, ANSWER]}, "mesages", "rename it to `messages`"),
        ({"conversations": []}, "conversations", "ShareGPT"),
        ({"foo": 1}, None, "`messages` (instruct)"),
        ({}, None, "`messages` (instruct)"),
    ],
)
def test_an_unknown_format_says_what_was_meant(
    row: dict[str, Any], field: str | None, fix: str
) -> None:
    """The nearest known key is named, or all that can be given."""
    finding = only(row)
    assert (finding.code, finding.field) == ("unknown_format", field)
    assert fix in (finding.fix or "")


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ({"role": "human", "content": "a"}, "use user"),
        ({"role": "asistant", "content": "a"}, "use assistant"),
        ({"role": "developer", "content": "a"}, "use system"),
        ({"role": "robot", "content": "a"}, "use system, user, assistant or tool"),
    ],
)
def test_an_unknown_role_says_what_was_meant(message: dict[str, Any], fix: str) -> None:
    """Words that others use for a role are known."""
    finding = only(chat(message, ANSWER))
    assert (finding.code, finding.field, finding.fix) == ("unknown_role", "messages[0].role", fix)


def test_a_misspelt_key_is_a_warning_that_says_what_was_meant() -> None:
    """A key that nobody reads stops nothing, but is told."""
    finding = only(chat({**USER, "wieght": 1}, ANSWER))
    assert finding.severity == "warning"
    assert (finding.field, finding.fix) == ("messages[0].wieght", "rename it to `weight`")


def test_all_faults_of_a_row_are_told_at_once() -> None:
    """Nobody has to mend a row fault by fault."""
    row = chat(
        {"role": "user", "content": ""},
        {**CALLER, "tool_calls": [{**CALL, "id": "x"}]},
        {"role": "robot", "content": "a"},
        {**ANSWER, "weight": 7},
    )
    assert [one.code for one in judged(row)] == [
        "empty_content",
        "bad_call_id",
        "unknown_role",
        "bad_weight",
    ]


# Rules where provider formats differ


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            chat({"role": "developer", "content": "a"}, USER, ANSWER),
            {"mistral": ["unknown_role"], "together": ["unknown_role"]},
        ),
        (chat(USER, USER, ANSWER), {"together": ["bad_order"]}),
        (
            chat(USER, ANSWER, {"role": "system", "content": "a"}, USER, ANSWER),
            {"mistral": ["bad_order"], "together": ["bad_order"], "local": ["bad_order"]},
        ),
        (chat(ANSWER, USER, ANSWER), {"together": ["bad_start"]}),
        (chat(ANSWER), {"mistral": ["lone_answer"], "together": ["bad_start"]}),
        (
            chat(USER, {**CALLER, "tool_calls": [{**CALL, "id": "call_1"}]}, tools=TOOLS),
            {"mistral": ["bad_call_id"], "local": ["bad_call_id"]},
        ),
        (
            chat(USER, CALLER, {"role": "tool", "content": "x"}, ANSWER, tools=TOOLS),
            {
                "mistral": ["unmatched_answer", "unanswered_call"],
                "openai": ["unmatched_answer", "unanswered_call"],
                "local": ["unmatched_answer", "unanswered_call"],
            },
        ),
        (
            chat(USER, {**CALLER, "content": "Let me see."}, RESULT, ANSWER, tools=TOOLS),
            {"mistral": ["content_with_tool_calls"], "local": ["content_with_tool_calls"]},
        ),
        (
            chat(USER, CALLER, RESULT, tools=TOOLS),
            {
                "mistral": ["last_not_assistant"],
                "openai": ["last_not_assistant"],
                "local": ["last_not_assistant"],
            },
        ),
        (
            chat({**USER, "weight": 0}, ANSWER),
            {
                "mistral": ["misplaced_weight"],
                "openai": ["misplaced_weight"],
                "local": ["misplaced_weight"],
            },
        ),
        (
            chat(USER, {"role": "assistant", "content": None, "refusal": "I cannot."}),
            {
                "mistral": ["unknown_key", "empty_content"],
                "together": ["unknown_key", "empty_content"],
                "local": ["unknown_key", "empty_content"],
            },
        ),
        (
            chat(USER, ANSWER, weight=0.5),
            {"mistral": ["unknown_key"], "openai": ["unknown_key"], "local": ["unknown_key"]},
        ),
        (
            chat(USER, ANSWER, parallel_tool_calls=False),
            {"mistral": ["unknown_key"], "together": ["unknown_key"], "local": ["unknown_key"]},
        ),
        (
            chat(USER, {"role": "assistant", "function_call": CALL["function"]}),
            {
                "mistral": ["legacy_functions"],
                "openai": ["legacy_functions"],
                "together": ["legacy_functions"],
                "local": ["legacy_functions"],
            },
        ),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": PNG}]}, ANSWER),
            {"openai": ["wrong_type"], "together": ["wrong_type"], "local": ["misplaced_part"]},
        ),
        (
            chat(
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
                    ],
                },
                ANSWER,
            ),
            {"together": ["bad_image"], "local": ["misplaced_part"]},
        ),
        (
            chat(
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": PNG}}] * 11,
                },
                ANSWER,
            ),
            {
                "openai": ["too_many_images"],
                "together": ["too_many_images"],
                "local": ["misplaced_part"] * 11,
            },
        ),
        (
            chat(
                USER,
                {
                    **CALLER,
                    "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": {}}}],
                },
                tools=TOOLS,
            ),
            {
                "mistral": ["bad_arguments"],
                "openai": ["bad_arguments"],
                "together": ["bad_arguments"],
            },
        ),
        ({"text": "a"}, {"openai": ["unsupported_format"]}),
        (
            {"text": "a", "labels": {"mood": "good"}},
            {"openai": ["unsupported_format"], "together": ["unsupported_format"]},
        ),
        (PAIR, {"mistral": ["unsupported_format"]}),
        (
            {**PAIR, "preferred_output": [CALLER, RESULT, ANSWER]},
            {
                "mistral": ["unsupported_format"],
                "openai": ["too_many_messages", "undeclared_tool"],
                "together": ["too_many_messages", "undeclared_tool"],
                "local": ["undeclared_tool"],
            },
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {name: ["unsupported_format"] for name in ("mistral", "openai", "together")},
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"mistral": ["unsupported_format"], "local": ["unsupported_format"]},
        ),
    ],
)
def test_each_provider_format_has_its_own_rules(row: object, said: dict[str, list[str]]) -> None:
    """The same row is right for one provider and wrong for another."""
    found = {name: [one.code for one in judged(row, one)] for name, one in PROVIDER_FORMATS.items()}
    assert found == {name: said.get(name, []) for name in PROVIDER_FORMATS}


@ALL
@given(data=st.data())
@CALM
def test_no_rule_asks_for_a_provider_format_s_name(
    provider_format: ProviderFormat, data: st.DataObject
) -> None:
    """A provider format is its data: under another name it says the same."""
    row = data.draw(faulty_rows(provider_format)).row
    renamed = replace(provider_format, name="somebody")
    assert judged(row, renamed) == judged(row, provider_format)


# What a service says of a row that it refuses


DOCUMENTED = [
    # A role that is none of system, user, assistant and tool.
    (chat({"role": "robot", "content": "a"}, ANSWER), "messages[0].role"),
    # "messages   Input should be a valid list".
    ({"messages": {}}, "messages"),
    # Content beside tool calls.
    (
        chat(USER, {**CALLER, "content": "a"}, RESULT, ANSWER, tools=TOOLS),
        "messages[1].content",
    ),
    # An id of a tool call that has not exactly 9 characters.
    (
        chat(USER, {**CALLER, "tool_calls": [{**CALL, "id": "call_12345"}]}, tools=TOOLS),
        "messages[1].tool_calls[0].id",
    ),
    # An answer whose tool_call_id matches no call.
    (
        chat(USER, CALLER, {**RESULT, "tool_call_id": "abcdefgh2"}, ANSWER, tools=TOOLS),
        "messages[2].tool_call_id",
    ),
    # A call of a function that `tools` does not define.
    (
        chat(USER, CALLER, RESULT, ANSWER, tools=TOOLS[1:]),
        "messages[1].tool_calls[0].function.name",
    ),
    # Arguments that are no JSON string.
    (
        chat(
            USER,
            {**CALLER, "tool_calls": [{**CALL, "function": {"name": "look_up", "arguments": {}}}]},
            tools=TOOLS,
        ),
        "messages[1].tool_calls[0].function.arguments",
    ),
    # A weight other than 0 and 1.
    (chat(USER, {**ANSWER, "weight": 0.5}), "messages[1].weight"),
    # A part that is neither text nor image_url.
    (chat({"role": "user", "content": [{"type": "audio"}]}, ANSWER), "messages[0].content[0].type"),
    # Labels that are neither a value nor a list of values.
    ({"text": "a", "labels": {"mood": {"a": "b"}}}, "labels.mood"),
    # A classifier's row with nothing to classify.
    ({"labels": {"mood": "good"}}, None),
    # A row that is of no format at all.
    ({"foo": 1}, None),
]


@pytest.mark.parametrize(("row", "field"), DOCUMENTED)
def test_what_the_service_refuses_is_found_in_the_same_row(row: object, field: str | None) -> None:
    """For each refusal that is documented there is a finding, in its field."""
    assert field in {one.field for one in judged(row)}


def test_mistral_s_own_validator_agrees() -> None:
    """What mistral-common refuses for fine-tuning we refuse, and what we take it takes."""
    pytest.importorskip("mistral_common")
    from mistral_common.exceptions import MistralCommonException  # noqa: PLC0415  # an extra
    from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: PLC0415
    from mistral_common.protocol.instruct.validator import (  # noqa: PLC0415
        MistralRequestValidatorV5,
        ValidationMode,
    )

    validator = MistralRequestValidatorV5(mode=ValidationMode.finetuning)

    def is_taken(row: dict[str, Any]) -> bool:
        messages = [
            {key: value for key, value in one.items() if key != "weight"} for one in row["messages"]
        ]
        try:
            request: Any = ChatCompletionRequest.from_openai(messages, tools=row.get("tools"))
            validator.validate_request(request)
        except (MistralCommonException, ValueError, TypeError, KeyError):
            return False
        return True

    @given(rows(MISTRAL, "messages").filter(_has_no_images))
    @CALM
    def check_taken(row: dict[str, Any]) -> None:
        assert is_taken(row)

    @given(faulty_rows(MISTRAL).filter(lambda fault: fault.row.get("messages")))
    @CALM
    def check_refused(fault: Fault) -> None:
        if not is_taken(fault.row):
            assert judged(fault.row)

    check_taken()
    check_refused()


def _has_no_images(row: dict[str, Any]) -> bool:
    return "image_url" not in json.dumps(row)


# Classifiers


def targets(**loss: Any) -> list[ClassifierTarget]:
    return [
        ClassifierTarget(name=name, labels=("good", "bad"), loss_function=function)
        for name, function in loss.items()
    ]


@pytest.mark.parametrize(
    ("labels", "code"),
    [
        ({"mood": "good"}, None),
        ({"mood": ["good"]}, None),
        ({"mood": ["good", "bad"]}, "label_count"),
        ({"mood": "god"}, "unknown_label"),
        ({"modo": "good"}, "unknown_target"),
        ({"mood": ["good", "good"]}, "duplicate_label"),
    ],
)
def test_labels_are_held_against_the_targets(labels: dict[str, Any], code: str | None) -> None:
    """Targets, labels and how many of them must be those of the configuration."""
    found = judged({"text": "a", "labels": labels}, targets=targets(mood="single_class"))
    assert code in {one.code for one in found} if code else not found


def test_a_target_with_several_labels_takes_them() -> None:
    """A list is right where the loss is that of several classes."""
    for labels in (["good", "bad"], [], "good"):
        row = {"text": "a", "labels": {"mood": labels}}
        assert not judged(row, targets=targets(mood="multi_class"))
    finding = only({"text": "a", "labels": {"mood": ["good", "bad"]}}, targets=targets(mood=None))
    assert (finding.code, finding.severity) == ("label_count", "warning")


def test_a_target_that_a_row_leaves_out_is_a_warning() -> None:
    """A row may teach one of several targets."""
    row = {"text": "a", "labels": {"mood": "good"}}
    finding = only(row, targets=targets(mood="single_class", tone="single_class"))
    assert (finding.code, finding.severity) == ("missing_target", "warning")
    assert finding.field == "labels.tone"


# Preference pairs


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"input": None}, "missing_field", "input"),
        ({"input": {}}, "missing_field", "input.messages"),
        ({"input": {"messages": [], "tools": []}}, "empty_content", "input.messages"),
        ({"input": [USER]}, "wrong_type", "input"),
        ({"preferred_output": []}, "empty_content", "preferred_output"),
        ({"preferred_output": "a"}, "wrong_type", "preferred_output"),
        ({"non_preferred_output": [ANSWER]}, "same_answers", "non_preferred_output"),
        (
            {"preferred_output": [{"role": "assistant", "content": " "}]},
            "empty_content",
            "preferred_output[0].content",
        ),
    ],
)
def test_both_answers_to_a_prompt_must_be_there_and_differ(
    change: dict[str, Any], code: str, field: str
) -> None:
    """A pair needs a prompt and two answers."""
    finding = only({**PAIR, **change}, OPENAI)
    assert (finding.code, finding.field) == (code, field)


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"prompt": "a", "chosen": "b"}, "missing_field", "rejected"),
        ({"chosen": "b", "rejected": "c"}, "missing_field", "prompt"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty_content", "prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_answers", "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": [ANSWER]}, "wrong_type", "rejected"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER]}, "misplaced_role", None),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "no_assistant", "rejected"),
    ],
)
def test_pairs_in_trl_s_words_are_held_to_the_same(
    row: dict[str, Any], code: str, field: str | None
) -> None:
    """Texts, messages and whole conversations are pairs, too."""
    finding = only(row, LOCAL)
    assert finding.code == code
    assert field is None or finding.field == field


# Facts


def test_facts_say_what_the_rows_hold() -> None:
    """Turns, roles, tools, images, weights and labels are counted on the way."""
    rules = RowRules()
    made = [
        chat(USER, ANSWER),
        chat(USER, ANSWER, USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        chat(USER, CALLER, RESULT, ANSWER, tools=TOOLS),
        chat({"role": "user", "content": [{"type": "image_url", "image_url": PNG}]}, ANSWER),
        {"text": "a", "labels": {"mood": "good", "tone": ["warm", "short"]}},
        {"text": "a"},
        chat(USER),
    ]
    for row in made:
        rules.judge(line(row))
    facts = rules.facts
    assert facts.rows == {"instruct": 5, "classifier": 1, "pretrain": 1}
    assert facts.formats == {"messages": 5, "labels": 1, "text": 1}
    assert facts.turns == 15
    assert facts.roles == {"user": 7, "assistant": 7, "tool": 1}
    assert (facts.tool_rows, facts.tool_calls) == (1, 1)
    assert (facts.image_rows, facts.images, facts.weighted_rows) == (1, 1, 1)
    assert facts.labels == {("mood", "good"): 1, ("tone", "warm"): 1, ("tone", "short"): 1}
    assert facts.label_kinds == {("mood", "single"): 1, ("tone", "multi"): 1}
    assert rules.facts == facts


def test_facts_of_parts_add_up() -> None:
    """Parts that are judged apart, in any process, count as one file would."""
    made = [chat(USER, ANSWER), chat(USER, CALLER, tools=TOOLS), {"text": "a"}, chat(USER)]
    whole, first, second = RowRules(), RowRules(), RowRules()
    for row in made:
        whole.judge(line(row))
    for row in made[:2]:
        first.judge(line(row))
    for row in made[2:]:
        second.judge(line(row))
    facts = pickle.loads(pickle.dumps(first.facts))
    facts.merge(second.facts)
    assert facts == whole.facts


def test_facts_can_be_begun_anew() -> None:
    """Rules are used again for the next part, which counts apart."""
    rules = RowRules()
    rules.judge(line(chat(USER, ANSWER)))
    first = rules.facts
    second = Facts()
    rules.facts = second
    rules.judge(line(chat(USER, ANSWER, USER, ANSWER)))
    assert rules.facts is second
    assert (first.turns, second.turns) == (2, 4)


def test_many_ways_to_speak_are_not_all_remembered() -> None:
    """Memory stays small for rows that are all different; they are judged all the same."""
    rules = RowRules()
    roles = [USER, ANSWER]
    for number in range(1, 300):
        turns = [roles[(number >> bit) & 1] for bit in range(9)] * 20
        rules.judge(line(chat(USER, *turns, ANSWER)))
    facts = rules.facts
    assert facts.rows["instruct"] == 299
    assert facts.turns == 299 * 182


@pytest.mark.parametrize(
    ("facts", "provider_format", "codes"),
    [
        (Facts(), MISTRAL, ["too_few_rows"]),
        ({"instruct": 9}, OPENAI, ["too_few_rows"]),
        ({"instruct": 10}, OPENAI, []),
    ],
)
def test_a_file_needs_enough_rows(
    facts: Any, provider_format: ProviderFormat, codes: list[str]
) -> None:
    """How many rows a file must have is up to the provider format."""
    made = facts if isinstance(facts, Facts) else Facts()
    made.rows.update({} if facts is made else facts)
    assert [one.code for one in file_findings(made, provider_format)] == codes


def test_a_file_labels_and_writes_its_rows_in_one_way() -> None:
    """Two ways to write the same kind of row are told once for the file."""
    rules = RowRules(TOGETHER)
    rules.judge(line(chat(USER, ANSWER)))
    rules.judge(line({"prompt": "a", "completion": "b"}))
    assert [one.code for one in file_findings(rules.facts, TOGETHER)] == ["mixed_formats"]
    rules = RowRules(MISTRAL)
    for label in ("good", ["good"]):
        rules.judge(line({"text": "a", "labels": {"mood": label}}))
    assert told(list(file_findings(rules.facts, MISTRAL))) == [
        ("mixed_labels", "labels.mood", "warning")
    ]


# What is meant by rows of other kinds


@pytest.mark.parametrize("weight", ["1", "1.0", "0.0", "1e0"])
@ALL
def test_a_weight_may_be_written_as_a_float(provider_format: ProviderFormat, weight: str) -> None:
    """Tables make floats of whole numbers; 0.5 and true are no weights."""
    answer = b'{"role":"assistant","content":"It is.","weight":%s}'
    text = b'{"messages":[{"role":"user","content":"Is it?"},%s,%s]}'
    more = b'{"role":"user","content":"Is it?"},{"role":"assistant","content":"It is."}'
    row = text % (answer % weight.encode(), more)
    assert RowRules(provider_format).judge(row) == ("instruct", ())
    assert RowFaults(provider_format).describe(row, Facts()) == ("instruct", ())
    for wrong in (b"0.5", b"true", b"2.0"):
        row = text % (answer % wrong, more)
        assert told(RowRules(provider_format).judge(row)[1]) == [
            ("bad_weight", "messages[1].weight", "error")
        ]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ('{"messages": [], "messages": [{"role":"user","content":"a"},%s]}', "messages"),
        ('{"messages": [{"role":"user","content":"a"},%s], "messages": []}', "messages"),
        ('{"messages": [{"role":"user","content":"a","content":"b"},%s]}', "content"),
        ('{"messages": [{"role":"user","content":"a","role":"user"},%s]}', "role"),
        ('{"messages": [{"role":"user","content":"a"},%s],"tools":[],"tools":[]}', "tools"),
        ('{"text": "a", "text": "b"}', "text"),
        ('{"text": "a", "labels": {"topic": "x", "topic": "y"}}', "topic"),
    ],
)
def test_a_key_that_occurs_twice_is_an_error(row: str, key: str) -> None:
    """Its first value would be lost without a word, also in rows with nothing else wrong."""
    answer = json.dumps(ANSWER)
    text = (row % answer if "%s" in row else row).encode()
    found = RowRules(LOCAL).judge(text)[1]
    assert f"duplicate key {key!r}" in [one.message for one in found]
    assert ("duplicate_key", None, "error") in told(found)


@given(st.text(), st.text())
@CALM
def test_words_that_look_like_keys_are_no_keys(question: str, answer: str) -> None:
    """Quotes inside of a text are escaped, whatever it quotes."""
    quoted = '"role": "content" "messages" '
    row = chat(
        {"role": "user", "content": quoted + question}, dict(ANSWER, content=answer + quoted)
    )
    assert judged(row) == ()
    assert judged(chat({"role": "user", "content": 'say "role'}, ANSWER)) == ()


def test_a_text_with_a_label_is_a_row_of_a_classifier() -> None:
    """What was meant is said, and how to write it; the label is not dropped."""
    finding = only({"text": "Where is it?", "label": "spam"}, LOCAL)
    assert told([finding]) == [("unknown_format", "label", "error")]
    assert '"labels": {"TARGET": "spam"}' in str(finding.fix)
    assert "remove `label`" in str(finding.fix)


@ALL
def test_alpaca_is_recognised_beside_a_text(provider_format: ProviderFormat) -> None:
    """The original Alpaca file has the three parts and a text made of them."""
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Add. 1, 2: 3"}
    assert "Alpaca" in str(only(row, provider_format).fix)


def test_a_prompt_beside_complete_conversations_is_to_be_removed() -> None:
    """UltraFeedback has the prompt as a string and again in both answers."""
    user = {"role": "user", "content": "Is it far?"}
    good, bad = (dict(ANSWER, content=text) for text in ("Two stops.", "Yes."))
    row = {"prompt": "Is it far?", "chosen": [user, good], "rejected": [user, bad]}
    assert only(row, LOCAL).fix == "remove `prompt`"
    row = {"prompt": "Is it far?", "chosen": [good], "rejected": [bad]}
    assert "write it as messages" in str(only(row, LOCAL).fix)


def test_a_comma_after_a_row_is_named() -> None:
    """Rows cut out of an array still have theirs."""
    row = json.dumps(chat(USER, ANSWER)).encode()
    (finding,) = RowRules().judge(row + b",\n")[1]
    assert finding.message == f"invalid JSON: trailing comma at column {len(row) + 1}"
    assert finding.fix == "remove the comma"
