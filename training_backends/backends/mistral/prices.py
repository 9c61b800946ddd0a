"""What the hosted service asked for, with dates; another server has its own prices."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from training_backends.core.estimate import CostItem, Money, PriceSource

__all__ = ["FEES_NOTE", "Price", "find_price", "with_fees"]

# "Fine-tuning", the service's own documentation: a minimum for each job, and a fee a month for
# each model. It still said so when it was marked deprecated.
_DOCUMENTATION: Final = PriceSource(
    name="documentation of the hosted service", as_of=date(2026, 3, 2)
)
_MINIMUM: Final = Money(amount=Decimal(4), currency="USD")
_STORAGE: Final = Money(amount=Decimal(2), currency="USD")

FEES_NOTE: Final = (
    f"The hosted service asked for at least {_MINIMUM} a job, and {_STORAGE} a month for each "
    "model that is kept."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What training costs.

    Attributes:
        per_million: For a million tokens, each epoch counted.
        tokens_per_step: Tokens that one optimizer step took, where that was seen.
    """

    per_million: Money
    source: PriceSource
    tokens_per_step: int | None = None

    def cost(self, train_tokens: int) -> Money:
        """Return the cost of training on so many tokens, to the hundredth of a cent."""
        amount = self.per_million.amount * train_tokens / Decimal(1_000_000)
        return Money(amount=amount.quantize(Decimal("0.0001")), currency=self.per_million.currency)


def with_fees(training: Money, source: PriceSource) -> tuple[tuple[CostItem, ...], str]:
    """Return all parts of what a job at the hosted service costs, and a note about them.

    A price in another currency than the fees cannot be held against the minimum, so what is
    missing to it is left out then, which the note says.
    """
    items = [CostItem(name="training", amount=training, source=source)]
    note = f"Storage of {_STORAGE} is for the first month; each further one costs the same."
    if training.currency != _MINIMUM.currency:
        note = (
            f"The training is priced in {training.currency}, the fees are in "
            f"{_MINIMUM.currency}: they cannot be added, and whether the minimum of {_MINIMUM} "
            f"a job is reached is not known. {note}"
        )
    elif training.amount < _MINIMUM.amount:
        missing = Money(amount=_MINIMUM.amount - training.amount, currency=_MINIMUM.currency)
        items.append(
            CostItem(name=f"up to the minimum of {_MINIMUM}", amount=missing, source=_DOCUMENTATION)
        )
    items.append(CostItem(name="storage, first month", amount=_STORAGE, source=_DOCUMENTATION))
    return tuple(items), note


def _seen(amount: str, currency: str, as_of: date, tokens_per_step: int | None = None) -> Price:
    # Cost divided by train_tokens in answers of the live service.
    return Price(
        per_million=Money(amount=Decimal(amount), currency=currency),
        source=PriceSource(name="cost / train_tokens of jobs at the hosted service", as_of=as_of),
        tokens_per_step=tokens_per_step,
    )


_PRICES: Mapping[tuple[str, str], Price] = MappingProxyType(
    {
        ("open-mistral-7b", "completion"): _seen("2.00", "USD", date(2024, 7, 1), 131_072),
        ("pixtral-12b-latest", "completion"): _seen("2.00", "USD", date(2025, 7, 1)),
        ("ministral-3b-latest", "classifier"): _seen("0.50", "EUR", date(2025, 4, 1), 65_536),
    }
)


def find_price(model: str, job_type: str) -> Price | None:
    """Return what is known of the price of training `model`; None if nothing is."""
    return _PRICES.get((model, job_type))
