"""The loss over the tokens that count, and which of them were predicted right."""

import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from training_backends.datasets.rows import TextRow, parse_row
from training_backends.tokens.encoders import Encoder
from training_backends.trainer.data import (
    IGNORED,
    Pack,
    Sample,
    collate,
    collate_packs,
    make_sample,
)
from training_backends.trainer.fim import cut_out
from training_backends.trainer.head import SummedLoss, fits_one_head, sum_loss
from training_backends.trainer.objective import Batch, Judged, Reading

__all__ = ["Predicted", "TokenObjective", "predict", "predict_sums"]

_PLAIN_HEADS: Final = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3"})
"""Architectures whose logits are `lm_head(hidden)` and nothing else."""
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")
_SHORTER: Final = 0.98
"""A little less than would fit if all characters took as many tokens."""


class Predicted(NamedTuple):
    """What a model says where it counts, one value a token that does.

    Attributes:
        losses: Nats.
        correct: Whether the model puts the token first.
        counted: Where these tokens are in the batch; its first column is left out.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    counted: torch.Tensor


def predict(model: Any, batch: Batch) -> Predicted:
    """Run a causal model over a batch and judge the tokens that count."""
    counted, targets = _counted(batch)
    logits = _logits(model, batch, counted).float()
    losses = cross_entropy(logits, targets, reduction="none")
    return Predicted(losses, logits.detach().argmax(dim=-1) == targets, counted)


def predict_sums(model: Any, batch: Batch) -> SummedLoss:
    """Do the same where only the sums matter, which takes less memory."""
    counted, targets = _counted(batch)
    causal = _causal(model)
    if _has_plain_head(causal) and fits_one_head(causal.lm_head):
        return sum_loss(_hidden(causal, batch, counted), causal.lm_head.weight, targets)
    found = predict(model, batch)
    return SummedLoss(found.losses.sum(), found.correct.sum())


def _counted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    return counted, labels[counted]


def _logits(model: Any, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
    causal = _causal(model)
    if not _has_plain_head(causal):
        logits: torch.Tensor = model(**_inputs(batch), use_cache=False).logits
        return logits[:, :-1][counted]
    result: torch.Tensor = causal.lm_head(_hidden(causal, batch, counted))
    return result


def _hidden(causal: Any, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
    # The head only where it counts: with a large vocabulary the logits of all positions take
    # most of the time and memory. Adapters sit inside the modules, so they take part.
    hidden: torch.Tensor = causal.model(**_inputs(batch), use_cache=False).last_hidden_state
    return hidden[:, :-1][counted]


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in _INPUTS if name in batch}


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_plain_head(causal: Any) -> bool:
    return causal.config.model_type in _PLAIN_HEADS


class TokenObjective:
    """Learn to continue texts and to answer in conversations, token by token.

    Args:
        fim_ratio: Share of texts whose middle is learnt from both its ends.
        seed: Decides which, and where they are cut.
        flat: How packs are laid out, see `collate_packs`.
    """

    parts = ("",)
    weights = (1.0,)
    has_accuracy = True

    def __init__(
        self,
        encoder: Encoder,
        seq_len: int,
        *,
        fim_ratio: float = 0.0,
        seed: int = 0,
        flat: bool = False,
    ) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._fim_ratio = fim_ratio
        self._seed = seed
        self._flat = flat
        if fim_ratio:
            encoder.fill_in("", "", "")  # refuses a model that cannot

    def read(self, line: bytes, place: str) -> Reading:
        """Encode a conversation or a text."""
        row = parse_row(line)
        if self._fim_ratio and isinstance(row, TextRow):
            chance = random.Random(f"{self._seed}/fim/{place}")  # noqa: S311  # no secret
            if chance.random() < self._fim_ratio:
                return self._fill_in(row.text, chance)
        ids, trained = self._encoder.encode(row)
        return Reading(make_sample(ids, trained, self._seq_len), len(ids) > self._seq_len)

    def _fill_in(self, text: str, chance: random.Random) -> Reading:
        # Cutting the tokens off would take the middle, which stands last: shorten the text.
        truncated = False
        while True:
            ids, trained = self._encoder.fill_in(*cut_out(text, chance))
            if len(ids) <= self._seq_len:
                return Reading(make_sample(ids, trained, self._seq_len), truncated)
            truncated = True
            text = text[: int(_SHORTER * len(text) * self._seq_len / len(ids))]

    def collate(self, examples: Sequence[Sample | Pack]) -> Batch:
        """Pad samples, or lay packs out."""
        packs = [example for example in examples if isinstance(example, Pack)]
        if packs:
            return collate_packs(packs, self._encoder.pad_id, flat=self._flat)
        samples = [example for example in examples if isinstance(example, Sample)]
        return collate(samples, self._encoder.pad_id)

    def count(self, examples: Sequence[Sample | Pack]) -> list[int]:
        """Return how many tokens count."""
        rows = (e.samples if isinstance(e, Pack) else (e,) for e in examples)
        return [sum(int((s.labels != IGNORED).sum()) for samples in rows for s in samples)]

    def judge(self, model: Any, batch: Batch) -> Judged:
        """Return the loss over the tokens that count."""
        found = predict_sums(model, batch)
        counts = (batch["labels"][:, 1:] != IGNORED).sum()
        return Judged(found.loss[None], found.correct[None], counts[None], {})
