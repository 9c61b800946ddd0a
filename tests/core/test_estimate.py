"""Money, durations and budgets."""

from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from training_backends import Budget, BudgetExceeded, Estimate, Money, PriceSource
from training_backends.core.estimate import CostItem, Duration, add_up, format_duration

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


TABLE = PriceSource(name="a table", as_of=date(2026, 1, 1))


def item(name: str, amount: str) -> CostItem:
    return CostItem(name=name, amount=money(amount), source=TABLE)


@pytest.mark.parametrize(
    ("amounts", "sums"),
    [
        ([], []),
        (["1.10 USD", "2.20 USD"], ["3.30 USD"]),
        (["1 EUR", "2 USD", "3 EUR"], ["4.00 EUR", "2.00 USD"]),
        (["0 EUR", "2 USD"], ["2.00 USD"]),
        (["0 EUR", "0 USD"], ["0.00 EUR"]),
    ],
)
def test_money_is_added_within_a_currency(amounts: list[str], sums: list[str]) -> None:
    """No rate of exchange is made up."""
    assert [str(total) for total in add_up(map(money, amounts))] == sums


def test_cost_is_the_sum_of_its_parts() -> None:
    """Whoever gives the parts need not add them, and cannot say another sum."""
    parts = (item("training", "3 USD"), item("storage", "2 USD"))
    found = Estimate(costs=parts)
    assert (str(found.cost), found.price_source) == ("5.00 USD", TABLE)
    assert Estimate.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError, match=r"its items add up to 5\.00 USD"):
        Estimate(costs=parts, cost=money("4 USD"))


def test_parts_in_two_currencies_have_no_sum() -> None:
    """The cost is not known then, but each currency's part of it is."""
    found = Estimate(costs=(item("training", "3 EUR"), item("storage", "2 USD")))
    assert found.cost is None
    assert [str(total) for total in found.totals] == ["3.00 EUR", "2.00 USD"]
    for limit in ("1 EUR", "100 EUR", "100 USD"):
        with pytest.raises(BudgetExceeded):
            Budget(max_cost=money(limit)).check(found)


def test_quote_keeps_what_was_worked_out_here() -> None:
    """A quote replaces an estimate, says how it differs, and stays the same when it comes again."""
    ours = Estimate(train_tokens=1000, cost=money("2 USD"))
    quote = Estimate(basis="quote", train_tokens=1100, cost=money("1.50 USD")).replacing(ours)
    assert quote.ours == ours
    assert quote.differences == (
        "trained tokens: 1,100 quoted, 1,000 estimated locally (10.0% more)",
        "cost: 1.50 USD quoted, 2.00 USD estimated locally (0.50 USD less)",
    )
    again = Estimate(basis="quote", train_tokens=1100).replacing(quote)
    assert again.ours == ours
    assert ours.replacing(quote) is ours


def test_equal_quote_says_so() -> None:
    """Where the provider says what was estimated, that is what is told; the unknown is not."""
    ours = Estimate(train_tokens=1000)
    quote = Estimate(basis="quote", train_tokens=1000, cost=money("1 USD")).replacing(ours)
    assert quote.differences == ("trained tokens: 1,000 quoted, same as estimated locally",)


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


@pytest.mark.parametrize(
    ("budget", "estimate", "decides"),
    [
        (Budget(max_cost=money("5 USD")), Estimate(cost=money("4 USD")), True),
        (Budget(max_cost=money("5 USD")), Estimate(), False),
        (Budget(), Estimate(cost=money("4 USD")), False),
        (
            Budget(max_cost=money("5 USD")),
            Estimate(costs=(item("training", "3 EUR"), item("storage", "2 USD"))),
            True,
        ),
    ],
)
def test_a_budget_decides_only_on_a_known_cost(
    budget: Budget, estimate: Estimate, decides: bool
) -> None:
    """A limit that cannot be compared with anything is not consent."""
    assert budget.decides(estimate) is decides


def test_a_budget_is_compared_with_the_upper_bound_of_a_sample() -> None:
    """A cost or duration that may be above its limit is above it."""
    low, cost, high = (Money.model_validate(f"{amount} USD") for amount in (9, 10, 11))
    sampled = Estimate(
        cost=cost,
        cost_interval=(low, high),
        data_tokens=1000,
        interval=(900, 1100),
        duration=timedelta(minutes=100),
        basis="sampled",
    )
    Budget.model_validate({"max_cost": "11 USD", "max_duration": "110m"}).check(sampled)
    with pytest.raises(BudgetExceeded, match=r"up to 11\.00 USD"):
        Budget.model_validate({"max_cost": "10.50 USD"}).check(sampled)
    with pytest.raises(BudgetExceeded, match="up to"):
        Budget.model_validate({"max_duration": "109m"}).check(sampled)
