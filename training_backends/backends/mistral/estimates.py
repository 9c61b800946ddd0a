"""Estimate tokens, steps and cost from data and known prices, without guessing."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from training_backends.backends.mistral.job_state import passes
from training_backends.backends.mistral.prices import FEES_NOTE, Price, find_price, with_fees
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.escape import plural
from training_backends.core.estimate import CostItem, Estimate, Money, add_up
from training_backends.protocols.mistral.status import job_type_of
from training_backends.rundir.directory import rows_per_epoch
from training_backends.tokens import TokenCount
from training_backends.tokens.counts import SAMPLE_NOTE

__all__ = ["count_epoch", "estimate_from_count", "sequence_length"]

_SEQ_LEN: Mapping[str, int] = MappingProxyType({"completion": 32_768, "classifier": 16_384})
"""According to the service's documentation, 2025."""
_WEIGHTS_NOTE = (
    "File weights are interpreted as by our gateway: rows of a file with weight 2 are sampled "
    "twice as often as with weight 1, and an epoch has as many rows as all files together."
)
_WEIGHTS_UNKNOWN = "How the hosted service interpreted them is unknown."


def sequence_length(config: TrainingConfig) -> int:
    """Return the sequence length in tokens: as configured, or the service's default."""
    return config.hyperparameters.seq_len or _SEQ_LEN[job_type_of(config.method)]


def count_epoch(dataset: Dataset, counts: Sequence[TokenCount]) -> tuple[TokenCount, TokenCount]:
    """Return the tokens of the training data, and per epoch, which differs with file weights.

    Args:
        counts: Tokens of each training file, each row once.
    """
    weights = tuple(file.weight for file in dataset.train)
    once = _sum(counts, [1.0] * len(counts))
    if len(set(weights)) <= 1:
        return once, once
    rows = tuple(file.rows for file in dataset.train)
    shares = [
        seen / (there or 1) for seen, there in zip(rows_per_epoch(rows, weights), rows, strict=True)
    ]
    return once, _sum(counts, shares)


def _sum(counts: Sequence[TokenCount], shares: Sequence[float]) -> TokenCount:
    """Return the weighted sum of the counts of several files, with independent errors."""
    total = variance = 0.0
    for counted, share in zip(counts, shares, strict=True):
        if counted.data_tokens is None:
            return counted
        total += share * counted.data_tokens
        if counted.interval:
            variance += (share * (counted.interval[1] - counted.data_tokens)) ** 2
    margin = math.sqrt(variance)
    interval = max(0, math.floor(total - margin)), math.ceil(total + margin)
    return TokenCount(
        data_tokens=round(total),
        basis="sampled" if variance else "exact",
        interval=interval if variance else None,
        tokenizer=counts[0].tokenizer if counts else None,
        seq_len=counts[0].seq_len if counts else None,
        over=sum(counted.over or 0 for counted in counts),
        notes=tuple(dict.fromkeys(note for counted in counts for note in counted.notes)),
    )


def estimate_from_count(
    config: TrainingConfig, count: TokenCount, epoch: TokenCount | None = None, *, hosted: bool
) -> Estimate:
    """Estimate tokens, steps, epochs and cost from a count of the training data.

    Args:
        epoch: Tokens of one epoch, if different from `count`.
        hosted: Whether the server is the provider's own service, whose prices are known.
    """
    epoch = epoch or count
    notes = list(count.notes)
    if count.basis == "sampled":
        notes.append(SAMPLE_NOTE)
    if count.data_tokens is None:
        notes.append(f"Token count unknown: {count.reason}.")
    elif count.over and count.seq_len:
        about = "About " if count.basis == "sampled" else ""
        notes.append(
            f"{about}{plural(count.over, 'row')} longer than the sequence length of "
            f"{count.seq_len:,} tokens; how the server handles the rest is unknown."
        )
    if len({source.weight for source in config.data.train}) > 1:
        notes.append(f"{_WEIGHTS_NOTE} {_WEIGHTS_UNKNOWN}" if hosted else _WEIGHTS_NOTE)
    # Observed at the hosted service only.
    price = find_price(config.base_model, job_type_of(config.method)) if hosted else None
    train_tokens, steps = _amounts(config, epoch.data_tokens, price, notes)
    costs: tuple[CostItem, ...] = ()
    if not hosted:
        notes.append("Cost unknown: the server quotes it after checking the data.")
    elif price is None:
        notes.append(f"Cost unknown: no price is known for {config.base_model}. {FEES_NOTE}")
    elif train_tokens is None:
        notes.append(f"Cost unknown, because trained tokens are unknown. {FEES_NOTE}")
    else:
        costs, note = with_fees(price.cost(train_tokens), price.source)
        notes.append(note)
    notes.append("Duration unknown: it depends on the server, and there is no earlier run on it.")
    return Estimate(
        train_tokens=train_tokens,
        data_tokens=count.data_tokens,
        steps=steps,
        epochs=config.hyperparameters.epochs or passes(train_tokens, epoch.data_tokens),
        costs=costs,
        cost_interval=_cost_interval(config, epoch, price) if costs else None,
        basis=count.basis,
        interval=count.interval,
        notes=tuple(notes),
    )


def _cost_interval(
    config: TrainingConfig, epoch: TokenCount, price: Price | None
) -> tuple[Money, Money] | None:
    """Return the cost at the bounds of a sampled count; None if all rows were counted."""
    epochs = config.hyperparameters.epochs
    if price is None or epochs is None or epoch.interval is None:
        return None
    bounds: list[Money] = []
    for tokens in epoch.interval:
        items, _ = with_fees(price.cost(math.ceil(tokens * epochs)), price.source)
        bounds += add_up(item.amount for item in items)
    return (bounds[0], bounds[1]) if len(bounds) == 2 else None  # several currencies


def _amounts(
    config: TrainingConfig, epoch_tokens: int | None, price: Price | None, notes: list[str]
) -> tuple[int | None, int | None]:
    """Return trained tokens and steps; unknown values are None and noted."""
    hyper = config.hyperparameters
    per_step = price.tokens_per_step if price else None
    if hyper.training_steps is not None:
        if per_step is None:
            notes.append("Trained tokens unknown: the server decides how many tokens make a step.")
            return None, hyper.training_steps
        return hyper.training_steps * per_step, hyper.training_steps
    if hyper.epochs is None:
        notes.append("Trained tokens unknown: neither epochs nor training_steps is set.")
        return None, None
    if epoch_tokens is None:
        return None, None
    train_tokens = math.ceil(epoch_tokens * hyper.epochs)
    if per_step is None:
        notes.append("Steps unknown: the server decides how many tokens make a step.")
        return train_tokens, None
    return train_tokens, max(1, math.ceil(train_tokens / per_step))
