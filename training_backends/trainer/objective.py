"""What a training method makes of rows: examples, batches, and what a model's loss on them is.

A loss has one or more parts (the targets of a classifier), each a mean over what counts for
it in the whole optimizer step. So the loss is the same however the step is cut into
micro-batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from training_backends.trainer.distributed import ALONE, Team

__all__ = [
    "Batch",
    "Example",
    "Judged",
    "Means",
    "Objective",
    "Reading",
    "Totals",
    "longest_first",
    "weigh",
]

Batch = dict[str, torch.Tensor]


class Example(Protocol):
    """One row, encoded."""

    @property
    def length(self) -> int:
        """Tokens that the model reads of it."""
        ...


E = TypeVar("E", bound=Example)
E_contra = TypeVar("E_contra", bound=Example, contravariant=True)


class Reading(NamedTuple):
    """What a line of a file gave.

    Attributes:
        example: None where nothing in it can be learnt.
        truncated: Whether it was cut off at the longest length.
    """

    example: Any
    truncated: bool


class Judged(NamedTuple):
    """What a model makes of a batch; each tensor has one value a part.

    Attributes:
        losses: Sum of the loss over what counts, nats; gradients flow back from here.
        correct: How much of it the model predicts right.
        counts: How much counts.
        measures: Further sums over what counts in the first part, by name.
    """

    losses: torch.Tensor
    correct: torch.Tensor
    counts: torch.Tensor
    measures: dict[str, torch.Tensor]


class Objective(Protocol[E_contra]):
    """A training method."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the loss's parts; a single part may be called nothing."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """How much each part counts."""
        ...

    @property
    def has_accuracy(self) -> bool:
        """Whether what is right is what the model would say."""
        ...

    def read(self, line: bytes, place: str) -> Reading:
        """Encode one line of a file.

        Args:
            place: Names the line, for what is random in it.

        Raises:
            msgspec.DecodeError: It is no row.
            UnusableRow: It cannot be trained on.
        """
        ...

    def collate(self, examples: Sequence[E_contra]) -> Batch:
        """Make a batch."""
        ...

    def count(self, examples: Sequence[E_contra]) -> list[int]:
        """Return how much counts in each part, as `judge` will find it."""
        ...

    def judge(self, model: Any, batch: Batch) -> Judged:
        """Run a model over a batch."""
        ...


def longest_first(examples: Sequence[E]) -> list[E]:
    """Put examples of like length together, which need little padding; what may not fit goes first.

    Their order makes no difference to sums over them. Dealt out one by one, they make even shares.
    """
    return sorted(examples, key=lambda example: example.length, reverse=True)


def weigh(objective: Objective[Any], losses: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the loss: the weighted sum of each part's mean over `counts`."""
    shares = [
        weight / count if count else 0.0
        for weight, count in zip(objective.weights, counts, strict=True)
    ]
    return (losses * torch.tensor(shares, dtype=losses.dtype, device=losses.device)).sum()


class Totals:
    """Sums over many batches, kept where the model runs until they are asked for."""

    def __init__(self, objective: Objective[Any], team: Team = ALONE) -> None:
        self._objective = objective
        self._team = team
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, judged: Judged) -> None:
        """Add a batch."""
        found = {"loss": judged.losses, "correct": judged.correct, "counts": judged.counts}
        for name, value in (found | judged.measures).items():
            sums = value.detach().double()
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def take(self) -> "Means | None":
        """Return the means of what was added by all, and begin anew; None if nothing counted."""
        ours = {name: value.tolist() for name, value in self._sums.items()}
        self._sums = {}
        sums: dict[str, Any] = {}
        for theirs in self._team.gather(ours):
            for name, value in theirs.items():
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
    """What was measured over many batches.

    Attributes:
        accuracy: Share of all that counts predicted right.
        named: Loss and accuracy of each named part, and the further measures.
    """

    loss: float
    accuracy: float
    named: dict[str, float]


def _means(sums: list[float], counts: list[float]) -> list[float]:
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
