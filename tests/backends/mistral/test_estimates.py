"""Estimates: counted or priced, never guessed."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends import DataFile, Dataset, Estimate, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.estimates import count_epoch, estimate_from_count
from training_backends.tokens import TokenCount

MakeConfig = Callable[..., TrainingConfig]
UNKNOWN = TokenCount(reason="its tokenizer is not known")


def estimate(
    make_config: MakeConfig, count: TokenCount, *, hosted: bool = True, **fields: Any
) -> Estimate:
    """Estimate the training of open-mistral-7b."""
    config = make_config(**{"model": "open-mistral-7b", **fields})
    return estimate_from_count(config, count, hosted=hosted)


def parts(found: Estimate) -> dict[str, str]:
    """Return the parts of a cost as people read them."""
    return {item.name: str(item.amount) for item in found.costs}


def test_epochs_are_priced(make_config: MakeConfig) -> None:
    """Tokens times epochs times the price that was seen, with its date, and storage beside it."""
    found = estimate(
        make_config, TokenCount(data_tokens=1_000_000), hyperparameters={"epochs": 2.5}
    )
    assert (found.data_tokens, found.train_tokens, found.steps) == (1_000_000, 2_500_000, 20)
    assert parts(found) == {"training": "5.00 USD", "storage, first month": "2.00 USD"}
    assert str(found.cost) == "7.00 USD"
    assert found.price_source is not None
    assert found.price_source.as_of == date(2024, 7, 1)
    assert all(item.source.as_of >= date(2024, 7, 1) for item in found.costs)


def test_what_is_missing_to_the_minimum_is_a_part_of_its_own(make_config: MakeConfig) -> None:
    """A job costs 4 USD at least: the rest up to that is shown beside the training."""
    found = estimate(make_config, TokenCount(data_tokens=500_000), hyperparameters={"epochs": 1})
    assert parts(found) == {
        "training": "1.00 USD",
        "up to the minimum of 4.00 USD": "3.00 USD",
        "storage, first month": "2.00 USD",
    }
    assert str(found.cost) == "6.00 USD"


def test_prices_in_two_currencies_are_not_added(make_config: MakeConfig) -> None:
    """A price in EUR and fees in USD have no sum; both are told, and why."""
    found = estimate(
        make_config,
        TokenCount(data_tokens=2_000_000),
        model="ministral-3b-latest",
        method="classifier",
        classifier_targets=[{"name": "a", "labels": ["x"]}],
        hyperparameters={"epochs": 1},
    )
    assert parts(found) == {"training": "1.00 EUR", "storage, first month": "2.00 USD"}
    assert found.cost is None
    assert [str(total) for total in found.totals] == ["1.00 EUR", "2.00 USD"]
    assert any("are not added" in note for note in found.notes)


def test_steps_are_priced_without_a_count(make_config: MakeConfig) -> None:
    """With a number of steps the trained tokens are known even if the data's are not."""
    found = estimate(make_config, UNKNOWN, hyperparameters={"training_steps": 10})
    assert (found.data_tokens, found.train_tokens, found.steps) == (None, 1_310_720, 10)
    assert found.epochs is None
    assert parts(found)["training"] == "2.62 USD"


def test_steps_and_epochs_tell_each_other(make_config: MakeConfig) -> None:
    """Where the tokens of a step are known, steps say how often the data is seen, and back."""
    count = TokenCount(data_tokens=131_072 * 4)
    by_steps = estimate(make_config, count, hyperparameters={"training_steps": 10})
    by_epochs = estimate(make_config, count, hyperparameters={"epochs": 2.5})
    assert (by_steps.steps, by_steps.epochs) == (by_epochs.steps, by_epochs.epochs) == (10, 2.5)
    assert by_steps.costs == by_epochs.costs


def test_no_guess_without_a_count(make_config: MakeConfig) -> None:
    """Without a count nothing is made up, whatever the number of rows; the reason is given."""
    found = estimate(make_config, UNKNOWN, hyperparameters={"epochs": 3})
    assert (found.data_tokens, found.train_tokens, found.steps, found.cost) == (None,) * 4
    assert any("tokenizer is not known" in note for note in found.notes)


@pytest.mark.parametrize(
    ("fields", "hosted", "reason"),
    [
        ({"model": "mistral-large-latest", "hyperparameters": {"epochs": 1}}, True, "no price"),
        ({"hyperparameters": {"epochs": 1}}, False, "server quotes it"),
        ({}, True, "neither epochs nor training_steps"),
    ],
)
def test_unknown_cost_has_a_reason(
    fields: dict[str, Any], hosted: bool, reason: str, make_config: MakeConfig
) -> None:
    """Another model, another server or no length: no cost, and why."""
    found = estimate(make_config, TokenCount(data_tokens=1000), hosted=hosted, **fields)
    assert found.cost is None
    assert found.price_source is None
    assert any(reason in note for note in found.notes)


def test_sample_keeps_its_interval(make_config: MakeConfig) -> None:
    """A count from a sample says so, with its interval."""
    count = TokenCount(data_tokens=1000, basis="sampled", interval=(950, 1050))
    found = estimate(make_config, count, hyperparameters={"epochs": 1})
    assert (found.basis, found.interval) == ("sampled", (950, 1050))
    assert any("a sample of the rows" in note for note in found.notes)


def test_sampled_cost_has_an_interval(make_config: MakeConfig) -> None:
    """The cost at both bounds is told, fees included; by steps the count does not matter."""
    count = TokenCount(data_tokens=3_000_000, basis="sampled", interval=(1_000_000, 5_000_000))
    found = estimate(make_config, count, hyperparameters={"epochs": 1})
    assert found.cost_interval is not None
    assert [str(bound) for bound in found.cost_interval] == ["6.00 USD", "12.00 USD"]
    assert str(found.cost) == "8.00 USD"
    by_steps = estimate(make_config, count, hyperparameters={"training_steps": 10})
    assert by_steps.cost_interval is None


def counted(*tokens: int, margin: int = 0) -> list[TokenCount]:
    """Return the counts of several files."""
    if not margin:
        return [TokenCount(data_tokens=count) for count in tokens]
    return [
        TokenCount(data_tokens=n, basis="sampled", interval=(n - margin, n + margin))
        for n in tokens
    ]


def weighted(*weights: float) -> Dataset:
    """Make a dataset of files of 10 rows with these weights."""
    files = [
        DataFile(
            path=Path(f"{n}.jsonl"), role="train", weight=weight, size=1, sha256=f"{n}", rows=10
        )
        for n, weight in enumerate(weights)
    ]
    return Dataset(files=tuple(files))


def test_equal_weights_change_nothing() -> None:
    """Files that all count the same are read once each in an epoch."""
    once, epoch = count_epoch(weighted(3, 3), counted(100, 300))
    assert once == epoch
    assert once.data_tokens == 400


def test_weights_are_those_of_an_epoch() -> None:
    """A row of weight 3 comes thrice for one of weight 1, and an epoch has as many rows."""
    once, epoch = count_epoch(weighted(1, 3), counted(100, 300))
    assert once.data_tokens == 400
    assert epoch.data_tokens == 100 * 0.5 + 300 * 1.5


def test_weights_and_samples_go_together() -> None:
    """Of several sampled files the errors are added as independent ones are."""
    once, epoch = count_epoch(weighted(1, 3), counted(100, 300, margin=10))
    assert (once.basis, once.interval) == ("sampled", (385, 415))
    assert epoch.interval == (484, 516)


def test_weights_are_said_to_be_ours(make_config: MakeConfig, train_file: Path) -> None:
    """What the hosted service makes of weights is not known, which the estimate says."""
    data = {"train": [train_file, {"path": train_file, "weight": 2}]}
    count = TokenCount(data_tokens=100)
    found = estimate(make_config, count, data=data, hyperparameters={"epochs": 1})
    assert any("weight" in note and "unknown" in note for note in found.notes)
    own = estimate(make_config, count, hosted=False, data=data, hyperparameters={"epochs": 1})
    assert any("our gateway" in note for note in own.notes)


@pytest.mark.anyio
async def test_exact_count_comes_from_the_data(
    backend: MistralAPIBackend, make_config: MakeConfig, dataset: Dataset
) -> None:
    """Tokens of tiny-mistral are counted from the rows: its bytes and control tokens."""
    config = make_config(hyperparameters={"epochs": 2})
    found = await backend.estimate(config, dataset)
    assert found.basis == "exact"
    assert found.data_tokens is not None
    assert found.data_tokens > 20 * 20
    assert found.data_tokens % 500 != 0
    assert found.train_tokens == 2 * found.data_tokens


@given(st.integers(1, 10**12), st.floats(0.01, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cost_grows_with_tokens(make_config: MakeConfig, tokens: int, epochs: float) -> None:
    """More tokens never cost less, and the steps always cover them."""
    small = estimate(
        make_config, TokenCount(data_tokens=tokens), hyperparameters={"epochs": epochs}
    )
    large = estimate(
        make_config, TokenCount(data_tokens=tokens + 1), hyperparameters={"epochs": epochs}
    )
    assert small.cost is not None
    assert large.cost is not None
    assert small.cost.amount <= large.cost.amount
    assert small.steps is not None
    assert small.train_tokens is not None
    assert (small.steps - 1) * 131_072 < small.train_tokens <= small.steps * 131_072
