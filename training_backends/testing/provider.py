"""An in-memory server of the Mistral protocol, with a back door for tests."""

import io
import json
import tarfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from threading import RLock
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError

from training_backends.protocols.mistral.errors import (
    error_items,
    no_model_message,
    validation_body,
)
from training_backends.protocols.mistral.status import ENDED, UNSTARTED
from training_backends.protocols.mistral.wire import JobIn
from training_backends.testing.server import LoopbackServer, Received, StubReply
from training_backends.testing.stored import (
    ProviderFile,
    StoredJob,
    base_card,
    file_id_of,
    tuned_card,
)

__all__ = ["ScriptedProvider", "read_form"]

_T = TypeVar("_T")


class _ErrorResponse(Exception):
    """An error response."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status)
        self.reply = _json(body, status)


@dataclass(slots=True, kw_only=True)
class _LateCreate:
    """A delayed create request; carried out after `left` more job lists."""

    left: int
    body: dict[str, Any]
    owner: str


class ScriptedProvider(LoopbackServer):
    """Implements the protocol as our gateway does; tests control everything else.

    Attributes:
        key: The only accepted API key; None accepts any.
        auto: How far jobs advance by themselves, one step per request for the job.
        newest_first: Order of events and checkpoints.
        retired: Job routes respond with 410.
        offers_no_model: A create fails with the 422 that lists no models.
        refuses_similar: A create fails with 409 while a similar job is unfinished.
        late_creates: For each of the next creates, the number of job lists after which it is
            carried out; its response is a 504.
        lists_lag: Number of job lists that do not yet include the newest job.
        owner: Stored as `StoredJob.owner` of jobs created from now on.
        clock: Returns Unix seconds.
        cost: Cost in the quote, in USD.
        quotes: Whether a validated job has a quote.
    """

    key: str | None = "test-key"
    auto: Literal["none", "validate", "complete"] = "complete"
    newest_first = True
    retired = False
    offers_no_model = False
    refuses_similar = True
    lists_lag: int = 0
    owner = ""
    cost: float | None = 2.5
    quotes = True
    models: ClassVar[tuple[str, ...]] = ("open-mistral-7b", "ministral-3b-latest", "tiny-mistral")

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.files: dict[str, ProviderFile] = {}
        self.jobs: dict[str, StoredJob] = {}
        self.late_creates: list[int] = []
        self._late: list[_LateCreate] = []
        self.clock: Callable[[], int] = lambda: int(time.time())
        self._state = RLock()

    # -- the back door -----------------------------------------------------------------

    def set_status(self, job_id: str, word: str, *, event: bool = True, **data: Any) -> None:
        """Set a job's status.

        Args:
            event: Whether to add an event.
            data: Further event data, for example `error="…"`.
        """
        with self._state:
            job = self.jobs[job_id]
            job.status = word
            job.modified_at = self.clock()
            if event:
                entry = {"status": word, **data}
                job.events.append(
                    {"name": "status-updated", "data": entry, "created_at": job.modified_at}
                )
            if word == "VALIDATED":
                job.metadata = self._quote(job) if self.quotes else None
            if word == "SUCCESS":
                job.fine_tuned_model = f"ft:{job.asked['model']}:0a1b2c3d:20260101:{job.id[:8]}"

    def add_checkpoint(self, job_id: str, step: int, **metrics: float | None) -> None:
        """Add a checkpoint to a job."""
        with self._state:
            job = self.jobs[job_id]
            job.modified_at = self.clock()
            job.checkpoints.append(
                {"step_number": step, "created_at": job.modified_at, "metrics": metrics}
            )

    def add_job(self, asked: Mapping[str, Any], status: str = "RUNNING") -> str:
        """Add a job created by another client."""
        with self._state:
            job = self._make_job(dict(asked), owner="")
            job.status = status
            return job.id

    def catch_up(self) -> None:
        """Carry out all delayed creates."""
        with self._state:
            for late in self._late:
                late.left = 0
            self._carry_out_late()

    def _quote(self, job: StoredJob) -> dict[str, Any]:
        steps = job.asked["hyperparameters"].get("training_steps") or 10
        return {
            "expected_duration_seconds": 60,
            "cost": self.cost,
            "cost_currency": None if self.cost is None else "USD",
            "train_tokens_per_step": 131_072,
            "train_tokens": 131_072 * steps,
            "data_tokens": 50_000,
        }

    def _make_job(self, asked: dict[str, Any], owner: str) -> StoredJob:
        now = self.clock()
        job = StoredJob(
            id=str(uuid.uuid4()), asked=asked, created_at=now, modified_at=now, owner=owner
        )
        self.jobs[job.id] = job
        self.set_status(job.id, "QUEUED")
        return job

    def _advance(self, job: StoredJob) -> None:
        """Advance a job by one step, as far as `auto` allows."""
        if job.started and self.auto == "complete":
            if job.status == "QUEUED":
                self.set_status(job.id, "RUNNING")
                self.add_checkpoint(job.id, job.latest_step + 1, train_loss=2.0, valid_loss=None)
            elif job.status == "RUNNING":
                self.add_checkpoint(job.id, job.latest_step + 9, train_loss=1.0, valid_loss=None)
                self.set_status(job.id, "SUCCESS")
        if job.status == "CANCELLATION_REQUESTED" and self.auto != "none":
            self.set_status(job.id, "CANCELLED")
        elif not job.started and self.auto != "none":
            following = {"QUEUED": "VALIDATING", "VALIDATING": "VALIDATED"}.get(job.status)
            if following:
                self.set_status(job.id, following)

    # -- the front door ----------------------------------------------------------------

    def _respond(self, request: Received) -> StubReply:
        with self._state:
            try:
                return self._route(request)
            except _ErrorResponse as refusal:
                return refusal.reply

    def _carry_out_late(self) -> None:
        due = [late for late in self._late if late.left <= 0]
        self._late = [late for late in self._late if late.left > 0]
        for late in due:
            with suppress(_ErrorResponse):  # its client already got a 504
                self._accept(late.body, late.owner)

    def _route(self, request: Received) -> StubReply:
        given = request.headers.get("authorization", "")
        if not given.startswith("Bearer ") or self.key not in {None, given[7:]}:
            raise _ErrorResponse(401, {"message": "Unauthorized", "request_id": "0"})
        parts = request.path.strip("/").split("/")
        if parts[:2] == ["v1", "files"]:
            return self._files(request, parts[2:])
        if parts[:3] == ["v1", "fine_tuning", "jobs"]:
            if self.retired:
                raise _ErrorResponse(410, {"detail": "Gone"})
            return self._jobs(request, parts[3:])
        if parts == ["v1", "models"]:
            return self._models()
        if parts[:2] == ["v1", "models"] and parts[3:] == ["weights"]:
            return self._weights(parts[2])
        if parts == ["v1", "chat", "completions"]:
            return self._chat(json.loads(request.body))
        raise _ErrorResponse(404, {"detail": "Not Found"})

    def _files(self, request: Received, rest: list[str]) -> StubReply:
        if not rest:
            return self._upload(request) if request.method == "POST" else self._list_files(request)
        file = self.files.get(rest[0])
        if file is None:
            raise _ErrorResponse(404, {"detail": "No file matches the given query."})
        return _json({**file.document(), "deleted": file.deleted})

    def _list_files(self, request: Received) -> StubReply:
        asked = dict(request.query)
        found = [
            file
            for file in reversed(self.files.values())
            if not file.deleted
            and asked.get("search", "") in file.filename
            and asked.get("purpose") in {None, file.purpose}
        ]
        return _json(_page(found, asked, ProviderFile.document))

    def _upload(self, request: Received) -> StubReply:
        fields, filename, content = read_form(request)
        digest = sha256(content).hexdigest()
        for file in self.files.values():
            if (file.filename, file.digest, file.deleted) == (filename, digest, False):
                return _json(file.document())
        file = ProviderFile(
            id=str(uuid.uuid4()),
            filename=filename,
            size=len(content),
            digest=digest,
            purpose=fields.get("purpose", "fine-tune"),
            visibility=fields.get("visibility"),
            created_at=self.clock(),
            content=content,
        )
        self.files[file.id] = file
        return _json(file.document())

    def _jobs(self, request: Received, rest: list[str]) -> StubReply:
        if not rest:
            return self._create(request) if request.method == "POST" else self._list_jobs(request)
        job = self.jobs.get(rest[0])
        if job is None:
            raise _ErrorResponse(404, {"detail": "No fine tuning job matches the given query."})
        if rest[1:] == ["start"]:
            if job.status != "VALIDATED":
                raise _ErrorResponse(422, {"detail": f"Job is {job.status}, not VALIDATED."})
            job.started = True
            job.starts += 1
            self.set_status(job.id, "QUEUED", event=False)
        elif rest[1:] == ["cancel"]:
            self._cancel(job)
        else:
            self._advance(job)
        return _json(job.document(newest_first=self.newest_first))

    def _cancel(self, job: StoredJob) -> None:
        if job.status in UNSTARTED and not job.started:
            self.set_status(job.id, "CANCELLED")
        elif job.status not in ENDED:
            self.set_status(job.id, "CANCELLATION_REQUESTED")

    def _list_jobs(self, request: Received) -> StubReply:
        asked = dict(request.query)
        jobs = list(reversed(self.jobs.values()))
        if self.lists_lag and len(request.query) > 2:
            self.lists_lag -= 1
            jobs = jobs[1:]
        for late in self._late:
            late.left -= 1
        self._carry_out_late()
        since = _seconds(asked.get("created_after"), 0)
        until = _seconds(asked.get("created_before"), 2**40)
        found = [
            job
            for job in jobs
            if asked.get("status") in {None, job.status}
            and since <= job.created_at <= until
            and asked.get("model") in {None, job.asked["model"]}
            and asked.get("suffix") in {None, job.asked.get("suffix")}
        ]
        return _json(_page(found, asked, lambda job: job.document(detailed=False)))

    def _create(self, request: Received) -> StubReply:
        body = json.loads(request.body)
        try:
            JobIn.model_validate(body)
        except ValidationError as error:
            raise _ErrorResponse(422, _field_errors(error)) from None
        if self.offers_no_model or body["model"] not in self.models:
            kind = body.get("job_type") or "completion"
            offered = [] if self.offers_no_model else list(self.models)
            raise _ErrorResponse(422, {"detail": no_model_message(kind, offered)})
        missing = [f for f in map(file_id_of, body["training_files"]) if f not in self.files]
        if missing:
            raise _ErrorResponse(422, {"detail": f"Training file {missing[0]} not found."})
        if self.late_creates:
            self._late.append(
                _LateCreate(left=self.late_creates.pop(0), body=body, owner=self.owner)
            )
            raise _ErrorResponse(504, {"detail": "The upstream server has not answered."})
        return _json(self._accept(body, self.owner).document(detailed=False))

    def _accept(self, body: dict[str, Any], owner: str) -> StoredJob:
        if self.refuses_similar and any(_similar(job, body) for job in self.jobs.values()):
            raise _ErrorResponse(409, {"detail": "A similar job is in progress."})
        return self._make_job(body, owner)

    def _models(self) -> StubReply:
        base = [base_card(name, self.clock()) for name in self.models]
        tuned = [tuned_card(job) for job in self.jobs.values() if job.fine_tuned_model]
        return _json({"object": "list", "data": base + tuned})

    def _weights(self, model: str) -> StubReply:
        self._require_model(model)
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            member = tarfile.TarInfo("model.txt")
            member.size = len(model.encode())
            archive.addfile(member, io.BytesIO(model.encode()))
        return StubReply(content=content.getvalue(), content_type="application/x-tar")

    def _chat(self, asked: Mapping[str, Any]) -> StubReply:
        """Echo the last message, as a stream."""
        self._require_model(asked["model"])
        delta = {"content": asked["messages"][-1]["content"]}
        chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]}
        content = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
        return StubReply(content=content, content_type="text/event-stream")

    def _require_model(self, name: str) -> None:
        if all(job.fine_tuned_model != name for job in self.jobs.values()):
            raise _ErrorResponse(404, {"detail": "No model matches the given query."})


def _json(body: Any, status: int = 200) -> StubReply:
    return StubReply(status=status, content=json.dumps(body).encode())


def _page(
    found: Sequence[_T], asked: Mapping[str, str], show: Callable[[_T], dict[str, Any]]
) -> dict[str, Any]:
    page, size = int(asked.get("page", 0)), int(asked.get("page_size", 100))
    shown = [show(entry) for entry in found[page * size : (page + 1) * size]]
    return {"object": "list", "data": shown, "total": len(found)}


def _seconds(text: str | None, default: float) -> float:
    return default if text is None else datetime.fromisoformat(text).timestamp()


def _similar(job: StoredJob, body: Mapping[str, Any]) -> bool:
    names = ("model", "training_files", "hyperparameters", "suffix")
    return job.status not in ENDED and all(job.asked.get(n) == body.get(n) for n in names)


def _field_errors(error: ValidationError) -> dict[str, Any]:
    return validation_body(error_items(error.errors(include_context=False), ["body"]))


def read_form(request: Received) -> tuple[dict[str, str], str, bytes]:
    """Parse a multipart body whose last part is the file."""
    fields: dict[str, str] = {}
    for part in request.form():
        if part.filename is not None:
            return fields, part.filename, part.content
        fields[part.name] = part.content.decode()
    raise _ErrorResponse(422, {"detail": "No file."})
