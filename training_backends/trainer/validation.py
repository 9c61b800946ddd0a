"""Measure a model on the validation set."""

from contextlib import AbstractContextManager
from typing import Any

from training_backends.trainer.distributed import ALONE, Team
from training_backends.trainer.evaluating import evaluating
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.objective import Means, Objective, Totals, longest_first

__all__ = ["Validation"]


class Validation:
    """A fixed set of rows to measure a model on."""

    def __init__(
        self,
        model: Any,
        objective: Objective[Any],
        examples: list[Any],
        *,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        team: Team = ALONE,
    ) -> None:
        self._model = model
        self._objective = objective
        self._examples = examples
        self._team = team
        self._micro = micro
        self._precision = precision

    def measure(self) -> Means | None:
        """Return loss and accuracy, each over all that counts; None without rows.

        Uses no random numbers, so that a run is the same with and without it.
        """
        totals = Totals(self._objective, self._team)
        examples = self._team.share(longest_first(self._examples))
        done = 0
        with evaluating(self._model), self._precision:
            while done < len(examples):

                def work(size: int, first: int = done) -> int:
                    chunk = examples[first : first + size]
                    batch = self._objective.collate(chunk)
                    there = {key: value.to(self._model.device) for key, value in batch.items()}
                    totals.add(self._objective.judge(self._model, there))
                    return first + len(chunk)

                done = self._micro.attempt(work)
        return totals.take()
