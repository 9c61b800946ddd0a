"""The files of a launch: each content is at the server once, for all runs."""

from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training_backends.backends.mistral.api import MistralAPI
from training_backends.backends.mistral.steps import Steps
from training_backends.core.backend import JSONValue
from training_backends.core.errors import ProtocolError, RunNotFound
from training_backends.net.multipart import HashedFile, hash_file

__all__ = ["Uploads"]

_LOSSES: Final = 10
"""How often a server may lose a file of one launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploads:
    """Knows files by what is in them."""

    api: MistralAPI
    steps: Steps

    async def file_id(self, path: Path) -> str:
        """Return the server's id of a file, uploaded now if it has to be.

        Raises:
            DatasetError: The file cannot be read, or is not what it was.
        """
        journal, scope = self.steps.journal, self.steps.settings.scope
        hashed = await hash_file(path)
        known = await journal.known_upload(scope, hashed.sha256)
        if known is not None and await self.has(known, hashed.size):
            return known
        file_id = await self._upload_once(path, hashed)
        await journal.uploaded(scope, hashed.sha256, file_id)
        return file_id

    async def has(self, file_id: str, size: int | None = None) -> bool:
        """Tell whether the server has a file, of this size if one is given."""
        try:
            found = await self.steps.ask(lambda: self.api.retrieve_file(file_id))
        except RunNotFound:
            return False
        return not found.deleted and (size is None or found.bytes in {None, size})

    async def _upload_once(self, path: Path, hashed: HashedFile) -> str:
        # The name says what is inside, so a file found by it can be trusted, and the
        # server keeps one copy for all runs.
        filename = f"{path.stem[:80]}-{hashed.sha256[:16]}.jsonl"
        fresh = False

        async def find() -> JSONValue:
            return await self._find(filename, hashed.size)

        async def do() -> JSONValue:
            nonlocal fresh
            fresh = True
            return await find() or await self._upload(path, filename, hashed)

        for attempt in range(1, _LOSSES + 1):
            name = f"upload:{hashed.sha256}" + (f"#{attempt}" if attempt > 1 else "")
            file_id = str(await self.steps.surely(name, do, find))
            if fresh or await self.has(file_id, hashed.size):
                return file_id
        raise ProtocolError(f"The server keeps losing the uploaded file {filename}.")

    async def _upload(self, path: Path, filename: str, hashed: HashedFile) -> str:
        def progress(done: int, total: int) -> None:
            self.steps.journal.progress(f"upload {path.name}", done, total)

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
