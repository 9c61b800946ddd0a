"""The loss over the tokens that count, and which of them were predicted right."""

from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from training_backends.engine.data import IGNORED, Batch

__all__ = ["Predicted", "predict"]

_PLAIN_HEADS: Final = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3"})
"""Architectures whose logits are `lm_head(hidden)` and nothing else."""


class Predicted(NamedTuple):
    """What a model says where it counts.

    Attributes:
        loss: Sum of the loss over `tokens` tokens, nats.
        correct: How many of them the model puts first.
    """

    loss: torch.Tensor
    correct: torch.Tensor
    tokens: int


def predict(model: Any, batch: Batch) -> Predicted:
    """Run a model over a batch and judge the tokens that count."""
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    targets = labels[counted]
    logits = _logits(model, batch, counted).float()
    loss = cross_entropy(logits, targets, reduction="sum")
    correct = (logits.detach().argmax(dim=-1) == targets).sum()
    return Predicted(loss, correct, int(targets.numel()))


def _logits(model: Any, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal.config.model_type not in _PLAIN_HEADS:
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1][counted]
    # The head only where it counts: with a large vocabulary the logits of all positions take
    # most of the time and memory. Adapters sit inside the modules, so they take part.
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    result: torch.Tensor = causal.lm_head(hidden[:, :-1][counted])
    return result
