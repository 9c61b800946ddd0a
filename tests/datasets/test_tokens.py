"""Tokens are counted, never guessed; what cannot be counted says why."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_backends import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.datasets import tokens
from training_backends.datasets.chat import byte_encode, parse_row
from training_backends.datasets.inspect import inspect
from training_backends.datasets.tokens import count_tokens, tokenizer_of

MakeConfig = Callable[..., TrainingConfig]

MISTRAL = ("open-mistral-nemo", "v3-tekken")


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer}], **fields}


@pytest.fixture
def dataset(tmp_path: Path, make_config: MakeConfig) -> Callable[..., Dataset]:
    """Write rows to files, one list a file, and inspect them."""

    def make(*files: list[dict[str, Any]]) -> Dataset:
        paths = []
        for number, rows in enumerate(files):
            path = tmp_path / f"{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths.append(path)
        return inspect(make_config(data={"train": paths}))

    return make


def test_the_tiny_models_tokens_are_those_it_trains_on(dataset: Callable[..., Dataset]) -> None:
    """The count is what encoding every row gives, over all files."""
    rows = [chat("How?", "Like this, \u00e9t\u00e9."), {"text": "x" * 5}]
    count = count_tokens(dataset(rows[:1], rows[1:]), "tiny-mistral")
    expected = sum(len(byte_encode(parse_row(json.dumps(row).encode()))[0]) for row in rows)
    assert (count.data_tokens, count.basis, count.interval) == (expected, "exact", None)
    assert count.tokenizer == "bytes"


def test_validation_files_do_not_count(
    tmp_path: Path, train_file: Path, make_config: MakeConfig
) -> None:
    """Only what is trained on is counted."""
    validation = tmp_path / "validation.jsonl"
    validation.write_text(json.dumps(chat("a", "b")))
    alone = count_tokens(inspect(make_config()), "tiny-mistral")
    both = inspect(make_config(data={"train": train_file, "validation": validation}))
    assert count_tokens(both, "tiny-mistral") == alone


def test_mistral_common_is_the_measure(dataset: Callable[..., Dataset]) -> None:
    """A chat's count is the length of what mistral-common encodes."""
    instruct = pytest.importorskip("mistral_common.protocol.instruct.request")
    tokenizers = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    validator = pytest.importorskip("mistral_common.protocol.instruct.validator")
    rows = [chat(f"Question {n}?", "An answer. " * n) for n in range(1, 6)]
    tokenizer = tokenizers.MistralTokenizer.from_file(
        str(tokenizers.MistralTokenizer._data_path() / "tekken_240718.json"),
        mode=validator.ValidationMode.finetuning,
    )
    expected = sum(
        len(tokenizer.encode_chat_completion(instruct.ChatCompletionRequest(**row)).tokens)
        for row in rows
    )
    count = count_tokens(dataset(rows), MISTRAL[0])
    assert (count.data_tokens, count.basis, count.tokenizer) == (expected, "exact", MISTRAL[1])


def test_tools_weights_and_plain_text_are_counted(dataset: Callable[..., Dataset]) -> None:
    """Rows of every trained format have a count; weights change nothing."""
    pytest.importorskip("mistral_common")
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "2"},
        {"role": "assistant", "content": "2", "weight": 1},
    ]
    weighted = count_tokens(dataset([{"messages": messages, "tools": [tool]}]), MISTRAL[0])
    del messages[-1]["weight"]
    plain = count_tokens(dataset([{"messages": messages, "tools": [tool]}]), MISTRAL[0])
    assert weighted.data_tokens
    assert weighted == plain
    text = count_tokens(dataset([{"text": "hello"}]), MISTRAL[0])
    assert text.data_tokens == 3


def test_large_data_is_sampled_with_an_interval_that_holds(
    dataset: Callable[..., Dataset],
) -> None:
    """The interval around the estimate contains the full count, the same one each time."""
    pytest.importorskip("mistral_common")
    first = [chat(f"Question {n}?", "word " * (n * 7919 % 60 + 1)) for n in range(1500)]
    second = [chat("Wieviel?", f"Es sind {n * n} St\u00fcck.") for n in range(300)]
    data = dataset(first, second)
    exact = count_tokens(data, MISTRAL[0])
    sampled = count_tokens(data, MISTRAL[0], exact_bytes=1000, sample_rows=400)
    assert exact.basis == "exact"
    assert sampled.basis == "sampled"
    assert exact.data_tokens
    assert sampled.data_tokens
    assert sampled.interval
    low, high = sampled.interval
    assert low <= sampled.data_tokens <= high
    assert low <= exact.data_tokens <= high
    assert high - low < 0.1 * exact.data_tokens
    assert sampled == count_tokens(data, MISTRAL[0], exact_bytes=1000, sample_rows=400)


def test_a_sample_that_takes_every_row_is_exact(dataset: Callable[..., Dataset]) -> None:
    """Few large rows are counted in full."""
    pytest.importorskip("mistral_common")
    data = dataset([chat("a", "word " * 2000) for _ in range(5)])
    assert count_tokens(data, MISTRAL[0], exact_bytes=10).basis == "exact"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("gpt-4o-mini", "not known"),
        ("mistral-large-latest", "different tokenizers"),
    ],
)
def test_an_unknown_tokenizer_is_no_number(
    dataset: Callable[..., Dataset], model: str, reason: str
) -> None:
    """Instead of a guess there is a reason."""
    count = count_tokens(dataset([chat("a", "b")]), model)
    assert count.data_tokens is None
    assert reason in (count.reason or "")


def test_rows_that_cannot_be_counted_are_named(dataset: Callable[..., Dataset]) -> None:
    """One row without a count leaves none for the whole."""
    pytest.importorskip("mistral_common")
    image = [{"type": "image_url", "image_url": "https://example.org/a.png"}]
    rows = [chat("a", "b"), chat("a", "b")]
    rows[1]["messages"][0]["content"] = image
    count = count_tokens(dataset(rows), MISTRAL[0])
    assert count.data_tokens is None
    assert "0.jsonl:2: images cannot be counted" in (count.reason or "")
    refused = count_tokens(dataset([{"messages": rows[0]["messages"][1:]}]), MISTRAL[0])
    assert refused.data_tokens is None
    assert "0.jsonl:1" in (refused.reason or "")


def test_classifier_rows_have_no_count(tmp_path: Path, make_config: MakeConfig) -> None:
    """How the service lays them out was never told."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a", "labels": {"b": "c"}}))
    data = inspect(make_config(method="classifier", data={"train": path}))
    assert count_tokens(data, MISTRAL[0]).data_tokens is None


def test_a_file_that_went_away_is_a_reason(dataset: Callable[..., Dataset]) -> None:
    """Counting reads the files again; one that is gone raises nothing."""
    data = dataset([chat("a", "b")])
    data.files[0].path.unlink()
    count = count_tokens(data, "tiny-mistral")
    assert count.data_tokens is None
    assert "cannot be read" in (count.reason or "")


def test_without_mistral_common_the_reason_names_the_extra(train_file: Path) -> None:
    """The extra is needed only where it is used, and its absence is told."""
    program = (
        "import sys\n"
        "sys.modules['mistral_common'] = None\n"
        "from training_backends import TrainingConfig\n"
        "from training_backends.datasets.inspect import inspect\n"
        "from training_backends.datasets.tokens import count_tokens\n"
        f"config = TrainingConfig(model='x', data={{'train': [{str(train_file)!r}]}})\n"
        "print(count_tokens(inspect(config), 'tiny-mistral').data_tokens)\n"
        "print(count_tokens(inspect(config), 'open-mistral-nemo').reason)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    tokens, reason = done.stdout.splitlines()
    assert int(tokens) > 0
    assert "pip install 'training-backends[tokens]'" in reason


def test_every_tokenizer_that_is_named_is_there() -> None:
    """Each name leads to a file that mistral-common ships."""
    common = pytest.importorskip("mistral_common")
    assert tokenizer_of("open-mistral-7b") == "v3"
    shipped = {path.name for path in (Path(common.__file__).parent / "data").iterdir()}
    assert set(tokens._FILES.values()) <= shipped
    assert set(tokens._TOKENIZERS.values()) <= set(tokens._FILES)
