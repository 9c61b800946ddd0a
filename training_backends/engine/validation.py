"""Measure a model on the validation set."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from training_backends.engine.data import Sample, collate
from training_backends.engine.loss import predict

__all__ = ["Validation"]


class Validation:
    """A fixed set of rows to measure a model on."""

    def __init__(
        self,
        model: Any,
        samples: list[Sample],
        *,
        pad_id: int,
        batch_size: int,
        precision: AbstractContextManager[None],
    ) -> None:
        self._model = model
        self._batches = [
            collate(samples[first : first + batch_size], pad_id)
            for first in range(0, len(samples), batch_size)
        ]
        self._precision = precision

    def measure(self) -> dict[str, float]:
        """Return loss and accuracy, each over all tokens that count; {} without rows.

        Uses no random numbers, so that a run is the same with and without it.
        """
        if not self._batches:
            return {}
        training = self._model.training
        self._model.eval()
        loss, correct, count = 0.0, 0, 0
        with torch.no_grad(), self._precision:
            for batch in self._batches:
                there = {key: value.to(self._model.device) for key, value in batch.items()}
                found = predict(self._model, there)
                loss += float(found.loss)
                correct += int(found.correct)
                count += found.tokens
        self._model.train(training)
        return {"valid_loss": loss / count, "valid_mean_token_accuracy": correct / count}
