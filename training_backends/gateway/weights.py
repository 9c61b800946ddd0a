"""The weights of fine-tuned models: where they are stored, and as an archive to download."""

import hashlib
import os
import re
import shutil
import tarfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from uuid import uuid4

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.core.errors import RunNotFound
from training_backends.core.files import Stamp, make_private_directory, stamp_of
from training_backends.gateway.catalogue import Catalogue
from training_backends.gateway.errors import HTTPProblem, not_found, plain
from training_backends.gateway.keys import Principal
from training_backends.gateway.model_use import ModelUse
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import models

__all__ = ["TarArchive", "WeightService", "read_range"]

_BLOCK: Final = tarfile.BLOCKSIZE
_CHUNK: Final = 2**20
_RANGE: Final = re.compile(r"bytes=(\d{0,20})-(\d{0,20})")


class _Piece(NamedTuple):
    """A part of an archive: bytes, or a file."""

    content: bytes
    path: Path | None = None
    stamp: Stamp = ()


@dataclass(frozen=True, slots=True, eq=False)
class TarArchive:
    """The tar archive of a directory, of which any part can be read without making it.

    Attributes:
        size: Its bytes.
        key: Changes with every file in it.
    """

    size: int
    key: str
    _starts: tuple[int, ...]
    _pieces: tuple[_Piece, ...]

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Lay out the regular files of a directory, by name. Blocking.

        Raises:
            OSError: The directory cannot be read.
        """
        starts: list[int] = []
        pieces: list[_Piece] = []
        size, known = 0, hashlib.sha256()
        for path in _files_of(directory):
            stamp, found = stamp_of(path), path.stat()
            header = tarfile.TarInfo(path.relative_to(directory).as_posix())
            header.size, header.mtime = found.st_size, int(found.st_mtime)
            head = header.tobuf(tarfile.PAX_FORMAT)
            known.update(head + repr(stamp).encode())
            padding = bytes(-found.st_size % _BLOCK)
            for piece, length in (
                (_Piece(head), len(head)),
                (_Piece(b"", path, stamp), found.st_size),
                (_Piece(padding), len(padding)),
            ):
                starts.append(size)
                pieces.append(piece)
                size += length
        starts.append(size)
        pieces.append(_Piece(bytes(2 * _BLOCK)))
        return cls(size + 2 * _BLOCK, known.hexdigest(), tuple(starts), tuple(pieces))

    def read(self, start: int, stop: int) -> Generator[bytes, None, None]:
        """Yield the bytes from `start` up to `stop`, in chunks. Blocking.

        Raises:
            OSError: A file cannot be read, or has changed.
        """
        index = bisect_right(self._starts, start) - 1
        while start < stop:
            first = self._starts[index]
            last = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
            until = min(stop, last)
            piece = self._pieces[index]
            if piece.path is None:
                if until > start:
                    yield piece.content[start - first : until - first]
            else:
                yield from _read_file(piece.path, piece.stamp, start - first, until - first)
            start, index = until, index + 1

    def sha256(self) -> bytes:
        """Return the digest of all bytes. Blocking."""
        digest = hashlib.sha256()
        for chunk in self.read(0, self.size):
            digest.update(chunk)
        return digest.digest()


def _files_of(directory: Path) -> list[Path]:
    return sorted(
        path
        for root, _, names in os.walk(directory)
        for name in names
        if (path := Path(root, name)).is_file() and not path.is_symlink()
    )


def _read_file(path: Path, stamp: Stamp, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(_CHUNK, stop - start))
            # A truncated file, or another version of it, must not complete the archive.
            if not chunk or stamp_of(file.fileno()) != stamp:
                raise OSError(f"{path} has changed")
            yield chunk
            start += len(chunk)


def read_range(text: str, size: int) -> tuple[int, int] | None:
    """Return start and stop of a Range header; None for one that does not apply.

    A range that begins behind the end is empty.
    """
    found = _RANGE.fullmatch(text)
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    start = int(found[1])
    if found[2] and int(found[2]) < start:
        return None
    stop = min(int(found[2]) + 1, size) if found[2] else size
    return min(start, size), stop


class WeightService:
    """Finds the weights of fine-tuned models, and packs them.

    Args:
        root: The gateway's home; weights that only the backend has are downloaded to it.
    """

    def __init__(
        self,
        store: GatewayStore,
        client: AsyncTrainingClient,
        *,
        backend: str,
        catalogue: Catalogue,
        use: ModelUse,
        root: Path,
    ) -> None:
        self._store = store
        self._use = use
        self._client = client
        self._backend = backend
        self._catalogue = catalogue
        self._copies = root / "weights"
        self._digests: dict[str, bytes] = {}
        self._locks: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)

    async def directory(self, job_id: str) -> Path | None:
        """Return the directory with the weights of a job, if they are on this machine."""
        try:
            run = await self._client.get(job_id)
        except RunNotFound:
            return None
        path = Path(run.result_model) if run.result_model else None
        return path if path and path.is_absolute() and await anyio.Path(path).is_dir() else None

    async def archive(self, model_id: str, caller: Principal) -> tuple[TarArchive, bytes]:
        """Return the archive of a fine-tuned model, and its SHA-256 digest.

        Raises:
            HTTPProblem: There is no such model, or no weights of it here; the key is read-only.
        """
        row = await self._store.aread(lambda connection: self._row(connection, model_id, caller))
        if not caller.writes:
            raise plain(403, "This API key is read-only; weights need the write scope.")
        await self._use.mark(row.job_id)
        directory = await self.directory(row.job_id) or await self._downloaded(row.job_id)
        try:
            archive = await to_thread.run_sync(TarArchive.of, directory)
            async with self._locks[archive.key]:
                if archive.key not in self._digests:
                    self._digests[archive.key] = await to_thread.run_sync(archive.sha256)
        except FileNotFoundError:
            raise _no_weights() from None  # deleted in the meantime
        return archive, self._digests[archive.key]

    def _row(self, connection: sa.Connection, model_id: str, caller: Principal) -> Any:
        if self._catalogue.get(model_id):
            raise plain(403, f"{model_id} is a base model; only fine-tuned models have weights.")
        visible = (models.c.deleted_at.is_(None), caller.sees(models.c.project))
        row = connection.execute(models.select().where(models.c.id == model_id, *visible)).first()
        if row is None:
            raise not_found("model")
        return row

    async def _downloaded(self, job_id: str) -> Path:
        """Return a copy of weights that the backend stores elsewhere, made once."""
        if not self._client.backend(self._backend).capabilities.downloads:
            raise _no_weights()
        target = self.copy(job_id)
        async with self._locks[job_id]:
            if await anyio.Path(target).is_dir():
                return target
            await to_thread.run_sync(make_private_directory, self._copies)
            partial = self._copies / f".{uuid4()}"
            try:
                await self._client.download(job_id, partial)
                await anyio.Path(partial).rename(target)
            except RunNotFound:
                raise _no_weights() from None
            finally:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(_remove, partial)
        return target

    def copy(self, job_id: str) -> Path:
        """Return the directory of the copy of a job's weights, which may not exist."""
        return self._copies / job_id

    async def forget(self, job_id: str) -> None:
        """Remove the copy of weights that are deleted."""
        await to_thread.run_sync(_remove, self.copy(job_id))

    async def sweep(self) -> None:
        """Remove incomplete copies."""
        for path in await to_thread.run_sync(lambda: [*self._copies.glob(".*")]):
            await to_thread.run_sync(_remove, path)


def _no_weights() -> HTTPProblem:
    return plain(404, "The weights of this model are not on the machine of this gateway.")


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
