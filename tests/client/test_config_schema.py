"""The JSON Schema of a configuration file says what `load_config` says."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from training_backends import ConfigError
from training_backends.client.config_file import load_config
from training_backends.client.config_schema import config_schema
from training_backends.testing.backend import ScriptedBackend

CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))
SCHEMA = config_schema()

ACCEPTED = (
    "model: m\ndata: {train: a.jsonl}",
    "data: {train: [a.jsonl, {uri: 's3://b/c', weight: 2}], validation: {remote_id: file-1}}",
    "tuning: lora",
    "tuning: {kind: full, rank: 8}",
    "chat_template: chat.jinja",
    "budget: {max_cost: 25 USD, max_duration: 2h 30m}",
    "budget: {max_cost: {amount: 25, currency: USD}, max_duration: 90}",
    "hyperparameters: {epochs: }\nsuffix:",
    "hyperparameters:",
    "integrations: [{type: wandb, project: p}, {type: tensorboard}, {type: own, options: {a: 1}}]",
    "tags: {team: support}\noptions: {anything: [1]}",
    "result: {checkpoint: best}\nresources: {gpus: 1, max_duration: 1d}",
)
REJECTED = (
    "modle: m",
    "hyperparameters: {learning_rat: 1}",
    "hyperparameters: {epochs: many}",
    "hyperparameters: {batch_size: true}",
    "tuning: lroa",
    "tuning: {rank: 8}",
    "data: {train: [{path: a, url: b}]}",
    "data: {train: 5}",
    "integrations: [{type: wandb}]",
    "integrations: [{type: tensorboard, options: {}}]",
    "result: {checkpoint: first}",
    "budget: {max_duration: -1}",
    "tags: {team: 5}",
)


def is_valid(text: str, schema: dict[str, Any] = SCHEMA) -> bool:
    """Return whether an editor would accept a file."""
    return not any(jsonschema.Draft7Validator(schema).iter_errors(yaml.safe_load(text)))


def is_loaded(path: Path, text: str) -> bool:
    """Return whether the program accepts it."""
    path.write_text(text)
    try:
        load_config(path)
    except ConfigError:
        return False
    return True


def test_it_is_a_schema() -> None:
    """Of the draft that it names."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_examples_are_valid(path: Path) -> None:
    """No editor underlines a file that this project ships."""
    assert is_valid(path.read_text())


@pytest.mark.parametrize("text", [*ACCEPTED, *REJECTED])
def test_it_agrees_with_the_program(tmp_path: Path, text: str) -> None:
    """Short forms and fields without a value are accepted, and typing errors are not."""
    assert (is_valid(text), is_loaded(tmp_path / "run.yaml", text)) == ((text in ACCEPTED),) * 2


def test_a_backend_has_only_its_own_fields(backend: ScriptedBackend) -> None:
    """What the client would reject is no valid choice."""
    schema = config_schema(backend)
    assert is_valid("method: sft\nhyperparameters: {epochs: 1}", schema)
    for text in ("method: nothing", "options: {unknown: 1}"):
        assert is_valid(text)
        assert not is_valid(text, schema)
