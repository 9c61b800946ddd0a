"""Validation: everything the protocol cannot do is named, and nothing is changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from training_backends import BackendRetired, Dataset, Issue, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import HOSTED_URL, MistralSettings
from training_backends.backends.mistral.validate import check_config
from training_backends.core.backend import CredentialSource
from training_backends.core.capabilities import config_issues
from training_backends.credentials.vault import CredentialVault
from training_backends.datasets.inspect import inspect
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio
MakeConfig = Callable[..., TrainingConfig]


def fields_of(issues: list[Issue] | tuple[Issue, ...]) -> list[str | None]:
    """Return which fields the issues are about."""
    return [issue.field for issue in issues]


async def test_good_configuration_passes(
    backend: MistralAPIBackend, config: TrainingConfig, dataset: Dataset, provider: ScriptedProvider
) -> None:
    """A good configuration has no issues, and only harmless requests were made."""
    report = await backend.validate(config, dataset)
    assert report.issues == ()
    assert {request.method for request in provider.requests} == {"GET"}
    assert not provider.files
    assert not provider.jobs


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "classifier"}, "classifier_targets"),
        (
            {
                "method": "classifier",
                "classifier_targets": [{"name": "a", "labels": ["x"]}],
                "hyperparameters": {"fim_ratio": 0.5},
            },
            "hyperparameters.fim_ratio",
        ),
        ({"options": {"repositores": []}}, "options.repositores"),
        (
            {"options": {"invalid_sample_skip_percentage": 0.9}},
            "options.invalid_sample_skip_percentage",
        ),
        (
            {"options": {"repositories": [{"owner": "o", "name": "n", "token": "t"}]}},
            "options.repositories.0.token",
        ),
    ],
)
async def test_what_the_protocol_lacks_is_named(
    fields: dict[str, Any],
    named: str,
    backend: MistralAPIBackend,
    make_config: MakeConfig,
    provider: ScriptedProvider,
) -> None:
    """A field that would have no effect is an error that names it and what to do."""
    config = make_config(model="open-mistral-7b", **fields)
    report = await backend.validate(config, Dataset(files=()))
    assert fields_of(report.errors) == [named]
    assert provider.requests == []


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "dpo"}, "method"),
        ({"tuning": "lora"}, "tuning"),
        ({"hyperparameters": {"batch_size": 8}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"seed": 1}}, "hyperparameters.seed"),
        ({"suffix": "x" * 19}, "suffix"),
        (
            {"data": {"train": "a", "validation": {"path": "b", "weight": 2}}},
            "data.validation.0.weight",
        ),
    ],
)
def test_what_the_protocol_lacks_is_undeclared(
    fields: dict[str, Any],
    named: str,
    make_backend: Callable[..., MistralAPIBackend],
    make_config: MakeConfig,
) -> None:
    """The client rejects it by name, without asking the backend."""
    issues = [*config_issues(make_config(**fields), make_backend().capabilities, "mistral")]
    assert fields_of(issues) == [named]


def test_near_option_is_suggested(make_config: MakeConfig) -> None:
    """A misspelt option names the right one."""
    config = make_config(options={"repositores": []})
    (issue,) = check_config(config)
    assert issue.fix == "did you mean 'repositories'?"


@pytest.mark.parametrize("name", ["n_epochs", "trainingSteps", "learning_rate_multiplier"])
def test_foreign_hyperparameters_cannot_be_configured(name: str, make_config: MakeConfig) -> None:
    """A hyperparameter of another provider is refused by name, before any backend sees it."""
    with pytest.raises(ValidationError, match=rf"hyperparameters\.{name}"):
        make_config(hyperparameters={name: 3})


def test_rules_for_data_are_the_protocols(make_backend: Callable[..., MistralAPIBackend]) -> None:
    """What is a row, and how large files may be, is declared for everybody who judges data."""
    provider_format = make_backend().capabilities.provider_format
    assert (provider_format.name, provider_format.max_file_bytes) == ("mistral", 512_000_000)
    assert "preference" not in provider_format.formats


@pytest.mark.parametrize(("hosted", "severity"), [(True, "error"), (False, "warning")])
def test_validation_set_is_limited(
    hosted: bool,
    severity: str,
    make_backend: Callable[..., MistralAPIBackend],
    make_config: MakeConfig,
    train_file: Path,
) -> None:
    """More than 5 % of the training data is refused by the hosted service only."""
    valid = train_file.with_name("valid.jsonl")
    valid.write_text(train_file.read_text().replace("What", "How much"))
    backend = make_backend(base_url=HOSTED_URL) if hosted else make_backend()
    config = make_config(data={"train": train_file, "validation": valid})
    found = inspect(config, provider_format=backend.capabilities.provider_format)
    limits = [issue for issue in found.issues if issue.code == "validation_too_large"]
    assert [issue.severity for issue in limits] == [severity]


def test_only_training_files_may_be_too_large(
    make_backend: Callable[..., MistralAPIBackend], make_config: MakeConfig, train_file: Path
) -> None:
    """They are sent in parts; a validation file is refused."""
    valid = train_file.with_name("valid.jsonl")
    valid.write_text(train_file.read_text().replace("What", "How much"))
    provider_format = make_backend(max_file_bytes=600).capabilities.provider_format
    found = inspect(
        make_config(data={"train": train_file, "validation": valid}),
        provider_format=provider_format,
    )
    large = {issue.path: issue.severity for issue in found.issues if issue.code == "file_too_large"}
    assert large == {str(train_file): "warning", str(valid): "error"}


async def test_rows_beyond_a_sequence_are_counted(
    backend: MistralAPIBackend, make_config: MakeConfig, train_file: Path
) -> None:
    """A warning says how many rows are longer than seq_len."""
    row = json.loads(train_file.read_text().splitlines()[0])
    row["messages"][0]["content"] = "word " * 200
    train_file.write_text(train_file.read_text() + json.dumps(row) + "\n")
    config = make_config(hyperparameters={"seq_len": 500})
    report = await backend.validate(config, inspect(config))
    (issue,) = [issue for issue in report.issues if issue.code == "overlong_rows"]
    assert issue.severity == "warning"
    assert "1 of 21 rows is longer than 500 tokens" in issue.message


@pytest.mark.parametrize(
    ("stored", "codes"),
    [
        ({}, ["no_credential", "no_credential"]),
        ({"wandb/team": "short", "github": "t"}, ["bad_wandb_key"]),
        ({"wandb/team": "w" * 40, "github": "t"}, []),
        ({"wandb/team": "wandb_v1_" + "w" * 77, "github": "t"}, []),
        ({"wandb/team": "w" * 80, "github": "t"}, ["bad_wandb_key"]),
    ],
)
async def test_named_secrets_must_exist(
    stored: dict[str, str],
    codes: list[str],
    backend: MistralAPIBackend,
    make_config: MakeConfig,
    secrets: CredentialSource,
) -> None:
    """A secret that the configuration names must exist and fit, and is never shown."""
    secrets.values.update(stored)  # type: ignore[attr-defined]
    config = make_config(
        model="open-mistral-7b",
        integrations=[{"project": "p", "credential": "wandb/team"}],
        options={"repositories": [{"owner": "o", "name": "n"}]},
    )
    report = await backend.validate(config, Dataset(files=()))
    assert [issue.code for issue in report.errors] == codes
    assert "short" not in repr(report)
    if not stored:
        assert "credentials set wandb --profile team" in str(report.errors[0].fix)


async def test_unknown_model_is_named(backend: MistralAPIBackend, make_config: MakeConfig) -> None:
    """A model that the server does not have is an error with the nearest that it has."""
    report = await backend.validate(make_config(model="open-mistral-7"), Dataset(files=()))
    (issue,) = report.errors
    assert (issue.field, issue.fix) == ("model", "did you mean 'open-mistral-7b'?")


async def test_retired_service_is_told(
    backend: MistralAPIBackend, provider: ScriptedProvider, config: TrainingConfig, dataset: Dataset
) -> None:
    """A service that trains no more is told before anything else is done."""
    provider.retired = True
    with pytest.raises(BackendRetired):
        await backend.validate(config, dataset)


async def test_the_hosted_service_is_retired_even_where_it_cannot_be_asked(
    config: TrainingConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Without a key, the default URL is not ready to launch at."""
    keys = CredentialVault(home=tmp_path, environ={})
    backend = MistralAPIBackend(credentials=keys, settings=MistralSettings(base_url=HOSTED_URL))
    with pytest.raises(BackendRetired, match="not verified"):
        await backend.validate(config, dataset)
    await backend.aclose()


async def test_server_that_is_away_is_a_warning(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """A configuration can be checked without the server; what was not asked is said."""
    backend = make_backend(attempts=1)
    provider.fail(OtherAnswer(status=503), times=9)
    report = await backend.validate(config, dataset)
    await backend.aclose()
    assert report.ok
    assert [issue.code for issue in report.issues] == ["server_not_asked"]
