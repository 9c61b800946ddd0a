"""Cut a data file into files that keep a provider's size limit, between two lines."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from training_backends.core.errors import DatasetError, Issue
from training_backends.datasets.write import (
    Meter,
    NewFiles,
    Progress,
    name_of,
    place_of,
    read_bytes,
    refuse_existing,
    rereadable,
)

__all__ = ["Shard", "ShardFile", "plan_shards", "shard"]

_CHUNK: Final = 1 << 20


class Shard(NamedTuple):
    """A part of a file that begins and ends between two lines.

    Attributes:
        offset: Where it begins in the file.
        size: Bytes, at most the limit.
        rows: Lines in it.
        sha256: Hex digest of its bytes.
    """

    offset: int
    size: int
    rows: int
    sha256: str


class ShardFile(NamedTuple):
    """A file that holds one part of another."""

    path: Path
    size: int
    rows: int
    sha256: str


def plan_shards(path: Path, limit: int, *, on_progress: Progress | None = None) -> Sequence[Shard]:
    """Cut a plain file into parts of at most `limit` bytes, as few as its lines allow.

    The parts follow one another and make up the whole file; nothing is written. An empty file
    has no parts.

    Raises:
        DatasetError: A line is longer than `limit`; it says which.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        return _plan(file, path, limit, Meter(path, size, on_progress))


def shard(
    path: Path,
    limit: int,
    *,
    directory: Path | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Sequence[ShardFile]:
    """Write the parts of a file as NAME-00001-of-00007.jsonl and so on, all or none.

    One after the other they hold the bytes of the file, unpacked if it was packed.

    Args:
        directory: Where to write; default beside the file.
        force: Replace files that are there already.
        on_progress: Told of the bytes written.

    Raises:
        DatasetError: A line is longer than `limit`, or the file is empty or cannot be read.
        ConfigError: A file is there already.
        TrainingBackendError: A file cannot be written.
    """
    directory = directory or place_of(path)
    with rereadable(path, directory) as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            issue = Issue(code="empty_file", message="the file is empty", path=str(path))
            raise DatasetError(f"Could not shard {path}.", issues=[issue])
        meter = Meter(path, 2 * size, on_progress)
        parts = _plan(file, path, limit, meter)
        paths = _names(path, directory, len(parts))
        if not force:
            refuse_existing(*paths)
        file.seek(0)
        with NewFiles() as made:
            for target, part in zip(paths, parts, strict=True):
                with made.create(target) as out:
                    for chunk in read_bytes(file, part.size):
                        out.write(chunk)
                        meter.add(len(chunk))
    return [
        ShardFile(target, part.size, part.rows, part.sha256)
        for target, part in zip(paths, parts, strict=True)
    ]


def _names(path: Path, directory: Path, count: int) -> Sequence[Path]:
    width = max(5, len(str(count)))
    name = name_of(path)
    return [
        directory / f"{name}-{number:0{width}}-of-{count:0{width}}.jsonl"
        for number in range(1, count + 1)
    ]


def _plan(file: BinaryIO, path: Path, limit: int, meter: Meter) -> Sequence[Shard]:
    shards: list[Shard] = []
    size = file.seek(0, os.SEEK_END)
    offset = lines = 0
    while offset < size:
        end = size if size - offset <= limit else _last_line_end(file, offset, offset + limit)
        if end is None:
            raise _too_long(path, lines + 1, limit)
        part = _part(file, offset, end - offset, meter)
        shards.append(part)
        lines += part.rows
        offset = end
    return shards


def _last_line_end(file: BinaryIO, start: int, stop: int) -> int | None:
    """Return where the last line that ends between both places ends; None if none does."""
    while stop > start:
        begin = max(start, stop - _CHUNK)
        file.seek(begin)
        found = file.read(stop - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        stop = begin
    return None


def _part(file: BinaryIO, offset: int, size: int, meter: Meter) -> Shard:
    digest = hashlib.sha256(usedforsecurity=False)
    rows = 0
    chunk = b""
    file.seek(offset)
    for chunk in read_bytes(file, size):
        digest.update(chunk)
        rows += chunk.count(b"\n")
        meter.add(len(chunk))
    return Shard(offset, size, rows + (not chunk.endswith(b"\n")), digest.hexdigest())


def _too_long(path: Path, line: int, limit: int) -> DatasetError:
    issue = Issue(
        code="row_over_limit",
        message=f"the row is longer than the limit of {limit:,} bytes",
        path=str(path),
        line=line,
        fix="shorten the row or raise the limit",
    )
    return DatasetError(
        f"Could not shard {path} into files of at most {limit:,} bytes.", issues=[issue]
    )
