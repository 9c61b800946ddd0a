"""Upload the files of a launch; each content is stored once on the server, for all runs."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio import from_thread, to_thread

from training_backends.backends.mistral.api import MistralAPI
from training_backends.backends.mistral.retry import Steps
from training_backends.core.config import DataSource
from training_backends.core.errors import DatasetError, Issue, RunNotFound
from training_backends.datasets.shard import plan_shards
from training_backends.http.upload import HashedFile, hash_file

__all__ = ["Uploads"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploads:
    """Uploads files, identified by content."""

    api: MistralAPI
    steps: Steps

    async def file_ids(self, source: DataSource) -> list[str]:
        """Return the file ids of a training file, uploading it if necessary.

        A file above the server's limit is split between lines and uploaded in parts, without
        temporary files. Each part is a separate file on the server, so an interrupted launch
        continues with the first missing part.

        Raises:
            DatasetError: The file cannot be read or split, has changed, or is not on the server.
        """
        if source.remote_id is not None:
            return [await self._known(source.remote_id)]
        path = source.local_path
        size = await to_thread.run_sync(_size_of, path)
        limit = self.steps.settings.max_file_bytes
        if size <= limit:
            return [await self.file_id(source)]
        parts = await to_thread.run_sync(_parts_of, path, limit)
        return [await self._id_of(path, part, size) for part in parts]

    async def file_id(self, source: DataSource) -> str:
        """Return the file id of an unsplit file, uploading it if necessary.

        Raises:
            DatasetError: The file cannot be read, has changed, or is not on the server.
        """
        if source.remote_id is not None:
            return await self._known(source.remote_id)
        hashed = await hash_file(source.local_path)
        return await self._id_of(source.local_path, hashed, hashed.size)

    async def _known(self, file_id: str) -> str:
        if await self.has(file_id):
            return file_id
        issue = Issue(code="missing_file", message=f"the server has no file {file_id}")
        raise DatasetError(f"The server has no file {file_id}.", issues=[issue])

    async def _id_of(self, path: Path, hashed: HashedFile, size: int) -> str:
        # The name contains the hash, so a file found by name has the right content, and the server
        # keeps one copy for all runs.
        filename = f"{path.stem[:80]}-{hashed.sha256[:16]}.jsonl"
        upload = partial(
            self.steps.journal.upload,
            self.steps.settings.scope,
            hashed.sha256,
            do=partial(self._upload, path, filename, hashed, size),
            find=partial(self._find, filename, hashed.size),
            has=partial(self.has, size=hashed.size),
        )
        return await self.steps.ask(upload)

    async def has(self, file_id: str, size: int | None = None) -> bool:
        """Return whether the server has a file, of the given size if any."""
        try:
            found = await self.steps.ask(lambda: self.api.retrieve_file(file_id))
        except RunNotFound:
            return False
        return not found.deleted and (size is None or found.bytes in {None, size})

    async def _upload(self, path: Path, filename: str, hashed: HashedFile, size: int) -> str:
        before = hashed.start or 0

        def progress(done: int, _total: int) -> None:
            self.steps.journal.progress(f"upload {path.name}", before + done, size)

        found = await self.api.upload_file(
            path, filename=filename, hashed=hashed, on_progress=progress
        )
        return found.id

    async def _find(self, filename: str, size: int) -> str | None:
        async with aclosing(self.api.iter_files(search=filename, purpose="fine-tune")) as files:
            async for file in files:
                if file.filename == filename and file.bytes in {None, size}:
                    return file.id
        return None


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _parts_of(path: Path, limit: int) -> Sequence[HashedFile]:
    """Split a file and hash all parts before the first upload.

    Each part is verified against its hash during the upload, so parts of a changing file are
    never mixed.
    """
    try:
        shards = plan_shards(path, limit, on_progress=lambda *_: from_thread.check_cancelled())
    except OSError as error:
        raise _unreadable(path, error) from error
    return [
        HashedFile(shard.sha256, shard.size, shard.offset)
        for shard in shards
        if shard.rows < shard.size  # skip parts with only line ends
    ]


def _unreadable(path: Path, error: OSError) -> DatasetError:
    why = f"it cannot be read: {error.strerror or error}"
    issue = Issue(code="unreadable_file", message=why, path=str(path))
    return DatasetError(f"Cannot upload {path.name}: {why}.", issues=[issue])
