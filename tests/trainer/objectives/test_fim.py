"""Texts whose middle is learnt from both ends: where they are cut, which tokens they become."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.fim.request import FIMRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training_backends.tokens.encoders import (
    ByteEncoder,
    Encoder,
    MistralEncoder,
    TemplateEncoder,
    TokenizerError,
)
from training_backends.tokens.examples import ExampleReader, cut_out

DATA = Path(mistral_common.__file__).parent / "data"
SMALL = "mistral_instruct_tokenizer_240323.model.v3"
CODE = "def add(a, b):\n    return a + b\n"


@given(st.text(max_size=30), st.integers())
def test_a_text_is_cut_in_three(text: str, seed: int) -> None:
    """Nothing is lost, and the same chance cuts at the same places."""
    cut = cut_out(text, random.Random(seed))
    assert "".join(cut) == text
    assert cut == cut_out(text, random.Random(seed))


@pytest.mark.parametrize("name", ["tekken_240911.json", SMALL])
def test_mistral_asks_as_it_was_taught(name: str) -> None:
    """What comes before the middle is what mistral-common sends to have it filled in."""
    encoder = MistralEncoder(DATA / name)
    ids, trained = encoder.fill_in("def add(a, b):\n", "    return a", " + b\n")
    asking = MistralTokenizer.from_file(DATA / name)
    head = asking.encode_fim(FIMRequest(prompt="def add(a, b):\n", suffix=" + b\n")).tokens
    assert ids[: len(head)] == head
    pieces = [asking.instruct_tokenizer.tokenizer.id_to_piece(token) for token in ids]
    text = ids[pieces.index("[PREFIX]") + 1 :]
    assert encoder.decode(text) == "def add(a, b):\n    return a", "the middle goes right on"
    assert ids[-1] == encoder.eos_id
    controls = [piece for piece, counts in zip(pieces, trained, strict=True) if not counts]
    assert controls == ["<s>", "[SUFFIX]", "[PREFIX]"], "the loss counts all but these"


class Coder(NamedTuple):
    """A tokenizer, and the encoder over it."""

    tokenizer: PreTrainedTokenizerFast
    encoder: TemplateEncoder


def make_coder(directory: Path, specials: list[str]) -> Coder:
    """Make a byte-level tokenizer with control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", *specials])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.save_pretrained(directory)
    return Coder(made, TemplateEncoder("coder", directory))


@pytest.mark.parametrize(
    "specials",
    [
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ],
)
def test_other_models_have_their_own_tokens(tmp_path: Path, specials: list[str]) -> None:
    """Beginning, end, middle, each behind the model's token; text never becomes one."""
    tokenizer, encoder = make_coder(tmp_path, specials)
    ids, trained = encoder.fill_in("a", f"b{specials[0]}", "c")
    plain = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(plain) == f"{specials[0]}a{specials[1]}c{specials[2]}b{specials[0]}<end>"
    assert ids.count(tokenizer.convert_tokens_to_ids(specials[0])) == 1
    assert [token for token, counts in zip(plain, trained, strict=True) if not counts] == specials


def test_a_model_without_the_tokens_is_refused_by_name(tmp_path: Path) -> None:
    """Not trained on whole texts instead."""
    encoders: list[tuple[Encoder, str]] = [
        (ByteEncoder(), "tiny-mistral"),
        (make_coder(tmp_path, []).encoder, "'coder'"),
    ]
    for encoder, name in encoders:
        with pytest.raises(TokenizerError, match=f"{name} has no fill-in-the-middle tokens"):
            ids_of(ExampleReader(encoder, 100, fim_ratio=1.0), {"text": CODE}, "p")


def ids_of(reader: ExampleReader, row: dict[str, Any], place: str) -> list[int]:
    """Encode a row."""
    [example] = reader.read(json.dumps(row).encode(), place).examples
    return example.sequences[0].ids


def test_which_texts_and_where_depends_on_seed_and_place(tmp_path: Path) -> None:
    """The share is the ratio; chats stay as they are."""
    tokenizer, encoder = make_coder(tmp_path, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    token = tokenizer.convert_tokens_to_ids("<fim_middle>")
    places = [f"train/0/{n}" for n in range(200)]
    half = ExampleReader(encoder, 100, fim_ratio=0.5, seed=1)
    rows = [ids_of(half, {"text": CODE}, place) for place in places]
    assert rows == [ids_of(half, {"text": CODE}, place) for place in places]
    assert 70 < sum(token in ids for ids in rows) < 130
    assert len({tuple(ids) for ids in rows if token in ids}) > 50, "cut at many places"
    other = ExampleReader(encoder, 100, fim_ratio=0.5, seed=2)
    assert rows != [ids_of(other, {"text": CODE}, place) for place in places]
    mistral = MistralEncoder(DATA / SMALL)
    always = ExampleReader(mistral, 100, fim_ratio=1.0)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert ids_of(always, chat, "p") == ids_of(ExampleReader(mistral, 100), chat, "p")


def test_a_long_text_is_shortened_before_it_is_cut(tmp_path: Path) -> None:
    """The middle stands last and would be what is lost; here the row ends as all do."""
    tokenizer, encoder = make_coder(tmp_path, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    reader = ExampleReader(encoder, 64, fim_ratio=1.0)
    text = "".join(chr(97 + n % 26) for n in range(999))
    for number in range(20):
        [example], cut = reader.read(json.dumps({"text": text}).encode(), str(number))
        ids = example.sequences[0].ids
        assert cut
        assert 50 < len(ids) <= 64
        assert ids[-1] == encoder.eos_id
        prefix, rest = tokenizer.decode(ids).split("<fim_suffix>")
        suffix, middle = rest.removesuffix("<end>").split("<fim_middle>")
        assert text.startswith(prefix.removeprefix("<fim_prefix>") + middle + suffix)
