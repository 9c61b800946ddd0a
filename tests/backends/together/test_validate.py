"""What is checked and estimated before anything is uploaded."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.together.backend import TogetherBackend
from training_backends.core.capabilities import config_issues
from training_backends.datasets.inspect import inspect
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.together_provider import ScriptedTogetherProvider

pytestmark = pytest.mark.anyio


def changed(config: TrainingConfig, **fields: Any) -> TrainingConfig:
    """Return the configuration with other fields."""
    return TrainingConfig.model_validate({**config.model_dump(), **fields})


async def test_file_above_the_limit_is_invalid(
    backend: TogetherBackend, config: TrainingConfig
) -> None:
    """Larger files need Together's multipart upload; the error names the limit."""
    rules = backend.capabilities.provider_format
    assert (rules.max_file_bytes, rules.shards) == (5 * 2**30, False)
    found = inspect(config, provider_format=replace(rules, max_file_bytes=100)).issues
    (issue,) = [issue for issue in found if issue.code == "file_too_large"]
    assert issue.severity == "error"
    assert "together allows 100" in issue.message


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, []),
        ({"hyperparameters": {"epochs": 1.5}}, ["hyperparameters.epochs"]),
        ({"hyperparameters": {"epochs": 30}}, ["hyperparameters.epochs"]),
        ({"hyperparameters": {"learning_rate": 0.5}}, ["hyperparameters.learning_rate"]),
        ({"hyperparameters": {"batch_size": 4}}, ["hyperparameters.batch_size"]),
        (
            {"method": "dpo", "hyperparameters": {"batch_size": 32}},
            ["hyperparameters.batch_size"],
        ),
        ({"tuning": "full", "hyperparameters": {"batch_size": 32}}, ["hyperparameters.batch_size"]),
        ({"hyperparameters": {"seq_len": 10_000}}, ["hyperparameters.seq_len"]),
        ({"tuning": {"kind": "lora", "rank": 128}}, ["tuning.rank"]),
        ({"tuning": {"kind": "lora", "alpha": 2.5}}, ["tuning.alpha"]),
        ({"options": {"n_checkpoints": 11}}, ["options.n_checkpoints"]),
        ({"options": {"n_evals": 2}}, ["options.n_evals"]),
        ({"options": {"dpo_beta": 0.1}}, ["options.dpo_beta"]),
        ({"options": {"n_checkpoint": 1}}, ["options.n_checkpoint"]),
        ({"model": "no/such"}, ["model"]),
        ({"integrations": [{"project": "mine"}]}, ["integrations.0.credential"]),
    ],
)
async def test_values_are_checked_against_the_limits_of_the_model(
    fields: dict[str, Any],
    wrong: list[str],
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
) -> None:
    """Each value out of bounds is an error of its field; nothing is uploaded."""
    chosen = changed(config, **fields)
    report = await backend.validate(chosen, inspect(chosen))
    assert [issue.field for issue in report.errors] == wrong
    assert provider.files == {}


async def test_undeclared_fields_are_rejected(
    backend: TogetherBackend, config: TrainingConfig
) -> None:
    """There are no steps, no qlora, one training file, and room for the token in the suffix."""
    fields: dict[str, Any] = {
        "method": "classifier",
        "tuning": "qlora",
        "hyperparameters": {"training_steps": 10, "fim_ratio": 0.5},
        "data": {"train": [config.data.train[0], config.data.train[0]]},
        "suffix": "x" * 30,
    }
    issues = config_issues(changed(config, **fields), backend.capabilities, "together")
    assert sorted(str(issue.field) for issue in issues) == [
        "data.train",
        "hyperparameters.fim_ratio",
        "hyperparameters.training_steps",
        "method",
        "suffix",
        "tuning.kind",
    ]


async def test_full_fine_tuning_needs_a_model_that_has_it(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """Without it, Together reports its limits as absent or zero."""
    provider.limits["supports_full_training"] = False
    report = await backend.validate(changed(config, tuning="full"), dataset)
    assert [issue.field for issue in report.errors] == ["tuning"]


async def test_compressed_data_is_rejected(
    backend: TogetherBackend, config: TrainingConfig, train_file: Path
) -> None:
    """Together reads plain files only."""
    path = train_file.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(train_file.read_bytes()))
    chosen = changed(config, data={"train": path})
    report = await backend.validate(chosen, inspect(chosen))
    assert [issue.field for issue in report.errors] == ["data.train"]


async def test_unreachable_server_is_a_warning(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """A configuration can be checked without a connection, and an estimate says what it lacks."""
    provider.fail(OtherAnswer(status=503), times=99)
    report = await backend.validate(config, dataset)
    assert report.ok
    assert [issue.code for issue in report.issues] == ["server_not_asked"]
    estimate = await backend.estimate(config, dataset)
    assert any("Could not ask Together" in note for note in estimate.notes)


async def test_price_is_known_once_the_data_is_there(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    dataset: Dataset,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """An estimate uploads nothing; after a launch with the same file, it has Together's price."""
    before = await backend.estimate(config, dataset)
    assert (before.cost, provider.files) == (None, {})
    assert any("Together prices uploaded files only" in note for note in before.notes)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    after = await backend.estimate(config, dataset)
    assert after.cost == journal.quotes[0].cost
    assert after.price_source is not None
    assert after.train_tokens == journal.quotes[0].train_tokens
    provider.credit = 0.5
    report = await backend.validate(config, dataset)
    assert [issue.code for issue in report.errors] == ["over_account_limit"]
