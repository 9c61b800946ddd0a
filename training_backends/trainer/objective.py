"""The interface of a training method: how rows become examples, batches and a loss.

A loss has one or more parts (the targets of a classifier). Each is a mean over the whole
optimizer step, so the loss does not depend on how the step is split into micro-batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from training_backends.trainer.world import ALONE, World

__all__ = [
    "Batch",
    "BatchLoss",
    "Example",
    "Means",
    "Objective",
    "Totals",
    "longest_first",
    "weigh",
]

Batch = dict[str, torch.Tensor]


class Example(Protocol):
    """An encoded row."""

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        ...


E = TypeVar("E", bound=Example)
E_contra = TypeVar("E_contra", bound=Example, contravariant=True)


class BatchLoss(NamedTuple):
    """The loss and accuracy of a batch, as tensors with one value per part.

    Attributes:
        losses: Summed loss in nats; differentiable.
        correct: Number of correct predictions.
        counts: Number of predictions (tokens, pairs or rows).
        measures: Further sums over the first part's predictions, by name.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    counts: torch.Tensor
    measures: dict[str, torch.Tensor]


class Objective(Protocol[E_contra]):
    """A training method."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the loss's parts; a single part may have an empty name."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each part."""
        ...

    @property
    def has_accuracy(self) -> bool:
        """Whether `correct` counts top predictions, so that it yields an accuracy."""
        ...

    def make_example(self, sequences: tuple[Any, ...], labels: torch.Tensor) -> Any:
        """Make an example of what is stored of it, see `tokens.examples.TrainingExample`."""
        ...

    def collate(self, examples: Sequence[E_contra]) -> Batch:
        """Build a batch."""
        ...

    def count(self, examples: Sequence[E_contra]) -> list[int]:
        """Return the number of predictions in each part, as `compute_loss` will count them."""
        ...

    def compute_loss(self, model: Any, batch: Batch) -> BatchLoss:
        """Run a model over a batch."""
        ...


def longest_first(examples: Sequence[E]) -> list[E]:
    """Sort examples by length, longest first.

    Similar lengths need little padding, and a batch that does not fit fails first. The order does
    not affect sums; dealing the examples out one by one gives processes equal work.
    """
    return sorted(examples, key=lambda example: example.length, reverse=True)


def weigh(objective: Objective[Any], losses: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the weighted sum of the parts' means over `counts`."""
    shares = [
        weight / count if count else 0.0
        for weight, count in zip(objective.weights, counts, strict=True)
    ]
    return (losses * torch.tensor(shares, dtype=losses.dtype, device=losses.device)).sum()


class Totals:
    """Sums over many batches, kept on the model's device until read."""

    def __init__(self, objective: Objective[Any], world: World = ALONE) -> None:
        self._objective = objective
        self._world = world
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, judged: BatchLoss) -> None:
        """Add a batch."""
        found = {"loss": judged.losses, "correct": judged.correct, "counts": judged.counts}
        for name, value in (found | judged.measures).items():
            sums = value.detach().double()
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self) -> "Means | None":
        """Return the means over all processes and reset; None if there were no predictions."""
        local_sums = {name: value.tolist() for name, value in self._sums.items()}
        self._sums = {}
        sums: dict[str, Any] = {}
        for process_sums in self._world.all_gather(local_sums):
            for name, value in process_sums.items():
                sums[name] = _added(sums[name], value) if name in sums else value
        if not sums or not any(sums["counts"]):
            return None
        counts, correct = sums.pop("counts"), sums.pop("correct")
        losses, shares = _means(sums.pop("loss"), counts), _means(correct, counts)
        weights = self._objective.weights
        named = {name: value / counts[0] for name, value in sums.items()}
        if self._objective.parts != ("",):
            for part, count, loss, share in zip(
                self._objective.parts, counts, losses, shares, strict=True
            ):
                if count:
                    named |= {f"loss/{part}": loss, f"accuracy/{part}": share}
        loss = sum(weight * mean for weight, mean in zip(weights, losses, strict=True))
        return Means(loss, sum(correct) / sum(counts), named)


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    return one + other


class Means(NamedTuple):
    """Means over many batches.

    Attributes:
        accuracy: Fraction of correct predictions.
        named: Loss and accuracy of each named part, and further measures.
    """

    loss: float
    accuracy: float
    named: dict[str, float]


def _means(sums: list[float], counts: list[float]) -> list[float]:
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
