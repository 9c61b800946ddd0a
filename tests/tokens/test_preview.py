"""A preview has what the trainer trains on: texts, tokens, what is in the loss, and rejections."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from training_backends.core.config import TrainingConfig
from training_backends.core.errors import ConfigError
from training_backends.tokens.encoders import TemplateEncoder
from training_backends.tokens.examples import ExampleReader
from training_backends.tokens.preview import PreviewExample, preview

families: Any = import_module("benchmarks._template_families")


def question(text: str) -> list[dict[str, str]]:
    """Return a question with its answer."""
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Two stops."}]


PAIR = {"prompt": "Far?", "chosen": "No.", "rejected": "Yes."}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tokenizer and the template of a model that rewrites earlier answers."""
    directory: Path = families.family_directory("qwen3", tmp_path / "model")
    return directory


def shown(tmp_path: Path, *rows: Any, **fields: Any) -> list[PreviewExample]:
    """Preview rows of a file."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainingConfig.model_validate({"data": {"train": data}, **fields})
    return [*preview(config)]


def test_text_and_tokens_are_the_trainers(tmp_path: Path, model: Path) -> None:
    """Segments are the encoder's examples, one for each answer of a template that rewrites."""
    row = {"messages": question("Far?") * 2}
    examples = shown(tmp_path, row, model=str(model))
    reader = ExampleReader(TemplateEncoder("model", model), 1000)
    encoded, _ = reader.supervised(json.dumps(row).encode(), "")
    assert [each.token_ids for each in examples] == [tuple(each.ids) for each in encoded]
    assert [(each.line, each.example, each.examples) for each in examples] == [(1, 1, 2), (1, 2, 2)]
    for example, expected in zip(examples, encoded, strict=True):
        assert example.trained_tokens == sum(expected.trained)
        assert example.tokens == len(expected.ids)
        prompt, answer = example.segments
        assert (prompt.trained, answer.trained) == (False, True)
        assert prompt.text.endswith("<|im_start|>assistant\n")
        assert answer.text == "<think>\n\n</think>\n\nTwo stops.<|im_end|>"
        assert prompt.tokens + answer.tokens == example.tokens


def test_a_rejected_row_has_its_reason(tmp_path: Path, model: Path) -> None:
    """The rows after it are shown all the same."""
    row = {"messages": question("<|im_end|>")}
    rejected, fine = shown(tmp_path, row, {"messages": question("Far?")}, model=str(model))
    assert (rejected.examples, rejected.segments, rejected.line) == (0, (), 1)
    assert rejected.reason == "the text contains the control token <|im_end|> (remove it)"
    assert (fine.reason, fine.line) == (None, 2)


def test_long_examples_are_cut_as_in_training(tmp_path: Path) -> None:
    """The first token is never in the loss, because it is not predicted."""
    settings = {"hyperparameters": {"seq_len": 100}}
    (example,) = shown(tmp_path, {"text": "x" * 150}, model="tiny-mistral", **settings)
    assert (example.tokens, example.truncated, example.trained_tokens) == (100, True, 99)
    assert [segment.text for segment in example.segments] == ["<s>", "x" * 99]


def test_both_answers_of_a_pair_are_shown(tmp_path: Path) -> None:
    """Chosen and rejected follow the same prompt, which is not in the loss."""
    chosen, rejected = shown(tmp_path, PAIR, model="tiny-mistral", method="dpo")
    assert (chosen.part, rejected.part) == ("chosen", "rejected")
    assert [segment.text for segment in chosen.segments] == ["<s>[INST]Far?[/INST]", "No.</s>"]
    assert rejected.segments[0] == chosen.segments[0]


@pytest.mark.parametrize(
    ("model_name", "text"),
    [
        ("open-mistral-7b", "<s>[INST]Far?[/INST]"),
        ("mistral-large-2411", "<s>[INST]Far?[/INST]"),
        ("ministral-8b-latest", "<s>[INST]Far?[/INST]"),
    ],
)
def test_hosted_models_are_shown_with_their_tokenizers(
    tmp_path: Path, model_name: str, text: str
) -> None:
    """Those that the wheel of mistral-common ships."""
    (example,) = shown(tmp_path, {"messages": question("Far?")}, model=model_name)
    assert [segment.text for segment in example.segments] == [text, "Two stops.</s>"]


def test_an_unknown_tokenizer_is_an_error(tmp_path: Path) -> None:
    """Nothing is guessed, and the field is named."""
    with pytest.raises(ConfigError) as caught:
        shown(tmp_path, {"messages": question("Far?")}, model="nobody/knows-this")
    assert caught.value.issues[0].field == "model"


def test_a_preview_loads_no_torch(tmp_path: Path, model: Path) -> None:
    """It is shown in a second, on machines without a GPU."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"messages": question("Far?")}))
    script = (
        "import sys\n"
        "from training_backends.core.config import TrainingConfig\n"
        "from training_backends.tokens.preview import preview\n"
        f"config = TrainingConfig.model_validate({{'model': {str(model)!r}, "
        f"'data': {{'train': {str(data)!r}}}}})\n"
        "assert len([*preview(config)]) == 1\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
