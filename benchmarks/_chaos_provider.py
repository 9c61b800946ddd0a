"""A scripted provider in its own process, for the chaos benchmark.

    python -m benchmarks._chaos_provider openai|azure|together

Prints its URL as a line of JSON and serves until it is interrupted. `GET /books` returns what it
has: files, jobs, and uploads that were begun and never completed. Presigned URLs lead to the host
of the request, so that uploads to them pass through the same proxy.
"""

import hashlib
import json
import signal
import sys
from threading import Lock
from typing import Any, Final

from training_backends.protocols.openai.requests import AzureFineTuningJobIn
from training_backends.testing.openai_provider import ScriptedOpenAIProvider
from training_backends.testing.server import Received, StubReply
from training_backends.testing.together_provider import ScriptedTogetherProvider

_BOOKS: Final = "/books"


def _books(files: Any, jobs: Any, unfinished: int) -> StubReply:
    document = {"files": files, "jobs": jobs, "unfinished": unfinished}
    return StubReply(content=json.dumps(document).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _OpenAI(ScriptedOpenAIProvider):
    """Takes a job to its next status each time it is retrieved."""

    auto = "complete"
    key = None

    def answer(self, request: Received) -> StubReply:
        if request.path != _BOOKS:
            return super().answer(request)
        with self._state:
            files = [
                {"id": file.id, "sha256": _sha256(file.content)}
                for file in self.files.values()
                if file.purpose == "fine-tune"
            ]
            jobs = [
                {
                    "id": job.id,
                    "status": job.status,
                    "trained": job.status == "succeeded",
                    "cancelled": job.status == "cancelled",
                    "files": [job.asked["training_file"], job.asked.get("validation_file")],
                }
                for job in self.jobs.values()
            ]
            unfinished = sum(each.status == "pending" for each in self.uploads.values())
        return _books(files, jobs, unfinished)


class _Azure(_OpenAI):
    """A dated version, which keeps no metadata."""

    base_path = "/openai"
    job_model = AzureFineTuningJobIn
    created_status = 201
    error_style = "azure"
    new_file_status = "pending"

    def __init__(self) -> None:
        super().__init__()
        self.query = {"api-version": "2024-10-21"}


class _Together(ScriptedTogetherProvider):
    """Takes a job to its next status each time it is retrieved."""

    def __init__(self) -> None:
        super().__init__()
        self.key = None
        self.dollars_per_byte = 1e-6
        self._progress = Lock()

    def answer(self, request: Received) -> StubReply:
        if request.path == _BOOKS:
            return self._own_books()
        if request.method == "PUT":
            return self.storage.answer(request)
        reply = super().answer(request)
        if "location" in reply.headers:
            own = f"http://{request.headers['host']}"
            reply.headers["location"] = reply.headers["location"].replace(
                self.storage.base_url, own
            )
        head, _, job_id = request.path.rpartition("/")
        if request.method == "GET" and head == "/v1/fine-tunes" and job_id in self.jobs:
            self._advance(job_id)
        return reply

    def _advance(self, job_id: str) -> None:
        with self._progress:
            match self.jobs[job_id].status:
                case "pending":
                    self.set_status(job_id, "running")
                case "running":
                    self.add_metrics(job_id, 1, loss=1.5)
                    self.add_checkpoint(job_id, 1)
                    self.set_status(job_id, "completed")
                case "cancel_requested":
                    self.set_status(job_id, "cancelled")

    def _own_books(self) -> StubReply:
        files = [
            {"id": file.id, "sha256": _sha256(file.content)}
            for file in list(self.files.values())
            if file.content is not None
        ]
        jobs = [
            {
                "id": job.id,
                "status": job.status,
                "trained": job.status == "completed",
                "cancelled": job.status in {"cancel_requested", "cancelled"},
                "files": [job.asked["training_file"], job.asked.get("validation_file")],
            }
            for job in list(self.jobs.values())
        ]
        return _books(files, jobs, sum(file.content is None for file in self.files.values()))


_PROVIDERS: Final = {"openai": _OpenAI, "azure": _Azure, "together": _Together}


def main() -> None:
    """Serve the provider that the command line names."""
    with _PROVIDERS[sys.argv[1]]() as provider:
        print(json.dumps({"url": provider.base_url}), flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
