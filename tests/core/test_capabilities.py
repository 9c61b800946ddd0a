"""Fields that a backend does not declare are errors; fields that nobody set are none."""

from typing import Any

import pytest

from training_backends import Capabilities, SuffixRule, TrainingConfig
from training_backends.core.capabilities import config_issues

PLAIN = Capabilities()


def make(**fields: Any) -> TrainingConfig:
    """Return a configuration with these fields set."""
    return TrainingConfig.model_validate({"model": "m", "data": {"train": "a"}, **fields})


def fields_of(config: TrainingConfig, capabilities: Capabilities) -> list[str | None]:
    """Return the fields that the backend does not support."""
    return [issue.field for issue in config_issues(config, capabilities, "mine")]


@pytest.mark.parametrize(
    ("fields", "named", "declared"),
    [
        ({"method": "dpo"}, "method", {"methods": {"dpo"}}),
        ({"tuning": "lora"}, "tuning", {"tunings": {"lora"}}),
        ({"hyperparameters": {"seed": 1}}, "hyperparameters.seed", {"hyperparameters": {"seed"}}),
        ({"hyperparameters": {"seed": 0}}, "hyperparameters.seed", {"hyperparameters": None}),
        (
            {"data": {"train": [{"path": "a", "weight": 2}]}},
            "data.train.0.weight",
            {"weights": True},
        ),
        (
            {"data": {"train": "a", "validation": "b"}},
            "data.validation",
            {"validation_files": True},
        ),
        ({"suffix": "mine"}, "suffix", {"suffix": {"max_length": 4}}),
        ({"data": {"train": "s3://b/c"}}, "data.train.0", {"data": {"uri"}}),
        ({"data": {"train": {"remote_id": "f"}}}, "data.train.0", {"data": {"remote"}}),
        ({"data": {}}, "data.train", {"needs_data": False}),
        ({"model": None}, "model", {"needs_model": False}),
        ({"resources": {"gpus": 1}}, "resources.gpus", {"resources": {"gpus"}}),
        ({"chat_template": "a.jinja"}, "chat_template", {"chat_template": True}),
        (
            {"result": {"checkpoint": "best"}},
            "result.checkpoint",
            {"result_checkpoints": {"best"}},
        ),
        ({"integrations": [{"project": "p"}]}, "integrations.0", {"integrations": {"wandb"}}),
        (
            {"integrations": [{"project": "p", "credential": "wandb"}]},
            "integrations.0",
            {"integrations": {"wandb"}, "integration_fields": {"project"}},
        ),
    ],
)
def test_a_field_that_was_set_must_be_declared(
    fields: dict[str, Any], named: str, declared: dict[str, Any]
) -> None:
    """It is an error that names the field, and none once the backend declares it."""
    config = make(**fields)
    assert fields_of(config, PLAIN) == [named]
    assert fields_of(config, Capabilities.model_validate(declared)) == []


def test_a_field_of_an_integration_must_be_declared() -> None:
    """A provider that has the key itself says so; other fields are named."""
    entry = {"project": "p", "entity": "us", "credential": "wandb/mine"}
    config = make(integrations=[entry])
    declared = Capabilities(
        integrations=frozenset({"wandb"}), integration_fields=frozenset({"project"})
    )
    entity, key = config_issues(config, declared, "mine")
    assert (entity.field, key.field) == ("integrations.0.entity", "integrations.0.credential")
    assert "stored at the provider" in key.message
    own_key = Capabilities(integrations=frozenset({"wandb"}))
    assert fields_of(config, own_key) == ["integrations.0.entity"]


def test_a_field_that_nobody_set_is_no_error() -> None:
    """Nor is a default that somebody wrote out, as a stored configuration does."""
    config = make()
    assert fields_of(config, PLAIN) == []
    assert fields_of(TrainingConfig.model_validate_json(config.model_dump_json()), PLAIN) == []


def test_the_default_method_is_judged_too() -> None:
    """A backend with other methods names them; one without methods takes no method at all."""
    only_dpo = Capabilities(methods=frozenset({"dpo"}))
    (issue,) = config_issues(make(), only_dpo, "mine")
    assert (issue.field, issue.fix) == ("method", "supported: dpo")
    none = Capabilities(methods=frozenset())
    assert fields_of(make(), none) == []
    assert fields_of(make(method="dpo"), none) == ["method"]


@pytest.mark.parametrize(
    ("suffix", "code"),
    [("abc", None), ("abcd", "suffix_too_long"), ("a.c", "suffix_characters")],
)
def test_a_suffix_follows_the_backends_rule(suffix: str, code: str | None) -> None:
    """Its length and its characters."""
    capabilities = Capabilities(suffix=SuffixRule(max_length=3, alphabet="abcd"))
    issues = config_issues(make(suffix=suffix), capabilities, "mine")
    assert [issue.code for issue in issues] == ([code] if code else [])


def test_the_number_of_training_files_is_limited() -> None:
    """By the backend's declaration only."""
    config = make(data={"train": ["a", "b"]})
    assert fields_of(config, PLAIN) == []
    assert fields_of(config, Capabilities(max_train_files=1)) == ["data.train"]


def test_the_best_checkpoint_needs_validation_data() -> None:
    """It is chosen by the validation loss."""
    best = Capabilities(result_checkpoints=frozenset({"last", "best"}), validation_files=True)
    chosen = {"result": {"checkpoint": "best"}}
    assert fields_of(make(**chosen), best) == ["data.validation"]
    assert fields_of(make(**chosen, data={"train": "a", "validation": "b"}), best) == []
    assert fields_of(make(result={"checkpoint": "last"}), best) == []
