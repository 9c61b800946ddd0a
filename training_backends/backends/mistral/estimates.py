"""What a run will take, as far as it can be counted and was priced; nothing is guessed."""

import math

from training_backends.backends.mistral.prices import MINIMUM_FEE_NOTE, Price, find_price
from training_backends.backends.mistral.requests import job_type_of
from training_backends.core.config import TrainingConfig
from training_backends.core.estimate import Estimate
from training_backends.datasets.tokens import TokenCount

__all__ = ["estimate_from_count"]


def estimate_from_count(config: TrainingConfig, count: TokenCount, *, hosted: bool) -> Estimate:
    """Work out tokens, steps and cost from a count of the training data."""
    data_tokens = count.data_tokens
    notes = [] if data_tokens is not None else [f"Tokens are not known: {count.reason}."]
    if len({source.weight for source in config.data.train}) > 1:
        notes.append("Tokens are those of the files as they are, whatever their weights.")
    # Both were seen at the hosted service and say nothing of another server.
    price = find_price(config.model, job_type_of(config)) if hosted else None
    train_tokens, steps = _amounts(config, data_tokens, price, notes)
    cost = None
    if not hosted:
        notes.append("Cost is not known: the server names it once it has checked the data.")
    elif price is None:
        notes.append(f"Cost is not known: no price was seen for {config.model}.")
    elif train_tokens is None:
        notes.append("Cost is not known because the number of trained tokens is not.")
    else:
        cost = price.cost(train_tokens)
        notes.append(MINIMUM_FEE_NOTE)
    notes.append("Duration is not known: it depends on the server.")
    return Estimate(
        train_tokens=train_tokens,
        data_tokens=data_tokens,
        steps=steps,
        cost=cost,
        basis=count.basis,
        interval=count.interval,
        price_source=price.source if price and cost else None,
        notes=tuple(notes),
    )


def _amounts(
    config: TrainingConfig, data_tokens: int | None, price: Price | None, notes: list[str]
) -> tuple[int | None, int | None]:
    """Return trained tokens and steps; what is not known is None and noted."""
    hyper = config.hyperparameters
    per_step = price.tokens_per_step if price else None
    if hyper.training_steps is not None:
        if per_step is None:
            notes.append("Trained tokens are not known: the server decides how many make a step.")
            return None, hyper.training_steps
        return hyper.training_steps * per_step, hyper.training_steps
    if hyper.epochs is None:
        notes.append("Trained tokens are not known: neither epochs nor training_steps is set.")
        return None, None
    if data_tokens is None:
        return None, None
    train_tokens = math.ceil(data_tokens * hyper.epochs)
    if per_step is None:
        notes.append("Steps are not known: the server decides how many tokens make one.")
        return train_tokens, None
    return train_tokens, max(1, math.ceil(train_tokens / per_step))
