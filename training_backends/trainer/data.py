"""Encoded rows, their order, and batches of them."""

import codecs
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch.utils.data import Dataset

from training_backends.rundir.directory import rows_per_epoch
from training_backends.tokens.encoders import UnusableRow
from training_backends.trainer.errors import Stopped, TrainerError
from training_backends.trainer.objective import Batch, EncodedLine, Example

__all__ = [
    "IGNORED",
    "EncodedRow",
    "LoadedFile",
    "Order",
    "Pack",
    "PackedSchedule",
    "Schedule",
    "collate",
    "collate_packs",
    "load_file",
    "make_sample",
]

IGNORED = -100
"""The label of a token that is not in the loss, as in transformers."""

_ASK_EVERY = 1000


class EncodedRow(NamedTuple):
    """An encoded row: token ids, and labels of the same length."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Pack:
    """Several rows packed into one sequence, isolated from each other."""

    samples: tuple[EncodedRow, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(sample.length for sample in self.samples)


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """The usable rows of a file, and counts of the others.

    Attributes:
        truncated: Rows truncated to `seq_len`.
        divided: Rows that became several examples, and how many.
        untrained: Rows left out because none of their tokens are in the loss.
        invalid: Rows left out because they are invalid, as (line, reason).
    """

    examples: list[Any]
    truncated: int
    divided: tuple[int, int]
    untrained: int
    invalid: list[tuple[int, str]]


def load_file(
    path: Path,
    read: Callable[[bytes, str], EncodedLine],
    *,
    name: str = "",
    should_stop: Callable[[], bool] = lambda: False,
) -> LoadedFile:
    """Read and encode a JSONL file.

    Args:
        read: Encodes one line, see `Objective.read`.
        name: Identifies the file within the run, independent of its path.

    Raises:
        Stopped: `should_stop`, called from time to time, returned True.
        TrainerError: The file cannot be read.
    """
    examples: list[Any] = []
    invalid: list[tuple[int, str]] = []
    truncated = untrained = divided = parts = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number % _ASK_EVERY == 0 and should_stop():
                    raise Stopped
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not content.strip():
                    continue
                try:
                    found, is_truncated = read(content, f"{name}/{number}")
                except (msgspec.DecodeError, UnusableRow) as error:
                    invalid.append((number, str(error)))
                    continue
                truncated += is_truncated
                untrained += not found
                if len(found) > 1:
                    divided += 1
                    parts += len(found)
                examples += found
    except OSError as error:
        raise TrainerError(f"{path} cannot be read: {error.strerror}") from error
    return LoadedFile(examples, truncated, (divided, parts), untrained, invalid)


def make_sample(ids: list[int], trained: list[bool], seq_len: int) -> EncodedRow | None:
    """Truncate a row to `seq_len`; None if none of the remaining tokens are in the loss."""
    # The first token is never predicted, so it is never in the loss.
    if not any(trained[1:seq_len]):
        return None
    tokens = torch.tensor(ids[:seq_len], dtype=torch.int32)
    in_loss = torch.tensor(trained[:seq_len])
    in_loss[0] = False
    return EncodedRow(tokens, torch.where(in_loss, tokens, IGNORED))


def collate(samples: Sequence[EncodedRow], pad_id: int) -> Batch:
    """Pad rows on the right to the longest."""
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


def collate_packs(packs: Sequence[Pack], pad_id: int, *, flat: bool) -> Batch:
    """Lay out packs, with positions that restart at each row.

    transformers infers from the positions, when there is no mask, which tokens may attend to each
    other. Padding forms a row of its own.

    Args:
        flat: Concatenate all packs into one sequence, as flash attention requires; one sequence
            per pack takes less memory without it.
    """
    lines = [[s for pack in packs for s in pack.samples]] if flat else [p.samples for p in packs]
    width = max(sum(sample.length for sample in line) for line in lines)
    ids = torch.full((len(lines), width), pad_id, dtype=torch.int64)
    labels = torch.full((len(lines), width), IGNORED, dtype=torch.int64)
    positions = torch.zeros((len(lines), width), dtype=torch.int64)
    for index, line in enumerate(lines):
        start = 0
        for sample in line:
            end = start + sample.length
            ids[index, start:end] = sample.ids
            labels[index, start:end] = sample.labels
            positions[index, start:end] = torch.arange(sample.length)
            start = end
        positions[index, start:] = torch.arange(width - start)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Order:
    """The order of rows: a pure function of the seed and the position.

    An epoch repeats each file's rows as often as its weight says: full passes first, then a random
    remainder. All of them are shuffled together.
    """

    def __init__(self, rows: tuple[int, ...], weights: tuple[float, ...], seed: int) -> None:
        self._rows = rows
        self._counts = rows_per_epoch(rows, weights)
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def epoch_size(self) -> int:
        """Rows per epoch."""
        return sum(self._counts)

    def row(self, position: int) -> int:
        """Return the index, across all files, of the row at a position of the run."""
        epoch, offset = divmod(position, self.epoch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[offset]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self._seed}/{epoch}")  # noqa: S311  # not cryptographic
        order: list[int] = []
        first = 0
        for rows, count in zip(self._rows, self._counts, strict=True):
            passes, rest = divmod(count, rows) if rows else (0, 0)
            indices = range(first, first + rows)
            order.extend(list(indices) * passes)
            order.extend(rng.sample(indices, rest))
            first += rows
        rng.shuffle(order)
        return order


class Schedule(Dataset[Any]):
    """Every row of the whole run, in training order."""

    def __init__(self, examples: Sequence[Example], order: Order, length: int) -> None:
        self._examples = examples
        self._order = order
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Any:
        return self._examples[self._order.row(position)]

    def rows(self, position: int) -> int:
        """Return how many rows precede a position."""
        return position

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens from position `first` to `last`, exclusive."""
        return sum(self[position].length for position in range(first, last))


class PackedSchedule(Schedule):
    """The same rows in the same order, with as many per sequence as fit.

    Args:
        rows: Rows of the run; the last batch is filled up with the rows that come next.
        steps: Optimizer steps of the run, instead of `rows`.
    """

    def __init__(
        self,
        examples: Sequence[EncodedRow],
        order: Order,
        *,
        seq_len: int,
        batch_size: int,
        rows: int | None = None,
        steps: int | None = None,
    ) -> None:
        self._first = array("q", [0])
        lengths = [example.length for example in examples]
        position = filled = 0
        target_packs = None if steps is None else steps * batch_size
        while True:
            length = lengths[order.row(position)]
            if filled and filled + length > seq_len:
                self._first.append(position)
                filled = 0
                packs = len(self._first) - 1
                if target_packs is None and rows is not None and position >= rows:
                    target_packs = -(-packs // batch_size) * batch_size
                if target_packs is not None and packs >= target_packs:
                    break
            filled += length
            position += 1
        super().__init__(examples, order, len(self._first) - 1)
        self._samples = examples

    def __getitem__(self, position: int) -> Pack:
        first, last = self._first[position], self._first[position + 1]
        return Pack(tuple(self._samples[self._order.row(row)] for row in range(first, last)))

    def rows(self, position: int) -> int:
        """Return how many rows precede a position."""
        return self._first[position]
