"""Direct preference optimization: learn which of two answers is the better one.

Rafailov et al., Direct Preference Optimization, 2023. The reference is the model as it is
before the first step. What it makes of a pair never changes, so it is computed once, kept
with the checkpoints, and no second model is held beside the one that is trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

from training_backends.datasets.rows import ChatRow, PreferenceRow, parse_any_row
from training_backends.tokens.encoders import Encoder, UnusableRow
from training_backends.trainer.data import Sample, collate, make_sample
from training_backends.trainer.distributed import Team
from training_backends.trainer.errors import Stopped, TrainerError
from training_backends.trainer.generate import evaluating
from training_backends.trainer.memory import MicroBatch
from training_backends.trainer.objective import Batch, Judged, Reading
from training_backends.trainer.objectives.tokens import predict

__all__ = ["Pair", "PreferenceObjective", "References"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to the same, the better one first.

    Attributes:
        reference: By how many nats the reference model finds the first more likely.
    """

    chosen: Sample
    rejected: Sample
    reference: float = float("nan")

    @property
    def length(self) -> int:
        """Tokens in both."""
        return self.chosen.length + self.rejected.length


class PreferenceObjective:
    """Learn from pairs of answers.

    Args:
        beta: How much it costs to leave the reference.
        label_smoothing: Share of pairs that are taken to be the wrong way round.
    """

    parts = ("",)
    weights = (1.0,)
    has_accuracy = False

    def __init__(
        self, encoder: Encoder, seq_len: int, *, beta: float, label_smoothing: float
    ) -> None:
        self._encoder = encoder
        self._seq_len = seq_len
        self._beta = beta
        self._smoothing = label_smoothing

    def read(self, line: bytes, place: str) -> Reading:
        """Encode a pair, in the form of OpenAI (`input`) or of TRL (`chosen`)."""
        del place
        row = parse_any_row(line)
        if not isinstance(row, PreferenceRow):
            raise UnusableRow("the row is no pair: give two answers to one prompt")
        samples, truncated = [], False
        for conversation in _conversations(row):
            ids, trained = self._encoder.encode(conversation)
            samples.append(make_sample(ids, trained, self._seq_len))
            truncated = truncated or len(ids) > self._seq_len
        chosen, rejected = samples
        if chosen is None or rejected is None:
            return Reading(None, truncated)
        return Reading(Pair(chosen, rejected), truncated)

    def collate(self, examples: Sequence[Pair]) -> Batch:
        """Put the better answers on top of the worse ones."""
        samples = [pair.chosen for pair in examples] + [pair.rejected for pair in examples]
        references = torch.tensor([pair.reference for pair in examples])
        return collate(samples, self._encoder.pad_id) | {"reference": references}

    def count(self, examples: Sequence[Pair]) -> list[int]:
        """Return how many pairs there are."""
        return [len(examples)]

    def margins(self, model: Any, batch: Batch) -> torch.Tensor:
        """Return by how many nats the model finds each better answer more likely."""
        found = predict(model, batch)
        # Summed as a matrix: adding to indices is not repeatable on a GPU.
        nats = found.losses.new_zeros(found.counted.shape).masked_scatter(
            found.counted, found.losses
        )
        better, worse = (-nats.sum(dim=1)).chunk(2)
        return better - worse

    def judge(self, model: Any, batch: Batch) -> Judged:
        """Return the loss; a pair is right where the model leans to the better answer."""
        rewards = self._beta * (self.margins(model, batch) - batch["reference"])
        losses = -(
            logsigmoid(rewards) * (1 - self._smoothing) + logsigmoid(-rewards) * self._smoothing
        )
        right = (rewards.detach() > 0).sum()
        counts = torch.tensor([len(rewards)], device=rewards.device)
        measures = {"reward_margin": rewards.detach().sum(), "reward_accuracy": right}
        return Judged(losses.sum()[None], right[None], counts, measures)


def _conversations(row: PreferenceRow) -> Iterator[ChatRow]:
    """Yield the better and the worse conversation; only what they differ in is to be learnt."""
    better, worse = ([*row.prompt, *answer] for answer in (row.chosen, row.rejected))
    shared = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(better, worse, strict=False))
    )
    if not shared or shared in {len(better), len(worse)}:
        raise UnusableRow("a pair has one prompt and two answers that differ")
    for whole in (better, worse):
        asked = (
            msgspec.structs.replace(message, weight=0) if message.role == "assistant" else message
            for message in whole[:shared]
        )
        yield ChatRow([*asked, *whole[shared:]], row.tools)


_FILE: Final = "references.safetensors"


class References:
    """Completes pairs, in the lists that it is given, with what the reference makes of them."""

    def __init__(self, **pairs: list[Pair]) -> None:
        self._pairs = pairs

    def compute(
        self,
        objective: PreferenceObjective,
        model: Any,
        micro: MicroBatch,
        precision: AbstractContextManager[None],
        *,
        team: Team,
        should_stop: Callable[[], bool],
    ) -> None:
        """Ask the model, which is the reference as long as it is not trained.

        Raises:
            Stopped: `should_stop`, asked between batches, said so.
        """
        for pairs in self._pairs.values():
            ours = team.share(pairs)
            found: list[float] = []
            while len(found) < len(ours):
                if should_stop():
                    raise Stopped

                def work(size: int, left: Sequence[Pair] = ours[len(found) :]) -> list[float]:
                    batch = objective.collate(left[:size])
                    there = {name: value.to(model.device) for name, value in batch.items()}
                    with evaluating(model), precision:
                        margins: list[float] = objective.margins(model, there).tolist()
                    return margins

                found += micro.attempt(work)
            margins = team.join(team.gather(found))
            pairs[:] = [replace(p, reference=m) for p, m in zip(pairs, margins, strict=True)]

    def save(self, directory: Path) -> None:
        """Write them into a checkpoint."""
        margins = {
            name: torch.tensor([pair.reference for pair in pairs])
            for name, pairs in self._pairs.items()
        }
        save_file(margins, directory / _FILE)

    def load(self, directory: Path) -> None:
        """Take them from a checkpoint.

        Raises:
            TrainerError: It was made of other data.
        """
        margins = load_file(directory / _FILE)
        for name, pairs in self._pairs.items():
            if len(margins[name]) != len(pairs):
                raise TrainerError(
                    f"The checkpoint {directory.name} was made of {len(margins[name])} pairs, and "
                    f"now there are {len(pairs)}: the data has changed since. Put it back, or "
                    "begin a new run."
                )
            pairs[:] = [
                replace(pair, reference=margin)
                for pair, margin in zip(pairs, margins[name].tolist(), strict=True)
            ]
