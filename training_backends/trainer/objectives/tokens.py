"""Next-token loss and accuracy over the tokens in the loss."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from training_backends.tokens.encoders import Encoder
from training_backends.trainer.data import (
    IGNORED,
    EncodedRow,
    Pack,
    collate,
    collate_packs,
)
from training_backends.trainer.objective import Batch, BatchLoss

__all__ = [
    "Predicted",
    "SummedLoss",
    "TokenObjective",
    "fits_one_head",
    "predict",
    "sum_loss",
]


_LOGITS: Final = {"cpu": 1 << 23, "cuda": 1 << 27}
"""Logits per chunk: few enough for a CPU's caches, many enough to keep a GPU busy."""


class SummedLoss(NamedTuple):
    """Sums over all tokens in the loss.

    Attributes:
        loss: In nats; differentiable.
        correct: Number of tokens that are the model's top prediction.
    """

    loss: torch.Tensor
    correct: torch.Tensor


def fits_one_head(head: Any) -> bool:
    """Return whether the output layer is a plain matrix, with no bias and no adapter."""
    return type(head) is torch.nn.Linear and head.bias is None


def sum_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> SummedLoss:
    """Return the summed cross entropy of `hidden @ weight.T`.

    Computes logits and their gradients in chunks, so that neither is stored for all tokens nor
    computed twice. This works because every token has the same weight in a sum.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    loss, correct = _SummedLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return SummedLoss(loss, correct)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = hidden.device.type
        computes_less = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if computes_less else weight.dtype
        of_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        of_weight = torch.zeros_like(weight) if weight.requires_grad else None
        loss = torch.zeros((), device=hidden.device)
        correct = torch.zeros((), device=hidden.device, dtype=torch.int64)
        size = max(1, _LOGITS.get(kind, _LOGITS["cuda"]) // len(weight))
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for first in range(0, len(hidden), size):
                part = hidden[first : first + size].to(dtype)
                target_ids = targets[first : first + size, None]
                logits = (part @ matrix.T).float()
                top, best = logits.max(dim=1, keepdim=True)
                correct += (best == target_ids).sum()
                target_logits = logits.gather(1, target_ids)
                shares = logits.sub_(top).exp_()
                sums = shares.sum(dim=1, keepdim=True)
                loss += (top + sums.log() - target_logits).sum()
                if of_hidden is None and of_weight is None:
                    continue
                shares.div_(sums).scatter_add_(1, target_ids, torch.full_like(sums, -1.0))
                shares = shares.to(dtype)
                if of_hidden is not None:
                    of_hidden[first : first + size] = shares @ matrix
                if of_weight is not None and of_weight.dtype == dtype:
                    of_weight.addmm_(shares.T, part)
                elif of_weight is not None:
                    of_weight += shares.T @ part
        # Not `save_for_backward`: saved tensors would outlive the accumulation.
        ctx.gradients = of_hidden, of_weight
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, loss: torch.Tensor, correct: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        del correct
        of_hidden, of_weight = ctx.gradients
        del ctx.gradients
        return (
            None if of_hidden is None else of_hidden.mul_(loss),
            None if of_weight is None else of_weight.mul_(loss),
            None,
        )


_PLAIN_HEADS: Final = frozenset(
    {"llama", "ministral", "ministral3", "mistral", "mistral3", "mixtral", "qwen2", "qwen3"}
)
"""Architectures whose logits are exactly `lm_head(hidden)`."""
_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")


class Predicted(NamedTuple):
    """Predictions for the tokens in the loss, one value per token.

    Attributes:
        losses: In nats.
        correct: Whether the token is the model's top prediction.
        counted: Mask of these tokens in the batch, without its first column.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    counted: torch.Tensor


def predict(model: Any, batch: Batch) -> Predicted:
    """Run a causal model over a batch; return the loss and correctness of each token."""
    counted, targets = _counted(batch)
    logits = _logits(model, batch, counted).float()
    losses = cross_entropy(logits, targets, reduction="none")
    return Predicted(losses, logits.detach().argmax(dim=-1) == targets, counted)


def _predict_sums(model: Any, batch: Batch) -> SummedLoss:
    """Do the same, but return only the sums, which takes less memory."""
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
    # Apply the head only to tokens in the loss: with a large vocabulary, the logits of all
    # positions take most of the time and memory. Adapters are inside the modules and still apply.
    hidden: torch.Tensor = causal.model(**_inputs(batch), use_cache=False).last_hidden_state
    return hidden[:, :-1][counted]


def _inputs(batch: Batch) -> Batch:
    return {name: batch[name] for name in _INPUTS if name in batch}


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_plain_head(causal: Any) -> bool:
    return causal.config.model_type in _PLAIN_HEADS


class TokenObjective:
    """Train on the tokens of texts and of conversations.

    Args:
        flat: Batch layout of packed rows, see `collate_packs`.
    """

    parts: tuple[str, ...] = ("",)
    weights: tuple[float, ...] = (1.0,)
    has_accuracy: bool = True

    def __init__(self, encoder: Encoder, *, flat: bool = False) -> None:
        self._encoder = encoder
        self._flat = flat

    def make_example(self, sequences: tuple[EncodedRow], labels: torch.Tensor) -> EncodedRow:
        """Return the only sequence."""
        del labels
        return sequences[0]

    def collate(self, examples: Sequence[EncodedRow | Pack]) -> Batch:
        """Pad samples, or lay out packs."""
        packs = [example for example in examples if isinstance(example, Pack)]
        if packs:
            return collate_packs(packs, self._encoder.pad_id, flat=self._flat)
        samples = [example for example in examples if isinstance(example, EncodedRow)]
        return collate(samples, self._encoder.pad_id)

    def count(self, examples: Sequence[EncodedRow | Pack]) -> list[int]:
        """Return the number of tokens in the loss."""
        rows = (e.samples if isinstance(e, Pack) else (e,) for e in examples)
        return [sum(int((s.labels != IGNORED).sum()) for samples in rows for s in samples)]

    def compute_loss(self, model: Any, batch: Batch) -> BatchLoss:
        """Return the summed loss over the tokens in the loss."""
        found = _predict_sums(model, batch)
        counts = (batch["labels"][:, 1:] != IGNORED).sum()
        return BatchLoss(torch.stack([found.loss]), found.correct[None], counts[None], {})
