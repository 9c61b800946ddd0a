"""Money, durations and budgets."""

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from training_backends import Budget, BudgetExceeded, Estimate, Money
from training_backends.core.estimate import Duration, format_duration

DURATION: TypeAdapter[timedelta] = TypeAdapter(Duration)


def money(text: str) -> Money:
    return Money.model_validate(text)


@pytest.mark.parametrize(
    ("text", "amount", "currency"),
    [
        ("25 USD", "25", "USD"),
        ("0.10usd", "0.10", "USD"),
        (" 12.50  eur ", "12.50", "EUR"),
        ("0 USD", "0", "USD"),
    ],
)
def test_money_is_read_exactly(text: str, amount: str, currency: str) -> None:
    """An amount keeps its digits; no binary fraction touches it."""
    assert money(text) == Money(amount=Decimal(amount), currency=currency)


@pytest.mark.parametrize("text", ["", "25", "USD", "-1 USD", "1,50 EUR", "25 DOLLARS", "NaN USD"])
def test_what_is_no_money_is_refused(text: str) -> None:
    """A missing currency is not guessed."""
    with pytest.raises(ValidationError):
        money(text)


def test_money_is_written_with_two_digits() -> None:
    """People read cents."""
    assert str(money("1234.5 USD")) == "1234.50 USD"


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("90", 90),
        ("1.5", 1.5),
        (90, 90),
        ("48s", 48),
        ("0.5s", 0.5),
        ("90m", 5400),
        ("2h 30m", 9000),
        ("2h30m", 9000),
        ("1d", 86400),
        ("1d 2h 3m 4s", 93784),
        ("PT1H", 3600),
    ],
)
def test_durations_are_read_as_people_write_them(given: Any, seconds: float) -> None:
    """Seconds, units and ISO 8601."""
    assert DURATION.validate_python(given) == timedelta(seconds=seconds)


@pytest.mark.parametrize("given", ["", " ", "soon", "5 parsecs", "-5", "0", "30m 2h", "-PT1H"])
def test_what_is_no_duration_is_refused(given: str) -> None:
    """Nothing, nonsense, zero and the past."""
    with pytest.raises(ValidationError):
        DURATION.validate_python(given)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (48.4, "48s"), (59.6, "1m 00s"), (605, "10m 05s"), (7500, "2h 05m")],
)
def test_durations_are_written_short(seconds: float, text: str) -> None:
    """Two units are enough."""
    assert format_duration(timedelta(seconds=seconds)) == text


def test_what_is_within_the_budget_passes() -> None:
    """Up to the limit is within it; what is unknown does not stop a run."""
    budget = Budget(max_cost=money("5 USD"), max_duration=timedelta(hours=1))
    budget.check(Estimate(cost=money("5 USD"), duration=timedelta(hours=1)))
    budget.check(Estimate())
    budget.check(Estimate(cost=money("0 EUR")))
    Budget().check(Estimate(cost=money("1000000 USD")))


@pytest.mark.parametrize(
    ("estimate", "limit", "found"),
    [
        (Estimate(cost=money("5.01 USD")), "5.00 USD", "5.01 USD"),
        (Estimate(cost=money("1 EUR")), "5.00 USD", "1.00 EUR"),
        (Estimate(duration=timedelta(minutes=61)), "1h 00m", "1h 01m"),
    ],
)
def test_what_is_above_the_budget_is_refused(estimate: Estimate, limit: str, found: str) -> None:
    """The error says both sides; another currency cannot be compared, so it stops too."""
    budget = Budget(max_cost=money("5 USD"), max_duration=timedelta(hours=1))
    with pytest.raises(BudgetExceeded) as caught:
        budget.check(estimate)
    assert (caught.value.limit, caught.value.found) == (limit, found)
    assert caught.value.hint
