"""Money, token counts, durations and what a run is expected to take."""

import re
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from training_backends.core.errors import BudgetExceeded

__all__ = ["Budget", "Duration", "Estimate", "Money", "PriceSource", "format_duration"]

_MONEY = re.compile(r"^\s*(?P<amount>\d+(?:\.\d+)?)\s*(?P<currency>[A-Za-z]{3})\s*$")
_DURATION = re.compile(r"^(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+(?:\.\d+)?)s)?$")


class Money(BaseModel):
    """An amount of one currency; also read from text such as `12.50 USD`."""

    model_config = ConfigDict(frozen=True)

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


def _span(**parts: float) -> timedelta:
    try:
        return timedelta(**parts)
    except OverflowError:
        raise ValueError("the duration is too long") from None


def _read_duration(value: Any) -> Any:
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
"""A positive span of time: seconds, `90m`, `2h 30m`, `1d` or ISO 8601."""


def format_duration(span: timedelta) -> str:
    """Write a span the way people say it, for example `2h 05m` or `48s`."""
    seconds = round(span.total_seconds())
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


class PriceSource(BaseModel):
    """Where a price comes from and when it was true."""

    model_config = ConfigDict(frozen=True)

    name: str
    as_of: date


class Estimate(BaseModel):
    """What a run is expected to take. What is not known is None, with a reason in `notes`.

    Attributes:
        train_tokens: Tokens that will be trained on, all epochs together.
        data_tokens: Tokens in the training files, counted once.
        steps: Optimizer steps.
        cost: What the provider will ask for, or None.
        duration: Expected time from start to end, or None.
        basis: `quote` is the provider's own word; `exact` was counted here;
            `sampled` was counted on a sample, with the 95 % interval in `interval`.
        interval: Lower and upper bound of `data_tokens` when `sampled`.
        price_source: Where `cost` comes from.
        notes: What the numbers rest on, and why any of them is missing.
    """

    model_config = ConfigDict(frozen=True)

    train_tokens: int | None = None
    data_tokens: int | None = None
    steps: int | None = None
    cost: Money | None = None
    duration: timedelta | None = None
    basis: Literal["quote", "exact", "sampled"] = "exact"
    interval: tuple[int, int] | None = None
    price_source: PriceSource | None = None
    notes: tuple[str, ...] = ()


class Budget(BaseModel):
    """What a run may take at most; a limit that is not set does not limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_cost: Money | None = Field(default=None, description="For example '25 USD'.")
    max_duration: Duration | None = Field(default=None, description="For example '2h'.")

    def check(self, estimate: Estimate) -> None:
        """Refuse an estimate that is above the budget; what is unknown passes.

        Raises:
            BudgetExceeded: Cost or duration is above its limit, or the cost is in a
                currency that cannot be compared with the limit.
        """
        if self.max_cost and estimate.cost:
            if estimate.cost.amount and estimate.cost.currency != self.max_cost.currency:
                raise BudgetExceeded(
                    f"The cost is {estimate.cost}, the budget is in {self.max_cost.currency}; "
                    "they cannot be compared.",
                    hint=f"Give budget.max_cost in {estimate.cost.currency}.",
                    limit=str(self.max_cost),
                    found=str(estimate.cost),
                )
            if estimate.cost.amount > self.max_cost.amount:
                raise BudgetExceeded(
                    f"The run would cost {estimate.cost}; the budget allows {self.max_cost}.",
                    hint="Raise budget.max_cost or train on fewer tokens.",
                    limit=str(self.max_cost),
                    found=str(estimate.cost),
                )
        if self.max_duration and estimate.duration and estimate.duration > self.max_duration:
            limit, found = format_duration(self.max_duration), format_duration(estimate.duration)
            raise BudgetExceeded(
                f"The run would take {found}; the budget allows {limit}.",
                hint="Raise budget.max_duration or train for fewer steps.",
                limit=limit,
                found=found,
            )
