"""Split a data file at line boundaries into shards below a size limit."""

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
    """A byte range of a file that contains complete lines.

    Attributes:
        offset: Byte offset in the file.
        size: Bytes, at most the limit.
        rows: Number of lines.
        sha256: Hex digest of the bytes.
    """

    offset: int
    size: int
    rows: int
    sha256: str


class ShardFile(NamedTuple):
    """A shard that was written to a file."""

    path: Path
    size: int
    rows: int
    sha256: str


def plan_shards(path: Path, limit: int, *, on_progress: Progress | None = None) -> Sequence[Shard]:
    """Plan the fewest shards of at most `limit` bytes for an uncompressed file.

    The shards are contiguous and cover the complete file; nothing is written. An empty file
    has no shards.

    Raises:
        DatasetError: A line is longer than `limit`; the issue has its number.
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
    """Write the shards of a file as NAME-00001-of-00007.jsonl, …: all of them or none.

    Concatenated, the shards are byte-identical to the decompressed file.

    Args:
        directory: Output directory; default next to the file.
        force: Overwrite existing files.
        on_progress: Called with the bytes processed.

    Raises:
        DatasetError: A line is longer than `limit`, or the file is empty or cannot be read.
        ConfigError: An output file already exists.
        TrainingBackendError: An output file cannot be written.
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
    """Return the end of the last line that ends between `start` and `stop`, or None."""
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
