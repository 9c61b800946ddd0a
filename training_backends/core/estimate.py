"""Estimates of tokens, cost and duration of a run, and its budget."""

import re
from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from training_backends.core.errors import BudgetExceeded

__all__ = [
    "Budget",
    "CostItem",
    "Duration",
    "Estimate",
    "Money",
    "PriceSource",
    "add_up",
    "format_duration",
]

_MONEY = re.compile(r"^\s*(?P<amount>\d+(?:\.\d+)?)\s*(?P<currency>[A-Za-z]{3})\s*$")
_DURATION = re.compile(r"^(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+(?:\.\d+)?)s)?$")


class Money(BaseModel, frozen=True):
    """An amount in one currency; may be given as text such as `12.50 USD`."""

    amount: Decimal = Field(ge=0)
    currency: str = Field(pattern="^[A-Z]{3}$", description="ISO 4217 code.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = _MONEY.match(value)
        if not found:
            raise ValueError("give an amount and a currency, for example '25 USD'")
        try:
            return {"amount": Decimal(found["amount"]), "currency": found["currency"].upper()}
        except InvalidOperation as error:
            raise ValueError(f"not a number: {found['amount']}") from error

    def __str__(self) -> str:
        return f"{self.amount:.2f} {self.currency}"


def add_up(amounts: Iterable[Money]) -> tuple[Money, ...]:
    """Return the sum per currency; zero sums are dropped if there are others."""
    sums: dict[str, Decimal] = {}
    for money in amounts:
        sums[money.currency] = sums.get(money.currency, Decimal(0)) + money.amount
    nonzero = {currency: amount for currency, amount in sums.items() if amount}
    kept = nonzero or dict(list(sums.items())[:1])
    return tuple(Money(amount=amount, currency=currency) for currency, amount in kept.items())


def _span(**parts: float) -> timedelta:
    try:
        return timedelta(**parts)
    except OverflowError:
        raise ValueError("the duration is too long") from None


def _read_duration(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give seconds or a duration such as '90m', not true or false")  # noqa: TRY004
    if isinstance(value, str):
        text = value.strip()
        if text.replace(".", "", 1).isdigit():
            return _span(seconds=float(text))
        found = _DURATION.match(text)
        if text and found:
            days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
            return _span(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if not text.startswith(("P", "-P")):
            raise ValueError("give seconds or a duration such as '90m', '2h 30m' or '1d'")
    return value


Duration = Annotated[timedelta, BeforeValidator(_read_duration), Field(gt=timedelta(0))]
"""A positive duration: seconds, `90m`, `2h 30m`, `1d` or ISO 8601."""


def format_duration(span: timedelta) -> str:
    """Format a duration for people, for example `2h 05m` or `48s`."""
    seconds = round(span.total_seconds())
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


class PriceSource(BaseModel, frozen=True):
    """The source of a price and its date."""

    name: str
    as_of: date


class CostItem(BaseModel, frozen=True):
    """One item of the cost of a run, such as the training or a month of storage."""

    name: str
    amount: Money
    source: PriceSource


class Estimate(BaseModel, frozen=True):
    """The expected tokens, cost and duration of a run. Unknown values are None; see `notes`.

    Attributes:
        train_tokens: Trained (billed) tokens over all epochs.
        data_tokens: Tokens in the training files, counted once.
        steps: Optimizer steps.
        epochs: Passes over the data.
        hyperparameters: Effective values, including the backend's defaults, by their names in
            `TrainingConfig.hyperparameters`; empty if the backend does not report them.
        costs: The items of `cost`. With several currencies, `cost` is None; see `totals`.
        cost: Expected price, or None; the sum of `costs`, if there are any.
        cost_interval: `cost` at the bounds of `interval`, if it depends on it.
        duration: Expected time from start to finish, or None.
        basis: Estimate method. `quote`: price quote of the provider; `exact`: counted locally;
            `sampled`: extrapolated from a sample, with a 95% interval in `interval`.
        interval: Lower and upper bound of `data_tokens` if `sampled`.
        price_source: Source of the training price.
        notes: How the numbers were obtained, and why any of them is missing.
        ours: Our own estimate, if this is the provider's quote.
    """

    train_tokens: int | None = None
    data_tokens: int | None = None
    steps: int | None = None
    epochs: float | None = None
    hyperparameters: dict[str, int | float] = Field(default_factory=dict)
    costs: tuple[CostItem, ...] = ()
    cost: Money | None = None
    cost_interval: tuple[Money, Money] | None = None
    duration: timedelta | None = None
    basis: Literal["quote", "exact", "sampled"] = "exact"
    interval: tuple[int, int] | None = None
    price_source: PriceSource | None = None
    notes: tuple[str, ...] = ()
    ours: "Estimate | None" = None

    @model_validator(mode="after")
    def _cost_is_the_sum(self) -> Self:
        if self.costs:
            totals = add_up(item.amount for item in self.costs)
            total = totals[0] if len(totals) == 1 else None
            if self.cost not in {None, total}:
                raise ValueError(f"cost is {self.cost}, but its items add up to {total}")
            object.__setattr__(self, "cost", total)  # the model is frozen
            if self.price_source is None:
                object.__setattr__(self, "price_source", self.costs[0].source)
        return self

    @property
    def totals(self) -> tuple[Money, ...]:
        """The cost per currency; empty if unknown."""
        if self.costs:
            return add_up(item.amount for item in self.costs)
        return () if self.cost is None else (self.cost,)

    @property
    def highest_totals(self) -> tuple[Money, ...]:
        """The cost per currency at the upper bound of `interval`; as `totals` if not sampled."""
        return (self.cost_interval[1],) if self.cost_interval else self.totals

    @property
    def longest_duration(self) -> timedelta | None:
        """The duration at the upper bound of `interval`; as `duration` if not sampled."""
        if self.duration is None or not (self.interval and self.data_tokens):
            return self.duration
        return self.duration * (self.interval[1] / self.data_tokens)

    @property
    def differences(self) -> tuple[str, ...]:
        """How a provider's quote differs from our own estimate, as text."""
        if self.ours is None:
            return ()
        found = []
        quoted, own = self.train_tokens, self.ours.train_tokens
        if quoted and own:
            by = f"{abs(quoted - own) / own:.1%} {'more' if quoted > own else 'less'}"
            found.append(_compared("trained tokens", f"{quoted:,}", f"{own:,}", by))
        price, own_price = self.cost, self.ours.cost
        if price and own_price and price.currency == own_price.currency:
            more = price.amount - own_price.amount
            by = f"{Money(amount=abs(more), currency=price.currency)} "
            by += "more" if more > 0 else "less"
            found.append(_compared("cost", str(price), str(own_price), by))
        return tuple(found)

    def replacing(self, earlier: "Estimate | None") -> Self:
        """Return this provider quote with the earlier local estimate in `ours`."""
        if self.basis != "quote" or self.ours is not None or earlier is None:
            return self
        ours = earlier.ours if earlier.basis == "quote" else earlier
        return self.model_copy(update={"ours": ours})


def _compared(what: str, quoted: str, own: str, by: str) -> str:
    if quoted == own:
        return f"{what}: {quoted} quoted, same as estimated locally"
    return f"{what}: {quoted} quoted, {own} estimated locally ({by})"


class Budget(BaseModel, frozen=True, extra="forbid"):
    """Limits on the cost and duration of a run; None: no limit."""

    max_cost: Money | None = Field(default=None, description="For example '25 USD'.")
    max_duration: Duration | None = Field(default=None, description="For example '2h'.")

    def decides(self, estimate: Estimate) -> bool:
        """Return whether `max_cost` is set and the cost is known; otherwise ask for consent."""
        return self.max_cost is not None and bool(estimate.totals)

    def check(self, estimate: Estimate) -> None:
        """Check an estimate against the budget, by its upper bounds if it rests on a sample.

        Unknown values pass; see `decides` for the cost. `max_duration` is also enforced while
        the run trains.

        Raises:
            BudgetExceeded: Cost or duration exceeds its limit, or the cost is in another
                currency than the limit.
        """
        if self.max_cost:
            self._check_cost(self.max_cost, estimate)
        duration = estimate.longest_duration
        if self.max_duration and duration and duration > self.max_duration:
            limit, found = format_duration(self.max_duration), format_duration(duration)
            up_to = "" if duration == estimate.duration else "up to "
            raise BudgetExceeded(
                f"The run would take {up_to}{found}; the budget allows {limit}.",
                hint="Raise budget.max_duration or train for fewer steps.",
                limit=limit,
                found=found,
            )

    @staticmethod
    def _check_cost(limit: Money, estimate: Estimate) -> None:
        totals = estimate.highest_totals
        found = " and ".join(map(str, totals))
        up_to = "" if totals == estimate.totals else "up to "
        for total in totals:
            if total.amount and total.currency != limit.currency:
                raise BudgetExceeded(
                    f"The cost is {found}, which cannot be compared with budget.max_cost in "
                    f"{limit.currency}.",
                    hint="Remove budget.max_cost and check the cost yourself."
                    if len(totals) > 1
                    else f"Set budget.max_cost in {total.currency}.",
                    limit=str(limit),
                    found=found,
                )
            if total.amount > limit.amount:
                raise BudgetExceeded(
                    f"The run would cost {up_to}{found}; the budget allows {limit}.",
                    hint="Raise budget.max_cost or train on fewer tokens.",
                    limit=str(limit),
                    found=found,
                )
