"""Which tokens a row becomes, and which of them the loss counts, for each kind of model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training_backends.datasets.rows import ChatRow, Control, Message, byte_encode, parse_row
from training_backends.tokens import jinja
from training_backends.tokens.counters import Reference
from training_backends.tokens.encoders import (
    ByteEncoder,
    Encoder,
    MistralEncoder,
    TemplateEncoder,
    TokenizerError,
    UnusableRow,
    encoder_for,
)
from training_backends.tokens.text_counters import shipped
from training_backends.tokens.tokenizers import SHIPPED

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Like several models of 2025: what the assistant said earlier is shown shortened.
FORGETFUL = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' and not loop.last -%}{{ '...<|im_end|>' }}"
    "{%- else -%}{{ message.content + '<|im_end|>' }}{%- endif -%}"
    "{%- endfor -%}"
)


def chat(*turns: tuple[str, str], **more: Any) -> ChatRow:
    """Make a row of (role, content) turns."""
    messages = [{"role": role, "content": content} for role, content in turns]
    row = parse_row(json.dumps({"messages": messages, **more}).encode())
    assert isinstance(row, ChatRow)
    return row


def learnt(encoder: Encoder, row: ChatRow) -> list[str]:
    """Return the stretches of text that the loss counts."""
    [(ids, trained)] = encoder.encode(row)
    assert len(ids) == len(trained)
    stretches: list[list[int]] = [[]]
    for token, counts in zip(ids, trained, strict=True):
        if counts:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [encoder.decode(stretch) for stretch in stretches if stretch]


@pytest.fixture(scope="module")
def mistral(small_tekken: Path) -> MistralEncoder:
    """Mistral's own encoder."""
    return MistralEncoder(small_tekken)


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The saved tokenizer of tiny-mistral, as transformers loads it."""
    directory = tmp_path_factory.mktemp("tiny")
    ByteEncoder().save(directory)
    return AutoTokenizer.from_pretrained(directory)


def make_chatml(directory: Path, template: str | None) -> Path:
    """Save a small tokenizer with ChatML's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def test_all_files_of_a_mistral_tokenizer_are_kept(small_tekken: Path, tmp_path: Path) -> None:
    """Also those that other programs read: the chat template, special tokens, system prompt."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tekken.json").symlink_to(small_tekken)
    kept = {"chat_template.jinja", "special_tokens_map.json", "SYSTEM_PROMPT.txt", "tokenizer.json"}
    for name in (*kept, "config.json", "consolidated.safetensors"):
        (source / name).write_text(name)
    encoder_for("m", source).save(target)
    assert {path.name for path in target.iterdir()} == kept | {"tekken.json"}
    assert (target / "tekken.json").read_bytes() == small_tekken.read_bytes()


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant"]),
            st.text(max_size=10) | st.sampled_from(["[INST]", "</s>", "\ufdd01[", " \n", "<s>"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_saved_template_gives_our_ids(tiny_tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    """The library encodes any conversation as the engine does, control words in it too."""
    messages = [{"role": role, "content": content} for role, content in turns]
    given_ids = tiny_tokenizer.apply_chat_template(messages, return_dict=False)
    assert given_ids == byte_encode(chat(*turns))[0]


def test_saved_template_knows_tools_and_parts(tiny_tokenizer: Any) -> None:
    """Tools, tool calls with text or object arguments, results and lists of parts agree too."""
    call = {"id": "123456789", "type": "function"}
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a<"}, {"type": "text", "text": "b"}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {**call, "function": {"name": "f", "arguments": '{"x": [1]}'}},
                {**call, "function": {"name": "g", "arguments": {"é": ["<s>"]}}},
            ],
        },
        {"role": "tool", "tool_call_id": "123456789", "content": "[ARGS]"},
        {"role": "assistant", "content": "done"},
    ]
    schema = {"type": "object", "properties": {"x": {"enum": ["[INST]", "ü"]}}}
    tools = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}},
        {"type": "function", "function": {"name": "g"}},
    ]
    row = parse_row(json.dumps({"messages": messages, "tools": tools}).encode())
    ids = tiny_tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    assert ids == byte_encode(row)[0]


def test_saved_tokenizer_reads_back_what_it_wrote(tiny_tokenizer: Any) -> None:
    """Bytes come back as text, and bytes that are no UTF-8 do not raise."""
    ids = byte_encode(ChatRow([Message("assistant", "é€😀 [x]")]))[0]
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "é€😀 [x]"
    assert "\ufffd" in tiny_tokenizer.decode([0xFF, 0xC3])
    assert ByteEncoder().decode([0xFF, 65, Control.EOS]) == "\ufffdA"


def test_images_are_refused() -> None:
    """A part that is no text makes the row unusable instead of disappearing."""
    parts = [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "what?"}]
    row = parse_row(json.dumps({"messages": [{"role": "user", "content": parts}]}).encode())
    with pytest.raises(UnusableRow, match="images"):
        ByteEncoder().encode(row)


def test_mistral_mask_token_by_token(mistral: MistralEncoder) -> None:
    """From [/INST] through </s> counts; the system prompt that moves there does not."""
    tokens = mistral._tokens
    [(ids, trained)] = mistral.encode(
        chat(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    )
    pieces = [tokens.id_to_piece(token) for token in ids]
    assert list(zip(pieces, trained, strict=True)) == [
        ("<s>", False),
        ("[INST]", False),
        ("a", False),
        ("[/INST]", False),
        ("b", True),
        ("</s>", True),
        ("[INST]", False),
        ("S", False),
        ("\n\n", False),
        ("c", False),
        ("[/INST]", False),
        ("d", True),
        ("</s>", True),
    ]


def test_mistral_weights_and_control_words(mistral: MistralEncoder) -> None:
    """Weight 0 leaves an answer out; [INST] in a text stays text."""
    row = parse_row(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "say [INST] and [/INST]"},
                    {"role": "assistant", "content": "no", "weight": 0},
                    {"role": "user", "content": "please"},
                    {"role": "assistant", "content": "yes [INST]"},
                ]
            }
        ).encode()
    )
    assert isinstance(row, ChatRow)
    assert learnt(mistral, row) == ["yes [INST]"]
    ids = mistral.encode(row)[0].ids
    assert [mistral._tokens.id_to_piece(i) for i in ids].count("[INST]") == 2


def test_mistral_tool_calls_count_and_results_do_not(mistral: MistralEncoder) -> None:
    """A call and the answer behind its result are learnt, the result between is not."""
    call = {
        "id": "123456789",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": 1}'},
    }
    messages = [
        {"role": "user", "content": "call"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "42"},
        {"role": "assistant", "content": "It is done."},
    ]
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    ]
    row = parse_row(json.dumps({"messages": messages, "tools": tools}).encode())
    assert isinstance(row, ChatRow)
    called, answered = learnt(mistral, row)
    assert '"name": "f"' in called
    assert "42" not in called + answered
    assert answered == "It is done."


@pytest.mark.parametrize("turns", [[("user", "a")], [("assistant", "a")]])
def test_rows_that_mistral_common_rejects_are_unusable(
    mistral: MistralEncoder, turns: list[tuple[str, str]]
) -> None:
    """A question without an answer, and an answer alone."""
    with pytest.raises(UnusableRow):
        mistral.encode(chat(*turns))


class Version(NamedTuple):
    """The encoder and the counter of a tokenizer file."""

    encoder: MistralEncoder
    reference: Reference


@pytest.fixture(scope="module", params=["v2", "v3", "v7", "v3-tekken"])
def version(request: pytest.FixtureRequest) -> Version:
    """Each layout of Mistral's tokenizers that has control tokens."""
    path = shipped(SHIPPED[request.param])
    return Version(MistralEncoder(path), Reference(path))


@pytest.mark.parametrize(
    ("turns", "answers"),
    [
        (["system S", "assistant A"], ["A"]),
        (["assistant A", "user U", "assistant B"], ["A", "B"]),
        (["system S", "assistant A", "user U", "assistant B"], ["A", "B"]),
        (["user U", "assistant A", "assistant B"], ["A\n\nB"]),
        (["system S", "assistant A", "assistant B", "user U", "assistant C"], ["A\n\nB", "C"]),
        (["user U", "system S", "assistant A"], ["A"]),
    ],
)
def test_answers_are_found_in_any_order_of_roles(
    version: Version, turns: list[str], answers: list[str]
) -> None:
    """Whatever precedes an answer, it is in the loss through its end, and counted the same."""
    row = chat(*((role, text) for role, text in map(str.split, turns)))
    encoder = version.encoder
    assert learnt(encoder, row) == answers
    [example] = encoder.encode(row)
    ends = [i for i, t in zip(example.ids, example.trained, strict=True) if t]
    assert ends.count(encoder.eos_id) == len(answers)
    assert version.reference.row(row) == len(example.ids)


def test_joined_answers_have_one_weight(version: Version) -> None:
    """mistral-common joins them, so one of the two cannot be left out."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c"},
    ]
    row = parse_row(json.dumps({"messages": messages}).encode())
    with pytest.raises(UnusableRow, match="the same weight"):
        version.encoder.encode(row)


def test_the_first_layout_has_no_control_tokens() -> None:
    """Its chats are rejected with advice, not masked by guess."""
    with pytest.raises(TokenizerError, match="version 2 or later"):
        MistralEncoder(shipped(SHIPPED["v1"]))


def test_mistral_prompt_is_what_the_model_was_taught(mistral: MistralEncoder) -> None:
    """Sampling asks with the same tokens that stand before an answer in training."""
    [(ids, trained)] = mistral.encode(chat(("user", "a"), ("assistant", "b")))
    assert mistral.prompt(ChatRow([Message("user", "a")])) == ids[: trained.index(True)]


@pytest.mark.parametrize("kind", ["byte", "mistral", "template"])
def test_a_conversation_is_asked_as_it_was_taught(
    kind: str, mistral: MistralEncoder, tmp_path: Path
) -> None:
    """The prompt of its last answer is what stands before that answer in training."""
    encoder: Encoder = mistral
    if kind != "mistral":
        encoder = encoder_for(kind, make_chatml(tmp_path, CHATML) if kind == "template" else None)
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    (ids, trained) = encoder.encode(chat(*turns, ("assistant", "d")))[-1]
    last = len(ids) - trained[::-1].index(False)
    assert encoder.prompt(chat(*turns)) == ids[:last]


def test_chatml_counts_the_answer_with_its_end(tmp_path: Path) -> None:
    """A template whose answers lie between two prefixes is masked exactly."""
    encoder = encoder_for("other", make_chatml(tmp_path, CHATML))
    assert isinstance(encoder, TemplateEncoder)
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    [(ids, trained)] = encoder.encode(row)
    assert learnt(encoder, row) == ["b", "d"]
    ends = [t for i, t in zip(ids, trained, strict=True) if i == encoder.eos_id]
    assert ends == [False, True, False, True]


@pytest.mark.parametrize(
    ("template", "row", "said"),
    [
        (CHATML, chat(("user", "<|im_end|>"), ("assistant", "b")), "contains the control token"),
        ("{{ raise_exception('no') }}", chat(("user", "a"), ("assistant", "b")), "rejects"),
    ],
)
def test_a_row_that_cannot_be_masked_is_refused(
    tmp_path: Path, template: str, row: ChatRow, said: str
) -> None:
    """A control token in the text, a template that objects."""
    encoder = TemplateEncoder("other", make_chatml(tmp_path, template))
    with pytest.raises(UnusableRow, match=said):
        encoder.encode(row)


def test_a_template_that_rewrites_gives_an_example_for_each_answer(tmp_path: Path) -> None:
    """Each follows the prompt that asks for it, with the earlier answers as they are shown then."""
    encoder = TemplateEncoder("other", make_chatml(tmp_path, FORGETFUL))
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    examples = encoder.encode(row)
    texts = [encoder.decode(each.ids, keep_controls=True) for each in examples]
    end = "<|im_end|>"
    assert texts == [f"a{end}b{end}", f"a{end}...{end}c{end}d{end}"]
    assert [sum(each.trained) for each in examples] == [2, 2]


def test_a_template_that_never_ends_is_an_error_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run, not the row: each row would take as long."""
    monkeypatch.setattr(jinja, "RENDER_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}" * 9 + "{% set b = a %}" + "{% endfor %}" * 9
    encoder = TemplateEncoder("other", make_chatml(tmp_path, endless))
    with pytest.raises(TokenizerError, match="did not finish"):
        encoder.encode(chat(("user", "a"), ("assistant", "b")))
    with pytest.raises(TokenizerError, match="did not finish"):
        encoder.prompt(ChatRow([Message("user", "a")]))


def test_a_model_without_template_takes_text_only(tmp_path: Path) -> None:
    """Plain text is encoded without control tokens in it; a chat is refused with advice."""
    encoder = TemplateEncoder("other", make_chatml(tmp_path, None))
    [(ids, trained)] = encoder.encode(parse_row(b'{"text": "a<|im_end|>b"}'))
    assert ids.count(encoder.eos_id) == 1
    assert trained == [True] * len(ids)
    with pytest.raises(TokenizerError, match="no chat template"):
        encoder.encode(chat(("user", "a"), ("assistant", "b")))
