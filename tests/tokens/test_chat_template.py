"""Chat templates of open models: what is trained is what they render, and nothing is lost."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from training_backends.datasets.rows import ChatRow, Message, parse_row
from training_backends.tokens import row_counter
from training_backends.tokens.chat_template import ChatRenderer, Conversation, RejectedByTemplate
from training_backends.tokens.counts import AnyRow
from training_backends.tokens.encoders import Encoded, TemplateEncoder, UnusableRow
from training_backends.tokens.tokenizers import TokenizerSettings

families: Any = import_module("benchmarks._template_families")
PAIRS = [(family, case) for family in families.FAMILIES for case in families.CASES]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a byte-level tokenizer for each family's template."""
    folder = tmp_path_factory.mktemp("families")
    return {
        family: families.family_directory(family, folder / family) for family in families.FAMILIES
    }


def parsed(row: dict[str, Any]) -> ChatRow:
    """Decode a row with its own JSON."""
    found = parse_row(json.dumps(row).encode(), keep_source=True)
    assert isinstance(found, ChatRow)
    return found


def in_loss(encoder: TemplateEncoder, examples: list[Encoded]) -> list[str]:
    """Return the texts in the loss, with their control tokens."""
    texts = []
    for ids, trained in examples:
        stretch: list[int] = []
        for token, is_trained in zip([*ids, 0], [*trained, False], strict=True):
            if is_trained:
                stretch.append(token)
            elif stretch:
                texts.append(encoder.decode(stretch, keep_controls=True))
                stretch = []
    return texts


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_the_answers_in_the_loss_are_those_of_the_row(
    directories: dict[str, Path], family: str, case: str
) -> None:
    """Parsed back from the text: reasoning, content, function and arguments; or a reason."""
    row = families.CASES[case]
    encoder = TemplateEncoder(family, directories[family])
    if case in families.REJECTED.get(family, ()):
        with pytest.raises(UnusableRow, match="template"):
            encoder.encode(parsed(row))
        return
    examples = encoder.encode(parsed(row))
    answers = [message for message in row["messages"] if message["role"] == "assistant"]
    assert len(examples) in {1, len(answers)}
    for answer, text in zip(answers, in_loss(encoder, examples), strict=True):
        if "tool_calls" in answer:
            function = answer["tool_calls"][0]["function"]
            called = (function["name"], json.loads(function["arguments"]))
            assert families.parse_call(text) == called
        else:
            expected = (answer.get("reasoning_content", ""), answer["content"])
            assert families.parse_answer(text) == expected
        assert any(
            text.endswith(encoder.decode([end], keep_controls=True)) for end in encoder.end_ids
        )


@pytest.mark.parametrize("family", families.FAMILIES)
def test_templates_are_rendered_as_transformers_does(
    directories: dict[str, Path], family: str
) -> None:
    """The same text, which servers ask with."""
    served = AutoTokenizer.from_pretrained(directories[family])
    template = ChatRenderer(TokenizerSettings.read(directories[family]))
    compared = 0
    for row in families.CASES.values():
        given = [dict(message) for message in row["messages"]]
        for message in given:
            if "tool_calls" in message:
                message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
            if family in PARTS_ONLY and "content" in message:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            ours = template.text(Conversation.of(parsed({**row, "messages": given})))
            theirs = served.apply_chat_template(given, tools=row.get("tools"), tokenize=False)
        except Exception:  # a template that takes another form, or rejects the row
            continue
        assert ours == theirs
        compared += 1
    assert compared >= 2


PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.loads(function["arguments"])
    return {**call, "function": {**function, "arguments": arguments}}


turns = st.lists(
    st.tuples(
        st.text("ab \n😀é{}", max_size=8), st.text("ab \n<é{", max_size=8), st.sampled_from([0, 1])
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3", "gptoss", "glm4moe", "phi3"])
def served(
    directories: dict[str, Path], request: pytest.FixtureRequest
) -> tuple[TemplateEncoder, ChatRenderer, Callable[[AnyRow], int]]:
    """An encoder, its template and its counter."""
    directory = directories[request.param]
    count = row_counter(str(directory))
    assert count is not None
    template = ChatRenderer(TokenizerSettings.read(directory))
    return TemplateEncoder(request.param, directory), template, count


@settings(max_examples=10, deadline=None)
@given(turns=turns)
def test_answers_follow_the_prompt_that_is_served(
    served: tuple[TemplateEncoder, ChatRenderer, Callable[[AnyRow], int]],
    turns: list[tuple[str, str, int]],
) -> None:
    """Every answer in the loss follows the tokens of its generation prompt; counts agree."""
    encoder, template, count = served
    messages = [
        message
        for question, answer, weight in turns
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "weight": weight},
        )
    ]
    row = parsed({"messages": messages})
    examples = encoder.encode(row)
    assert count(row) == sum(len(example.ids) for example in examples)
    starts = [
        encoder.decode(example.ids[:place], keep_controls=True)
        for example in examples
        for place, is_trained in enumerate(example.trained)
        if is_trained and not example.trained[place - 1]
    ]
    asked = [2 * place + 1 for place, (_, _, weight) in enumerate(turns) if weight]
    assert starts == [template.prompt(messages[:place]) for place in asked]


ROW: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Rain?", "extra": [1]},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "123456789", "function": {"arguments": {"b": 1, "a": None}, "name": "f"}}
            ],
        },
    ],
    "tools": [{"function": {"strict": True, "name": "f"}, "type": "function"}],
}
JSON_TEMPLATE = (
    "{% for m in messages %}{{ m|tojson }}<|im_end|>{% endfor %}{{ tools|tojson }}"
    "{% if add_generation_prompt %}{% endif %}"
)


def with_template(template: str) -> ChatRenderer:
    """Compile a template for a tokenizer with two control tokens."""
    controls = frozenset({"</s>", "<|im_end|>"})
    named = {"eos_token": "</s>"}
    return ChatRenderer(TokenizerSettings(named, controls, {}, frozenset()), template)


def rendered(template: str, row: dict[str, Any]) -> str:
    """Return what a template makes of a row."""
    return with_template(template).text(Conversation.of(parsed(row)))


def test_a_template_is_given_the_rows_own_json() -> None:
    """Keys keep their order, none is added and none is dropped, except the weight."""
    row = json.loads(json.dumps(ROW))
    row["messages"][0]["weight"] = 0
    expected = "<|im_end|>".join([*map(json.dumps, ROW["messages"]), json.dumps(ROW["tools"])])
    assert rendered(JSON_TEMPLATE, row) == expected


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        ("{{ a|tojson }}", '{"x": 1}', '{"x": 1}'),
        ("{{ a|tojson }}", {"x": 1}, '{"x": 1}'),
        ("{{ a }}", '{"x":1}', '{"x":1}'),
        ("{{ a }}", {"x": "é"}, '{"x": "é"}'),
        ("{{ '!' + a }}", '{"x":1}', '!{"x":1}'),
        ("{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}", '{"x": 1}', "x=1"),
    ],
)
def test_arguments_are_given_in_the_form_that_the_template_takes(
    template: str, arguments: Any, expected: str
) -> None:
    """As an object, or as its JSON where an object would be written in Python's notation."""
    find = "{% for m in messages if m.tool_calls %}{% set a = m.tool_calls[0].function.arguments %}"
    whole = f"{find}{template}{{% endfor %}}"
    row = json.loads(json.dumps(ROW))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = arguments
    assert rendered(whole, row) == expected


PLAIN = (
    "{{ '<s>' + (tools|tojson if tools else '') }}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content or '' }}{{ m.tool_calls|tojson if m.tool_calls else '' }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ANSWER: dict[str, Any] = {"role": "assistant", "content": "b"}


THOUGHT = {**ANSWER, "reasoning_content": "r"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("shown", "left_out", "changes", "field"),
    [
        ("if tools", "if false", {}, "tools"),
        ("if m.tool_calls", "if false", {}, "messages[1].tool_calls[0]"),
        (
            "m.content",
            "(m.content if m.role != 'system')",
            {"messages": [SYSTEM, ROW["messages"][0], ANSWER]},
            "messages[0].content",
        ),
        (
            "<s>",
            "<s>",
            {"messages": [ROW["messages"][0], THOUGHT]},
            "messages[1].reasoning_content",
        ),
    ],
)
def test_what_a_template_leaves_out_is_an_error(
    shown: str, left_out: str, changes: dict[str, Any], field: str
) -> None:
    """Tools, a call, a system message, reasoning: the field is named."""
    row = Conversation.of(parsed({**ROW, **changes}))
    with pytest.raises(RejectedByTemplate) as caught:
        with_template(PLAIN.replace(shown, left_out)).examples(row)
    assert (
        str(caught.value)
        == f"{field}: the chat template leaves it out (remove it, or set chat_template)"
    )


def test_a_part_of_an_answer_that_is_left_out_is_an_error() -> None:
    """Some templates drop what an answer thinks, whether or not it is the last one."""
    template = PLAIN.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
    answer = {"role": "assistant", "content": "<think>c</think>b"}
    row = Conversation.of(parsed({"messages": [ROW["messages"][0], answer]}))
    with pytest.raises(RejectedByTemplate, match=r"messages\[1\].content.*leaves out a part"):
        with_template(template).examples(row)


def test_the_table_of_the_documentation_is_true() -> None:
    """What becomes of each case is what the page says."""
    script: Any = import_module("benchmarks.templates")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_table(page) == page


def test_a_template_of_ones_own_chooses_how_answers_are_asked_for(
    directories: dict[str, Path],
) -> None:
    """The line that the documentation gives: a reasoning model is asked without reasoning."""
    directory = directories["nemotron_3_nano"]
    line = "{%- set enable_thinking = enable_thinking | default(false) -%}\n"
    template = line + (directory / "chat_template.jinja").read_text(encoding="utf-8")
    encoder = TemplateEncoder("nemotron", directory, template)
    row = families.CASES["multi-turn"]
    [example] = encoder.encode(parsed(row))
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    assert in_loss(encoder, [example]) == [f"{answer}<|im_end|>" for answer in answers]
    asked = encoder.decode(encoder.prompt(ChatRow([Message("user", "a")])), keep_controls=True)
    assert asked.endswith("user\na<|im_end|>\n<|im_start|>assistant\n<think></think>")


def test_an_answer_that_nothing_ends_is_given_the_end_of_the_text() -> None:
    """Also an empty one, behind the control token of its prompt; each is an example of its own."""
    template = (
        "{% for m in messages %}{{ '<|im_end|>' if m.role == 'assistant' }}{{ m.content }}"
        "{% endfor %}{{ '<|im_end|>' if add_generation_prompt }}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}] * 2
    examples = with_template(template).examples(Conversation.of(parsed({"messages": turns})))
    texts = [text[:start] + "|" + text[start:end] for text, [(start, end)] in examples]
    assert texts == ["a<|im_end|>|</s>", "a<|im_end|>a<|im_end|>|</s>"]
