"""Typed client of Together's fine-tuning API."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from training_backends.backends.together.status import FILE_FAILED, FILE_READY
from training_backends.backends.together.wire import (
    FineTune,
    FineTuneCheckpoint,
    FineTuneEvent,
    JobPrice,
    ModelLimits,
    UploadedFile,
)
from training_backends.core.errors import DatasetError, ProtocolError
from training_backends.http.answer import Answer, Model
from training_backends.http.client import HttpClient
from training_backends.http.error_table import ErrorTable
from training_backends.http.upload import FileBody, HashedFile, Progress
from training_backends.http.urls import path_segment

__all__ = ["ERRORS", "TogetherAPI", "require_usable"]

_FILES: Final = "/v1/files"
_JOBS: Final = "/v1/fine-tunes"

_UNPROCESSED: Final = frozenset({None, "PENDING"})

ERRORS: Final = ErrorTable(backend="together")
"""The usual meanings of the statuses hold."""


class TogetherAPI:
    """The operations over one HTTP client; has no other state."""

    def __init__(self, http: HttpClient) -> None:
        self.http: HttpClient = http

    # -- files -------------------------------------------------------------------------

    async def upload(
        self, path: Path, filename: str, hashed: HashedFile, on_progress: Progress | None = None
    ) -> str:
        """Upload a file unless the account has its content, and return its id.

        Safe to repeat: Together identifies files by checksum.

        Raises:
            DatasetError: The file cannot be read, or changed during the upload.
        """
        content, content_type = _form(
            purpose="fine-tune", file_name=filename, file_type="jsonl", checksum=hashed.sha256
        )
        answer = await self.http.send(
            "POST",
            _FILES,
            content=content,
            headers={"Content-Type": content_type},
            expect={302, 409},
            repeatable=True,
        )
        if answer.status == 409:
            file_id = answer.json().get("file_id")
        else:
            file_id = answer.headers.get("x-together-file-id")
        if not isinstance(file_id, str) or not file_id:
            raise ProtocolError(f"{answer.request}: the response has no file id.")
        if answer.status == 302:
            body = FileBody(path, hashed=hashed, on_progress=on_progress)
            await self.http.put_file(answer.headers.get("location", ""), body)
        # Also if the process died before an earlier request for it.
        if answer.status == 302 or (await self.file(file_id)).processing_status in _UNPROCESSED:
            await self.http.json(
                "POST", f"{_FILES}/{path_segment(file_id)}/preprocess", repeatable=True
            )
        return file_id

    async def file(self, file_id: str) -> UploadedFile:
        """Retrieve a file's metadata."""
        path = f"{_FILES}/{path_segment(file_id)}"
        return await self.http.json("GET", path, shape=UploadedFile)

    async def find_file(self, filename: str, size: int) -> str | None:
        """Return the id of a processed file with this name and size."""
        for file in await self._list(_FILES, UploadedFile):
            if (file.filename, file.bytes, file.processing_status) == (filename, size, FILE_READY):
                return file.id
        return None

    # -- models and prices -------------------------------------------------------------

    async def limits(self, model: str) -> ModelLimits:
        """Retrieve the limits of a model's hyperparameters.

        Raises:
            RunNotFound: The model cannot be fine-tuned.
        """
        query = [("model_name", model)]
        path = f"{_JOBS}/models/limits"
        return await self.http.json("GET", path, query=query, shape=ModelLimits)

    async def price(self, job: Mapping[str, Any]) -> JobPrice:
        """Ask for the price of a job, given by its create request."""
        body = {name: value for name, value in job.items() if name in _PRICED}
        path = f"{_JOBS}/estimate-price"
        return await self.http.json("POST", path, body=body, repeatable=True, shape=JobPrice)

    # -- jobs --------------------------------------------------------------------------

    async def create(self, body: Mapping[str, Any], hidden: Sequence[SecretStr] = ()) -> FineTune:
        """Create a job, which starts at once. Not retried once it may have arrived.

        Args:
            hidden: Secrets in the body.

        Raises:
            BackendUnavailable: `sent` tells whether the job may exist.
        """
        return await self.http.json("POST", _JOBS, body=dict(body), secrets=hidden, shape=FineTune)

    async def job(self, job_id: str) -> FineTune:
        """Retrieve a job."""
        return await self.http.json("GET", _job(job_id), shape=FineTune)

    async def jobs(self) -> list[FineTune]:
        """List all jobs of the account."""
        return await self._list(_JOBS, FineTune)

    async def events(self, job_id: str) -> list[FineTuneEvent]:
        """List the events of a job, oldest first."""
        found = await self._list(f"{_job(job_id)}/events", FineTuneEvent)
        return sorted(found, key=lambda event: event.created_at)

    async def checkpoints(self, job_id: str) -> list[FineTuneCheckpoint]:
        """List the checkpoints of a job by step."""
        entries = await self._list(f"{_job(job_id)}/checkpoints", FineTuneCheckpoint)
        found = {entry.step: entry for entry in entries}
        return [found[step] for step in sorted(found)]

    async def metrics(self, job_id: str) -> list[dict[str, Any]]:
        """List the logged metrics of a job, in chronological order."""
        return _entries(await self.http.send("GET", f"{_job(job_id)}/metrics"), "metrics")

    async def cancel(self, job_id: str) -> FineTune:
        """Ask to cancel a job."""
        path = f"{_job(job_id)}/cancel"
        return await self.http.json("POST", path, repeatable=True, shape=FineTune)

    async def delete(self, job_id: str) -> None:
        """Delete a finished job and its model."""
        await self.http.json("DELETE", _job(job_id), shape="any", repeatable=True)

    async def download(self, job_id: str, checkpoint: str, target: Path) -> Path:
        """Download an archive of a job's model to `target`, atomically.

        Args:
            checkpoint: `merged`, `adapter` or `model_output_path`.
        """
        query = [("ft_id", job_id), ("checkpoint", checkpoint)]
        return await self.http.download("/v1/finetune/download", target, query=query, follow=True)

    async def _list(self, path: str, shape: type[Model]) -> list[Model]:
        answer = await self.http.send("GET", path)
        return [answer.parse(shape, entry) for entry in _entries(answer, "data")]


def _entries(answer: Answer, name: str) -> list[dict[str, Any]]:
    found = answer.json().get(name) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ProtocolError(f"{answer.request}: the response has no list {name!r}.")
    return found


_PRICED: Final = frozenset(
    {
        "training_file",
        "validation_file",
        "model",
        "from_checkpoint",
        "n_epochs",
        "n_evals",
        "training_method",
        "training_type",
    }
)
"""Fields of a create request on which the price depends."""


def require_usable(file: UploadedFile) -> bool:
    """Return whether a file is processed.

    Raises:
        DatasetError: Together cannot use it.
    """
    if file.processing_status in FILE_FAILED:
        report = file.validation_report
        why = (report.error if report else None) or str(file.processing_status)
        raise DatasetError(
            f"Together rejected the file {file.filename}: {why}.", backend="together"
        )
    return file.processing_status == FILE_READY


def _job(job_id: str) -> str:
    return f"{_JOBS}/{path_segment(job_id)}"


def _form(**fields: str) -> tuple[bytes, str]:
    """Return a multipart form without files, and its content type."""
    boundary = secrets.token_hex(16)
    parts = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    )
    return f"{parts}--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
