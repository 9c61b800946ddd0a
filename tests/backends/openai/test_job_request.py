"""What a configuration becomes on the wire, and what the wire has no place for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backends.openai.conftest import MODEL, Secrets
from training_backends import TrainingConfig
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.openai.job_request import config_of, issues_of, make_job, shows
from training_backends.backends.openai.settings import OpenAISettings
from training_backends.core.capabilities import config_issues
from training_backends.protocols.openai.wire import FineTuningJob

Make = Callable[..., TrainingConfig]


def settings(variant: str = "openai") -> OpenAISettings:
    """Return settings of a variant."""
    return OpenAISettings.model_validate({"base_url": "http://127.0.0.1:9/v1", "variant": variant})


def body_of(config: TrainingConfig, variant: str = "openai", **fields: Any) -> dict[str, Any]:
    """Return the create request of a configuration."""
    values = {"train": "file-1", "validation": None, **fields}
    return make_job(config, settings(variant), **values)


def test_only_what_is_set_is_sent(make_config: Make) -> None:
    """A configuration without hyperparameters leaves every value to the server."""
    assert body_of(make_config(model=MODEL)) == {
        "model": MODEL,
        "training_file": "file-1",
        "method": {"type": "supervised"},
    }


def test_preference_training_has_its_options(make_config: Make, preference_file: Path) -> None:
    """Epochs, batch size, multiplier and beta are the hyperparameters of the method."""
    config = make_config(
        model=MODEL,
        method="dpo",
        data={"train": preference_file},
        hyperparameters={"epochs": 2, "batch_size": 4, "seed": 7},
        suffix="mine",
        options={"beta": 0.2, "learning_rate_multiplier": 1.5},
    )
    body = body_of(config, validation="file-2", metadata={"k": "v"})
    assert body["method"] == {
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "n_epochs": 2,
                "batch_size": 4,
                "beta": 0.2,
                "learning_rate_multiplier": 1.5,
            }
        },
    }
    assert (body["suffix"], body["seed"], body["metadata"]) == ("mine", 7, {"k": "v"})
    assert body["validation_file"] == "file-2"


def test_integration_has_no_key(make_config: Make) -> None:
    """OpenAI reports to W&B with the key of its dashboard; the run's name is the job's there."""
    entry = {"project": "p", "run_name": "r", "name": "n", "entity": "us", "tags": ["a", "b"]}
    config = make_config(model=MODEL, integrations=[entry, {"project": "q"}])
    assert body_of(config)["integrations"] == [
        {
            "type": "wandb",
            "wandb": {"project": "p", "name": "r", "entity": "us", "tags": ["a", "b"]},
        },
        {"type": "wandb", "wandb": {"project": "q"}},
    ]
    declared = OpenAIBackend(credentials=Secrets(), settings=settings()).capabilities
    assert not list(config_issues(config, declared, "openai"))
    own_key = make_config(model=MODEL, integrations=[{"project": "p", "credential": "wandb/me"}])
    (issue,) = config_issues(own_key, declared, "openai")
    assert issue.field == "integrations.0.credential"
    assert "stored at the provider" in issue.message


def test_azure_has_a_training_type_and_old_hyperparameters(make_config: Make) -> None:
    """The form that also the dated versions read."""
    config = make_config(
        model=MODEL, hyperparameters={"epochs": 2}, options={"training_type": "GlobalStandard"}
    )
    body = body_of(config, "azure")
    assert (body["trainingType"], body["hyperparameters"]) == ("GlobalStandard", {"n_epochs": 2})
    assert "method" not in body


def test_nebius_has_an_absolute_learning_rate(make_config: Make) -> None:
    """Its hyperparameters include those of LoRA."""
    config = make_config(
        model="org/open-model",
        tuning={"kind": "lora", "rank": 8},
        hyperparameters={"learning_rate": 1e-5, "epochs": 1, "seq_len": 4096},
    )
    hyper = body_of(config, "nebius", seed=5)["method"]["supervised"]["hyperparameters"]
    assert hyper == {
        "learning_rate": 1e-5,
        "n_epochs": 1,
        "context_length": 4096,
        "lora": True,
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
    }


@pytest.mark.parametrize(
    ("variant", "fields", "field"),
    [
        ("openai", {"hyperparameters": {"epochs": 1.5}}, "hyperparameters.epochs"),
        ("openai", {"hyperparameters": {"epochs": 51}}, "hyperparameters.epochs"),
        ("openai", {"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
        ("openai", {"options": {"beta": 0.1}}, "options.beta"),
        ("openai", {"options": {"training_type": "Standard"}}, "options.training_type"),
        (
            "openai",
            {"options": {"learning_rate_multiplyer": 1}},
            "options.learning_rate_multiplyer",
        ),
        (
            "nebius",
            {"options": {"learning_rate_multiplier": 1}},
            "options.learning_rate_multiplier",
        ),
    ],
)
def test_what_the_wire_cannot_carry_is_named(
    variant: str, fields: dict[str, Any], field: str, make_config: Make
) -> None:
    """Each issue names our own field."""
    found = issues_of(make_config(model=MODEL, **fields), settings(variant))
    assert [issue.field for issue in found] == [field]


def test_job_shows_its_request(make_config: Make) -> None:
    """A job is compared by what it shows; one of another seed or file is another job."""
    config = make_config(model="gpt-4o-mini", hyperparameters={"epochs": 2, "seed": 7})
    body = body_of(config)
    shown = {
        "id": "ftjob-1",
        "model": MODEL,
        "training_file": "file-1",
        "created_at": 1,
        "status": "queued",
        "seed": 7,
        "hyperparameters": {"n_epochs": 2, "batch_size": "auto"},
        "metadata": None,
    }
    assert shows(FineTuningJob.model_validate(shown), body)
    for other in (
        {"seed": 8},
        {"training_file": "file-2"},
        {"validation_file": "file-2"},
        {"model": "gpt-4.1"},
        {"suffix": "x"},
        {"hyperparameters": {"n_epochs": 3}},
        {"method": {"type": "dpo"}},
    ):
        assert not shows(FineTuningJob.model_validate(shown | other), body)


def test_listed_job_becomes_a_configuration() -> None:
    """The configuration has what the server reports."""
    job = FineTuningJob.model_validate(
        {
            "id": "ftjob-1",
            "model": MODEL,
            "training_file": "file-1",
            "validation_file": "file-2",
            "created_at": 1,
            "status": "succeeded",
            "seed": 7,
            "user_provided_suffix": "mine",
            "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.1}}},
        }
    )
    config = config_of(job)
    assert config is not None
    assert (config.method, config.suffix, config.hyperparameters.epochs) == ("dpo", "mine", 2)
    assert config.options == {"beta": 0.1}
