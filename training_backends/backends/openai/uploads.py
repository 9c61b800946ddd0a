"""Upload the files of a launch: each content once for all runs, large files in parts."""

import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from training_backends.backends.openai.api import OpenAIAPI
from training_backends.backends.openai.settings import OpenAISettings
from training_backends.core.backend import Journal, JSONValue
from training_backends.core.backoff import Backoff
from training_backends.core.config import DataSource
from training_backends.core.errors import (
    BackendRetired,
    DatasetError,
    Issue,
    ProtocolError,
    RunNotFound,
    TrainingBackendError,
    may_have_happened,
)
from training_backends.core.logging import get_logger
from training_backends.core.persist import may_pass, persist, poll, settle
from training_backends.http.upload import FileUpload, HashedFile, hash_file, hash_parts
from training_backends.protocols.openai.status import FILE_FAILED

__all__ = ["OpenAIUploads"]

log = get_logger()

_PROCESSING: Final = frozenset({"pending", "running"})
"""Statuses of a file at Azure that no job may use yet."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIUploads:
    """Uploads files, identified by content."""

    api: OpenAIAPI
    settings: OpenAISettings
    journal: Journal

    async def file_id(self, source: DataSource) -> str:
        """Return the id of a file that jobs can use, uploading it if necessary.

        Raises:
            DatasetError: The file cannot be read, has changed, or was rejected.
            WaitTimeout: The provider did not process it in time; repeat to continue.
        """
        path = source.path
        if path is None:
            return str(source.remote_id)  # the server checks it when the job is created
        hashed = await hash_file(path)
        file = _LocalFile(path, f"{path.stem[:80]}-{hashed.sha256[:16]}.jsonl", hashed)
        upload = partial(
            self.journal.upload,
            self.settings.scope,
            hashed.sha256,
            partial(self._upload, file),
            partial(self._find, file),
            partial(self._has, hashed),
        )
        file_id = await self._persist(upload)
        if self.settings.variant == "azure":
            await self._processed(file_id, path)
        return file_id

    async def _persist(self, act: Callable[[], Awaitable[_T]]) -> _T:
        return await persist(act, within=self.settings.call_timeout, pauses=self._pauses())

    def _pauses(self) -> Backoff:
        return Backoff(self.settings.poll_min, self.settings.longest_poll, factor=1.4)

    async def _find(self, file: "_LocalFile") -> str | None:
        found = await self.api.find_file(file.name, file.hashed.size)
        return None if found is None or found.status in FILE_FAILED else found.id

    async def _has(self, hashed: HashedFile, file_id: str) -> bool:
        try:
            found = await self.api.get_file(file_id)
        except RunNotFound:
            return False
        return found.status not in FILE_FAILED and found.bytes in {None, hashed.size}

    async def _upload(self, file: "_LocalFile") -> str:
        size = file.hashed.size
        if size > (self.settings.max_request_bytes or size):
            return await self._upload_in_parts(file)
        body = FileUpload(
            file.path,
            fields={"purpose": "fine-tune"},
            filename=file.name,
            hashed=file.hashed,
            on_progress=partial(self._progress, file, 0),
        )
        return (await self.api.upload_file(body)).id

    def _progress(self, file: "_LocalFile", before: int, done: int, _total: int) -> None:
        self.journal.progress(f"upload {file.path.name}", before + done, file.hashed.size)

    # -- in parts ----------------------------------------------------------------------

    async def _upload_in_parts(self, file: "_LocalFile") -> str:
        """Upload a file in parts, continuing an interrupted upload unless it has expired.

        Raises:
            DatasetError: The server has no uploads in parts, or this one took too long.
        """
        parts = await hash_parts(file.path, file.hashed, self.settings.part_bytes)
        for number in itertools.count(1):
            file_id = await self._upload_once(
                file, parts, f"upload:{file.hashed.sha256}/parts#{number}"
            )
            if file_id is not None:
                return file_id
        raise AssertionError("one of them ends with a file or an error")

    async def _upload_once(
        self, file: "_LocalFile", parts: Sequence[HashedFile], name: str
    ) -> str | None:
        """Make an upload or continue it; None if it can no longer be continued.

        Args:
            name: Of its journal steps.
        """
        fresh = False

        async def begin() -> JSONValue:
            nonlocal fresh
            fresh = True
            return await self._begin(file)

        upload: Any = await self._persist(partial(self.journal.step, name, begin, repeatable=True))
        try:
            ids = [
                await self._part_id(file, upload["id"], part, f"{name}/{index}")
                for index, part in enumerate(parts)
            ]
            done = await self.api.complete_upload(upload["id"], ids)
        except TrainingBackendError as error:
            if may_pass(error) or may_have_happened(error):
                raise
            # It may have been completed by a request that was lost, or sent twice by a proxy.
            look = partial(self._persist, partial(self._find, file))
            within = self.settings.settling
            found = await (look() if fresh else settle(look, within=within, pauses=self._pauses()))
            if found is not None or not fresh:
                log.info("upload cannot be continued", upload=upload["id"], error=error.message)
                return found
            with suppress(TrainingBackendError):
                await self.api.cancel_upload(upload["id"])
            if upload["expires_at"] <= time.time():
                raise _unusable(file.path, "the upload expired before it was complete") from error
            raise
        if done.file is None or done.file.bytes not in {None, file.hashed.size}:
            raise ProtocolError(f"The completed upload {done.id} has no file of the same size.")
        return done.file.id

    async def _begin(self, file: "_LocalFile") -> JSONValue:
        try:
            upload = await self.api.begin_upload(file.name, file.hashed.size)
        except (RunNotFound, BackendRetired) as error:
            most = self.settings.max_request_bytes
            raise _unusable(
                file.path,
                f"it has {file.hashed.size:,} bytes, the limit for one request is {most:,}, and "
                "this server has no uploads in parts",
            ) from error
        return {"id": upload.id, "expires_at": upload.expires_at}

    async def _part_id(
        self, file: "_LocalFile", upload_id: str, part: HashedFile, name: str
    ) -> str:
        body = FileUpload(
            file.path,
            fields={},
            field="data",
            filename=file.name,
            hashed=part,
            on_progress=partial(self._progress, file, part.start or 0),
        )

        async def send() -> JSONValue:
            return (await self.api.upload_part(upload_id, body)).id

        step = partial(self.journal.step, name, send, repeatable=True)
        return str(await self._persist(step))

    # -- at Azure ----------------------------------------------------------------------

    async def _processed(self, file_id: str, path: Path) -> None:
        """Wait until a job may use the file.

        Raises:
            DatasetError: The provider rejected it.
            WaitTimeout: The provider did not process it in time; repeat to continue.
        """
        file = await poll(
            lambda: self.api.get_file(file_id),
            lambda found: found.status not in _PROCESSING,
            within=self.settings.upload_timeout,
            what=f"processing {path.name}",
            pauses=self._pauses(),
        )
        if file.status in FILE_FAILED:
            why = file.status_details or f"its status is {file.status}"
            issue = Issue(code="rejected_by_provider", message=why, path=str(path))
            raise DatasetError(f"The provider rejected {path.name}: {why}.", issues=[issue])


class _LocalFile(NamedTuple):
    """A file to upload.

    Attributes:
        name: At the provider. It contains the hash, so a file found by it has the right content.
    """

    path: Path
    name: str
    hashed: HashedFile


def _unusable(path: Path, why: str) -> DatasetError:
    issue = Issue(code="upload_impossible", message=why, path=str(path))
    return DatasetError(f"Cannot upload {path.name}: {why}.", issues=[issue])
