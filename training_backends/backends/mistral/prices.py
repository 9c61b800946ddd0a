"""Known prices of the hosted service, with dates; other servers have their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from types import MappingProxyType
from typing import Final

from training_backends.core.estimate import CostItem, Money, PriceSource

__all__ = ["FEES_NOTE", "Price", "find_price", "with_fees"]

# "Fine-tuning" in the service's documentation: a minimum per job and a monthly fee per model.
# Unchanged when it was marked deprecated.
_DOCUMENTATION: Final = PriceSource(
    name="documentation of the hosted service", as_of=date(2026, 3, 2)
)
_MINIMUM: Final = Money(amount=Decimal(4), currency="USD")
_STORAGE: Final = Money(amount=Decimal(2), currency="USD")

FEES_NOTE: Final = (
    f"The hosted service charged at least {_MINIMUM} per job, and {_STORAGE} per month for each "
    "stored model."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The price of training a model.

    Attributes:
        per_million: Price per million trained tokens (tokens times epochs).
        tokens_per_step: Tokens per optimizer step, if observed.
    """

    per_million: Money
    source: PriceSource
    tokens_per_step: int | None = None

    def cost(self, train_tokens: int) -> Money:
        """Return the cost of trained tokens, rounded to a hundredth of a cent."""
        amount = self.per_million.amount * train_tokens / Decimal(1_000_000)
        return Money(amount=amount.quantize(Decimal("0.0001")), currency=self.per_million.currency)


def with_fees(training: Money, source: PriceSource) -> tuple[tuple[CostItem, ...], str]:
    """Return the cost items of a job at the hosted service, and a note about them.

    A price in another currency than the fees cannot be compared with the minimum, so the fees
    are omitted, which the note explains.
    """
    items = [CostItem(name="training", amount=training, source=source)]
    note = f"Storage of {_STORAGE} is for the first month; later months cost the same."
    if training.currency != _MINIMUM.currency:
        note = (
            f"Training is priced in {training.currency} and fees in {_MINIMUM.currency}, so they "
            f"are not added, and the minimum of {_MINIMUM} per job is not applied. {note}"
        )
    elif training.amount < _MINIMUM.amount:
        missing = Money(amount=_MINIMUM.amount - training.amount, currency=_MINIMUM.currency)
        items.append(
            CostItem(name=f"up to the minimum of {_MINIMUM}", amount=missing, source=_DOCUMENTATION)
        )
    items.append(CostItem(name="storage, first month", amount=_STORAGE, source=_DOCUMENTATION))
    return tuple(items), note


def _seen(amount: str, currency: str, as_of: date, tokens_per_step: int | None = None) -> Price:
    # Cost divided by train_tokens in responses of the live service.
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
    """Return the known price of training `model`, or None."""
    return _PRICES.get((model, job_type))
