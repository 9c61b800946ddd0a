"""Validation: everything the protocol cannot do is named, and nothing is changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from training_backends import BackendRetired, Dataset, Issue, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.checks import check_config
from training_backends.core.backend import CredentialSource
from training_backends.core.dataset import DataFile
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio
MakeConfig = Callable[..., TrainingConfig]


def data_file(size: int, role: str = "train", **fields: Any) -> DataFile:
    """Describe a file that need not exist."""
    values = {
        "path": Path("x.jsonl"),
        "role": role,
        "size": size,
        "sha256": "0",
        "rows": 1,
        **fields,
    }
    return DataFile.model_validate(values)


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
        ({"method": "dpo"}, "method"),
        ({"tuning": "lora"}, "tuning"),
        ({"hyperparameters": {"batch_size": 8}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"seed": 1}}, "hyperparameters.seed"),
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


def test_near_option_is_suggested(make_config: MakeConfig) -> None:
    """A misspelt option names the right one."""
    config = make_config(options={"repositores": []})
    (issue,) = check_config(config, Dataset(files=()), hosted=False)
    assert issue.fix == "did you mean 'repositories'?"


@pytest.mark.parametrize("name", ["n_epochs", "trainingSteps", "learning_rate_multiplier"])
def test_foreign_hyperparameters_cannot_be_configured(name: str, make_config: MakeConfig) -> None:
    """A hyperparameter of another provider is refused by name, before any backend sees it."""
    with pytest.raises(ValidationError, match=rf"hyperparameters\.{name}"):
        make_config(hyperparameters={name: 3})


@pytest.mark.parametrize(
    ("train", "validation", "hosted", "severity"),
    [
        (10_000_000, 500_000, True, None),
        (10_000_000, 500_001, True, "error"),
        (100_000_000, 1_000_000, True, None),
        (100_000_000, 1_000_001, True, "error"),
        (1_000, 500, False, "warning"),
    ],
)
def test_validation_set_is_limited(
    train: int, validation: int, hosted: bool, severity: str | None, make_config: MakeConfig
) -> None:
    """Validation data is at most 1 MB and 5 % of the training data at the hosted service."""
    dataset = Dataset(files=(data_file(train), data_file(validation, "validation")))
    issues = check_config(make_config(), dataset, hosted=hosted)
    assert [issue.severity for issue in issues] == ([severity] if severity else [])


@pytest.mark.parametrize(("size", "count"), [(512_000_000, 0), (512_000_001, 1)])
def test_large_file_is_named(size: int, count: int, make_config: MakeConfig) -> None:
    """A file beyond 512 MB is an error that says to cut it."""
    issues = check_config(make_config(), Dataset(files=(data_file(size),)), hosted=False)
    assert [issue.code for issue in issues] == ["file_too_large"] * count
    assert all("cut it" in str(issue.fix) for issue in issues)


@pytest.mark.parametrize(
    ("method", "samples", "fits"),
    [
        ("sft", "instruct", True),
        ("sft", "pretrain", True),
        ("sft", "classifier", False),
        ("classifier", "classifier", True),
        ("classifier", "instruct", False),
    ],
)
def test_samples_fit_the_method(
    method: str, samples: str, fits: bool, make_config: MakeConfig
) -> None:
    """Samples with labels go with classifiers, all others do not."""
    targets = [{"name": "a", "labels": ["x"]}] if method == "classifier" else []
    config = make_config(method=method, classifier_targets=targets)
    dataset = Dataset(files=(data_file(10, sample_type=samples),))
    assert (check_config(config, dataset, hosted=False) == []) is fits


def test_weights_of_validation_files_are_refused(make_config: MakeConfig, train_file: Path) -> None:
    """A weight on a validation file would have no effect."""
    data = {"train": str(train_file), "validation": {"path": str(train_file), "weight": 2}}
    issues = check_config(make_config(data=data), Dataset(files=()), hosted=False)
    assert fields_of(issues) == ["data.validation.0.weight"]


@pytest.mark.parametrize(
    ("stored", "codes"),
    [
        ({}, ["no_credential", "no_credential"]),
        ({"wandb/team": "short", "github": "t"}, ["bad_wandb_key"]),
        ({"wandb/team": "w" * 40, "github": "t"}, []),
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
        assert report.errors[0].fix == "`training-backends credentials set wandb --profile team`"


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
