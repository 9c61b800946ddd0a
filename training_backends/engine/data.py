"""Encoded rows, their order, and batches of them."""

import codecs
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch.utils.data import Dataset

from training_backends.datasets.chat import parse_row
from training_backends.engine.encoding import Encoder, UnusableRow
from training_backends.engine.errors import EngineError, Stopped
from training_backends.rundir.directory import rows_per_epoch

__all__ = ["Batch", "LoadedFile", "Order", "Sample", "Schedule", "collate", "load_file"]

IGNORED = -100
"""The label of a token that the loss leaves out, as transformers has it."""

_ASK_EVERY = 1000

Batch = dict[str, torch.Tensor]


class Sample(NamedTuple):
    """One row: ids, and labels of the same length."""

    ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """The usable rows of one file, and what was done to the others.

    Attributes:
        truncated: Rows cut off at `seq_len`.
        untrained: Rows left out because no token of theirs counts.
        invalid: Rows left out because they cannot be used, as (line, reason).
    """

    samples: list[Sample]
    truncated: int
    untrained: int
    invalid: list[tuple[int, str]]


def load_file(
    path: Path, encoder: Encoder, seq_len: int, *, should_stop: Callable[[], bool] = lambda: False
) -> LoadedFile:
    """Read and encode a JSONL file.

    Raises:
        Stopped: `should_stop`, asked now and then, said so.
        EngineError: The file cannot be read.
    """
    samples: list[Sample] = []
    invalid: list[tuple[int, str]] = []
    truncated = untrained = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number % _ASK_EVERY == 0 and should_stop():
                    raise Stopped
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not content.strip():
                    continue
                try:
                    ids, trained = encoder.encode(parse_row(content))
                except (msgspec.DecodeError, UnusableRow) as error:
                    invalid.append((number, str(error)))
                    continue
                if len(ids) > seq_len:
                    truncated += 1
                sample = _sample(ids[:seq_len], trained[:seq_len])
                if sample is None:
                    untrained += 1
                else:
                    samples.append(sample)
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error
    return LoadedFile(samples, truncated, untrained, invalid)


def _sample(ids: list[int], trained: list[bool]) -> Sample | None:
    # The first token is never predicted, so it cannot count.
    if not any(trained[1:]):
        return None
    tokens = torch.tensor(ids, dtype=torch.int32)
    counts = torch.tensor(trained)
    counts[0] = False
    return Sample(tokens, torch.where(counts, tokens, IGNORED))


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(samples), width), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(samples), width), dtype=torch.int64)
    for index, sample in enumerate(samples):
        length = len(sample.ids)
        ids[index, :length] = sample.ids
        labels[index, :length] = sample.labels
        mask[index, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class Order:
    """Which row comes when: a pure function of the seed and the position.

    An epoch takes each file's rows as often as its weight says, whole passes first and a
    random rest, and shuffles them together.
    """

    def __init__(self, rows: tuple[int, ...], weights: tuple[float, ...], seed: int) -> None:
        self._rows = rows
        self._counts = rows_per_epoch(rows, weights)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def epoch_size(self) -> int:
        """Rows in one epoch."""
        return sum(self._counts)

    def row(self, position: int) -> int:
        """Return the index, over all files, of the row at a position counted from the start."""
        epoch, place = divmod(position, self.epoch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[place]

    def _shuffled(self, epoch: int) -> list[int]:
        chance = random.Random(f"{self._seed}/{epoch}")  # noqa: S311  # no secret
        order: list[int] = []
        first = 0
        for rows, count in zip(self._rows, self._counts, strict=True):
            passes, rest = divmod(count, rows) if rows else (0, 0)
            indices = range(first, first + rows)
            order.extend(list(indices) * passes)
            order.extend(chance.sample(indices, rest))
            first += rows
        chance.shuffle(order)
        return order


class Schedule(Dataset[Sample]):
    """Every row of the whole run in the order in which it is trained on."""

    def __init__(self, samples: list[Sample], order: Order, length: int) -> None:
        self._samples = samples
        self._order = order
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Sample:
        return self._samples[self._order.row(position)]

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens of the rows from position `first` up to `last`, exclusive."""
        return sum(len(self[position].ids) for position in range(first, last))
