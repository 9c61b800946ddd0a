"""Direct preference optimization (DPO) on pairs of chosen and rejected answers.

Rafailov et al., Direct Preference Optimization, 2023. The reference model is the model before
the first step. Its log probabilities never change, so they are computed once and stored with
each checkpoint, and no second model is kept in memory.
"""

from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

from training_backends.tokens.encoders import Encoder
from training_backends.trainer.data import Build, EncodedRow, Examples, collate
from training_backends.trainer.errors import Stopped, TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.objective import Batch, BatchLoss
from training_backends.trainer.objectives.tokens import predict
from training_backends.trainer.sharding import RootModule
from training_backends.trainer.world import World

__all__ = ["Pair", "PairExamples", "PreferenceObjective", "References"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected answer to the same prompt.

    Attributes:
        reference: Log probability of `chosen` minus that of `rejected` under the reference model,
            in nats.
    """

    chosen: EncodedRow
    rejected: EncodedRow
    reference: float = float("nan")

    @property
    def length(self) -> int:
        """Tokens in both."""
        return self.chosen.length + self.rejected.length


class PreferenceObjective:
    """Train on preference pairs.

    Args:
        beta: KL penalty towards the reference model.
        label_smoothing: Assumed fraction of mislabelled pairs.
    """

    parts: tuple[str, ...] = ("",)
    weights: tuple[float, ...] = (1.0,)
    has_accuracy: bool = False

    def __init__(self, encoder: Encoder, *, beta: float, label_smoothing: float) -> None:
        self._encoder = encoder
        self._beta = beta
        self._smoothing = label_smoothing

    def make_example(self, sequences: tuple[EncodedRow, EncodedRow], labels: torch.Tensor) -> Pair:
        """Return a pair whose reference is not known yet."""
        del labels
        return Pair(*sequences)

    def collate(self, examples: Sequence[Pair]) -> Batch:
        """Stack the chosen answers above the rejected ones."""
        samples = [pair.chosen for pair in examples] + [pair.rejected for pair in examples]
        references = torch.tensor([pair.reference for pair in examples])
        return collate(samples, self._encoder.pad_id) | {"reference": references}

    def count(self, examples: Sequence[Pair]) -> list[int]:
        """Return the number of pairs."""
        return [len(examples)]

    def margins(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return each pair's log probability margin, chosen minus rejected, in nats."""
        found = predict(model, batch)
        # Summed as a matrix: index_add is not deterministic on a GPU.
        nats = found.losses.new_zeros(found.counted.shape).masked_scatter(
            found.counted, found.losses
        )
        chosen, rejected = (-nats.sum(dim=1)).chunk(2)
        return chosen - rejected

    def compute_loss(self, model: Any, batch: Batch) -> BatchLoss:
        """Return the loss; a pair is correct if the model prefers the chosen answer."""
        rewards = self._beta * (self.margins(model, batch) - batch["reference"])
        losses = -(
            logsigmoid(rewards) * (1 - self._smoothing) + logsigmoid(-rewards) * self._smoothing
        )
        right = (rewards.detach() > 0).sum()
        counts = torch.tensor([len(rewards)], device=rewards.device)
        measures = {"reward_margin": rewards.detach().sum(), "reward_accuracy": right}
        return BatchLoss(torch.stack([losses.sum()]), right[None], counts, measures)


_FILE: Final = "references.safetensors"


class PairExamples(Examples):
    """Pairs with their references.

    Attributes:
        references: See `Pair.reference`; empty until they are known.
    """

    def __init__(self, directories: Sequence[Path], build: Build) -> None:
        super().__init__(directories, build)
        self.references: array[float] = array("d")

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, list) or not self.references:
            return found
        return replace(found, reference=self.references[index])


class References:
    """Computes the reference margins of pairs, and sets them there."""

    def __init__(self, **pairs: PairExamples) -> None:
        self._pairs = pairs

    def compute(
        self,
        objective: PreferenceObjective,
        root: RootModule,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        *,
        world: World,
        should_stop: Callable[[], bool],
    ) -> None:
        """Compute the margins with the model, which must not have been trained yet.

        Raises:
            Stopped: `should_stop`, called between batches, returned True.
        """
        device = root.model.device

        def work(pairs: PairExamples, size: int) -> list[float]:
            found: list[float] = []
            with evaluating(root.model), precision:
                for batch, counts in world.micro_batches(range(len(pairs)), size):
                    if should_stop():
                        raise Stopped
                    collated = objective.collate([pairs[at] for at in batch])
                    on_device = {k: v.to(device) for k, v in collated.items()}
                    margins: list[float] = root(objective.margins, on_device).tolist()
                    found += margins if counts else []
            return found

        for pairs in self._pairs.values():
            own_margins = micro.attempt(partial(work, pairs))
            pairs.references = array("d", world.unshard(world.all_gather(own_margins)))

    def save(self, directory: Path) -> None:
        """Write the margins into a checkpoint."""
        margins = {name: torch.tensor(each.references) for name, each in self._pairs.items()}
        save_file(margins, directory / _FILE)

    def load(self, directory: Path) -> None:
        """Read the margins from a checkpoint.

        Raises:
            TrainerError: The checkpoint belongs to different data.
        """
        margins = load_file(directory / _FILE)
        for name, pairs in self._pairs.items():
            if len(margins[name]) != len(pairs):
                raise TrainerError(
                    f"The checkpoint {directory.name} has {len(margins[name])} pairs, but the data "
                    f"now has {len(pairs)}. Restore the data, or start a new run."
                )
            pairs.references = array("d", margins[name].tolist())
