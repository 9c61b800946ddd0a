"""Estimates: counted or priced, never guessed."""

from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_backends import Dataset, Estimate, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.estimates import estimate_from_count
from training_backends.datasets.tokens import TokenCount

MakeConfig = Callable[..., TrainingConfig]
UNKNOWN = TokenCount(reason="its tokenizer is not known")


def estimate(
    make_config: MakeConfig, count: TokenCount, *, hosted: bool = True, **fields: Any
) -> Estimate:
    """Estimate the training of open-mistral-7b."""
    config = make_config(**{"model": "open-mistral-7b", **fields})
    return estimate_from_count(config, count, hosted=hosted)


def test_epochs_are_priced(make_config: MakeConfig) -> None:
    """Tokens times epochs times the price that was seen, with its date and the fee beside it."""
    found = estimate(
        make_config, TokenCount(data_tokens=1_000_000), hyperparameters={"epochs": 2.5}
    )
    assert (found.data_tokens, found.train_tokens, found.steps) == (1_000_000, 2_500_000, 20)
    assert found.cost is not None
    assert (found.cost.amount, found.cost.currency) == (Decimal("5.0000"), "USD")
    assert found.price_source is not None
    assert found.price_source.as_of == date(2024, 7, 1)
    assert any("4 USD" in note for note in found.notes)


def test_steps_are_priced_without_a_count(make_config: MakeConfig) -> None:
    """With a number of steps the trained tokens are known even if the data's are not."""
    found = estimate(make_config, UNKNOWN, hyperparameters={"training_steps": 10})
    assert (found.data_tokens, found.train_tokens, found.steps) == (None, 1_310_720, 10)
    assert found.cost is not None
    assert found.cost.amount == Decimal("2.6214")


def test_no_guess_without_a_count(make_config: MakeConfig) -> None:
    """Without a count nothing is made up, whatever the number of rows; the reason is given."""
    found = estimate(make_config, UNKNOWN, hyperparameters={"epochs": 3})
    assert (found.data_tokens, found.train_tokens, found.steps, found.cost) == (None,) * 4
    assert any("tokenizer is not known" in note for note in found.notes)


@pytest.mark.parametrize(
    ("fields", "hosted", "reason"),
    [
        ({"model": "mistral-large-latest", "hyperparameters": {"epochs": 1}}, True, "no price"),
        ({"hyperparameters": {"epochs": 1}}, False, "server names it"),
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
