"""Encoded rows, their order, and batches of them."""

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from training_backends.rundir.directory import rows_per_epoch
from training_backends.trainer.encode import Manifest, array_path, read_manifest
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.objective import Batch, Example

__all__ = [
    "IGNORED",
    "Build",
    "EncodedRow",
    "Examples",
    "Order",
    "Pack",
    "PackedSchedule",
    "Schedule",
    "collate",
    "collate_packs",
    "lengths_of",
    "make_row",
]

IGNORED = -100
"""The label of a token that is not in the loss, as in transformers."""


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


Build = Callable[[tuple[EncodedRow, ...], torch.Tensor], Any]
"""Makes an example of its sequences and its labels."""


class Examples(Sequence[Any]):
    """The encoded rows of files, made from memory-mapped arrays when they are used.

    Attributes:
        manifests: What each file contains.
        lengths: Number of tokens of each example.
    """

    def __init__(self, directories: Sequence[Path], build: Build) -> None:
        """Map the arrays.

        Raises:
            TrainerError: They are missing or incomplete.
        """
        self._files = [_MappedFile(directory) for directory in directories]
        self._build = build
        self._firsts = [0, *accumulate(len(file.lengths) for file in self._files)]
        self.manifests: tuple[Manifest, ...] = tuple(file.manifest for file in self._files)
        self.lengths: array[int] = array("q")
        for file in self._files:
            self.lengths.extend(file.lengths)

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of examples of each file."""
        return tuple(len(file.lengths) for file in self._files)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        number = bisect_right(self._firsts, at) - 1
        return self._build(*self._files[number].read(at - self._firsts[number]))


class _MappedFile:
    """The arrays of a file."""

    def __init__(self, directory: Path) -> None:
        manifest = read_manifest(directory)
        if manifest is None:
            raise TrainerError(
                f"{directory.name}: the encoded rows are missing or incomplete. Resume the run.",
                kind="internal",
                retryable=True,
            )
        self.manifest = manifest
        self._ids = self._map(directory, "ids", torch.int32)
        self._trained = self._map(directory, "trained", torch.bool)
        self._labels = self._map(directory, "labels", torch.uint8)
        self._starts = array("q")
        self._starts.frombytes(array_path(directory, "starts").read_bytes())
        examples = manifest.counts.examples
        self._width = (len(self._starts) - 1) // examples if examples else 1
        firsts = self._starts[:: self._width]
        self.lengths = array("q", (end - start for start, end in pairwise(firsts)))

    def _map(self, directory: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
        size = self.manifest.sizes[name] // dtype.itemsize
        if not size:  # nothing can be mapped
            return torch.empty(0, dtype=dtype)
        return torch.from_file(str(array_path(directory, name)), size=size, dtype=dtype)

    def read(self, index: int) -> tuple[tuple[EncodedRow, ...], torch.Tensor]:
        """Return the sequences and the labels of an example."""
        first = index * self._width
        places = pairwise(self._starts[first : first + self._width + 1])
        width = len(self._labels) // len(self.lengths)
        return (
            tuple(self._sequence(start, end) for start, end in places),
            self._labels[index * width : (index + 1) * width],
        )

    def _sequence(self, start: int, end: int) -> EncodedRow:
        return make_row(self._ids[start:end], self._trained[start:end])


def make_row(ids: torch.Tensor, trained: torch.Tensor) -> EncodedRow:
    """Return a row, given which tokens are in the loss."""
    return EncodedRow(ids, torch.where(trained, ids, IGNORED))


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Return the number of tokens of each example."""
    if isinstance(examples, Examples):
        return examples.lengths
    return [example.length for example in examples]


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
        self._lengths = lengths_of(examples)
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
        return sum(self._lengths[self._order.row(at)] for at in range(first, last))


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
        lengths = lengths_of(examples)
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

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens from sequence `first` to `last`, exclusive."""
        return super().tokens(self._first[first], self._first[last])
