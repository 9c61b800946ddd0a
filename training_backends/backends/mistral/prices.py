"""What the hosted service asked for, with dates; another server has its own prices."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from types import MappingProxyType

from training_backends.core.estimate import Money, PriceSource

__all__ = ["MINIMUM_FEE_NOTE", "STORAGE_NOTE", "Price", "find_price"]

MINIMUM_FEE_NOTE = "The hosted service asked for at least 4 USD a job; cost leaves that out."
STORAGE_NOTE = "The hosted service asked for 2 USD a month for each model that is kept."


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
