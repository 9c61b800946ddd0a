"""Split data files into training and validation rows.

The assignment is by a hash of the row's content and the seed: reordering rows changes nothing,
adding rows moves few others, and identical rows always end up in the same part.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from xxhash import xxh3_64_intdigest

from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import ConfigError, DatasetError, Issue
from training_backends.core.escape import plural
from training_backends.datasets.findings import too_long
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.scan_part import BOM, MAX_LINE_BYTES
from training_backends.datasets.write import (
    Meter,
    NewFiles,
    Progress,
    name_of,
    place_of,
    refuse_existing,
    rereadable,
)

__all__ = ["Split", "SplitFile", "split"]

_DEFAULT_SHARE: Final = 0.05
"""Size of the validation set relative to the training set, unless its format has a limit."""

_BUCKETS: Final = 1 << 20
"""Buckets of row hashes; their counts take 8 MB regardless of file size."""


class SplitFile(NamedTuple):
    """One part of a split file."""

    path: Path
    rows: int
    size: int


class Split(NamedTuple):
    """Both parts of a file; None for a part without rows."""

    source: Path
    train: SplitFile | None
    validation: SplitFile | None


def split(
    paths: Sequence[Path],
    *,
    provider_format: ProviderFormat = MISTRAL,
    fraction: float | None = None,
    rows: int | None = None,
    seed: int = 0,
    directory: Path | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Sequence[Split]:
    """Write each file as NAME.train.jsonl and NAME.validation.jsonl: all of them or none.

    Rows keep their bytes and their order; blank lines are dropped. Several files are split as one
    data set: the size of the validation set applies to all of them together.

    Args:
        provider_format: Limits the size of the validation set if `fraction` and `rows` are None.
        fraction: Fraction of the rows for validation.
        rows: Number of rows for validation; fewer if identical rows would be separated.
        seed: Random seed.
        directory: Output directory; default next to each file.
        force: Overwrite existing files.

    Raises:
        DatasetError: There are too few rows, or a file cannot be read.
        ConfigError: An output file already exists.
        TrainingBackendError: An output file cannot be written.
    """
    targets = [_targets(path, directory) for path in paths]
    if len(set(targets)) < len(targets):
        raise ConfigError(
            "Two of the files have the same output name.", hint="Split them one at a time."
        )
    if not force:
        refuse_existing(*(target for both in targets for target in both))
    with ExitStack() as stack:
        files: list[_File] = []
        for path, both in zip(paths, targets, strict=True):
            file = stack.enter_context(rereadable(path, both[0].parent))
            meter = Meter(path, 2 * file.seek(0, os.SEEK_END), on_progress)
            files.append(_File(path, file, both, meter))
        weights = array("Q", bytes(8 * _BUCKETS))
        by_bytes = fraction is None and rows is None
        for each in files:
            for line in each.rows():
                weights[_bucket(line, seed)] += len(line) if by_bytes else 1
        budget = _budget(sum(weights), provider_format, fraction, rows)
        chosen = _choose(weights, budget)
        size = plural(budget, "byte" if by_bytes else "row")
        _check(paths[0], weights, chosen, size)
        with NewFiles() as made:
            return [each.write(made, chosen, seed) for each in files]


class _File:
    """A file being split."""

    def __init__(
        self, path: Path, file: BinaryIO, targets: tuple[Path, Path], meter: Meter
    ) -> None:
        self._path = path
        self._file = file
        self._targets = targets
        self._meter = meter

    def rows(self) -> Iterator[bytes]:
        """Yield all rows with their line endings, from the start."""
        self._file.seek(0)
        number = 0
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            number += 1
            self._meter.add(len(line))
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                found = too_long(MAX_LINE_BYTES)
                raise _unusable(self._path, number, found.code, found.message, found.fix)
            if not line.isspace():
                yield line

    def write(self, made: NewFiles, chosen: bytearray, seed: int) -> Split:
        """Write both parts; a part without rows is not created."""
        rows, sizes = [0, 0], [0, 0]
        train, validation = self._targets
        with made.create(train) as first, made.create(validation) as second:
            outs = (first, second)
            for line in self.rows():
                side = chosen[_bucket(line, seed)]
                outs[side].write(line)
                rows[side] += 1
                sizes[side] += len(line)
        sides: list[SplitFile | None] = []
        for target, count, size in zip(self._targets, rows, sizes, strict=True):
            if count:
                sides.append(SplitFile(target, count, size))
            else:
                made.discard(target)
                sides.append(None)
        return Split(self._path, *sides)


def _bucket(line: bytes, seed: int) -> int:
    """Return the bucket of a row; line endings and a byte order mark are ignored."""
    return xxh3_64_intdigest(line.strip().removeprefix(BOM), seed % 2**64) >> 44


def _targets(path: Path, directory: Path | None) -> tuple[Path, Path]:
    place = directory or place_of(path)
    name = name_of(path)
    return place / f"{name}.train.jsonl", place / f"{name}.validation.jsonl"


def _budget(
    total: int, provider_format: ProviderFormat, fraction: float | None, rows: int | None
) -> int:
    """Return the size of the validation set: in bytes, or in rows if they were requested."""
    if rows is not None:
        return rows
    if fraction is not None:
        return round(fraction * total)
    share = provider_format.validation_max_share or _DEFAULT_SHARE
    # The share is relative to the remaining training rows.
    budget = int(total * share / (1 + share))
    return min(budget, provider_format.validation_max_bytes or budget)


def _choose(weights: Sequence[int], budget: int) -> bytearray:
    """Flag the buckets for validation: the lowest ones, skipping those that do not fit."""
    flags = bytearray(len(weights))
    left = budget
    for bucket, weight in enumerate(weights):
        if weight and weight <= left:
            flags[bucket] = 1
            left -= weight
        elif weight and 2 * left <= budget:
            # Filling the last gap would favor short rows.
            break
    return flags


def _check(path: Path, weights: Sequence[int], chosen: bytearray, budget: str) -> None:
    """Raise `DatasetError` unless both parts have rows."""
    rest = any(weight for weight, flag in zip(weights, chosen, strict=True) if not flag)
    if any(chosen) and rest:
        return
    if any(chosen):
        what = f"a validation set of {budget} leaves no rows for training"
    else:
        what = f"no row fits in a validation set of {budget}"
    fix = "add rows, or set the size with --rows or --fraction"
    raise _unusable(path, None, "too_few_rows", what, fix)


def _unusable(
    path: Path, line: int | None, code: str, message: str, fix: str | None = None
) -> DatasetError:
    issue = Issue(code=code, message=message, path=str(path), line=line, fix=fix)
    return DatasetError(f"Could not split {path}.", issues=[issue])
