"""An in-memory server of the OpenAI fine-tuning protocol, with direct access for tests.

It behaves as the service was recorded (2023-11 to 2026-02) where recordings exist: the first
status, the empty `error` of healthy jobs, `auto` until a job starts, data that is found invalid
only after the job was created, lists that are newest first, and a result file in base64. What the
service does in other cases is not known; the docstrings say what was chosen.
"""

import codecs
import json
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pydantic import BaseModel, ValidationError

from training_backends.protocols.openai import errors, events
from training_backends.protocols.openai.errors import ErrorAnswer
from training_backends.protocols.openai.requests import (
    CompleteUploadIn,
    FineTuningJobIn,
    UploadIn,
)
from training_backends.testing.openai_jobs import OpenAIJob, OpenAIState, OpenAIUpload
from training_backends.testing.server import LoopbackServer, Received, StubReply

__all__ = ["ScriptedOpenAIProvider"]

_M = TypeVar("_M", bound=BaseModel)


class _Rejected(Exception):
    """An error response."""

    def __init__(self, answer: ErrorAnswer) -> None:
        super().__init__(answer.message)
        self.answer = answer


@dataclass(slots=True, kw_only=True)
class _DelayedCreate:
    """A create request that is carried out after `left` more job lists."""

    left: int
    body: dict[str, Any]
    owner: str


class ScriptedOpenAIProvider(OpenAIState, LoopbackServer):
    """Implements the protocol; tests control everything else.

    Requests carry the key as a bearer token or, as at Azure, in `api-key`. Use `url` as the base
    URL of a client.

    Attributes:
        key: The only accepted API key; None accepts any.
        base_path: Path below which the routes are, for example `/openai/v1`.
        query: Parameters that every request must have, such as Azure's `api-version`.
        auto: How far jobs advance by themselves, one status per retrieval of the job; unless none,
            a pending file is processed once it was retrieved.
        job_model: What a create request must be.
        created_status: Status code of a successful create; 201 at Azure.
        error_style: Form of error bodies: OpenAI's, Azure's, or FastAPI's with 422 instead of 400.
        says_has_more: Whether lists have `has_more`.
        late_creates: For each of the next creates, the number of job lists after which it is
            carried out; its response is a 504.
        lists_lag: Number of job lists that do not yet include the newest job.
        owner: Stored as `OpenAIJob.owner` of jobs created from now on.
        uploads: Uploads in parts, by id.
        extras: Further fields of every job's JSON, such as Azure's `trainingType`.
        models: Base models that can be trained; others are listed in `other_models`.
    """

    key: str | None = "test-key"
    base_path = "/v1"
    auto: Literal["none", "validate", "complete"] = "none"
    job_model: type[BaseModel] = FineTuningJobIn
    created_status = 200
    error_style: Literal["openai", "azure", "detail"] = "openai"
    says_has_more = True
    lists_lag = 0
    owner = ""
    models: ClassVar[tuple[str, ...]] = (
        "gpt-4o-mini-2024-07-18",
        "gpt-4.1-mini-2025-04-14",
        "org/open-model",
    )
    other_models: ClassVar[tuple[str, ...]] = ("text-embedding-3-small",)

    def __init__(self) -> None:
        OpenAIState.__init__(self)
        LoopbackServer.__init__(self, self._respond)
        self.query: dict[str, str] = {}
        self.extras: dict[str, Any] = {}
        self.late_creates: list[int] = []
        self.uploads: dict[str, OpenAIUpload] = {}
        self._deleted_models: set[str] = set()
        self._late: list[_DelayedCreate] = []

    @property
    def url(self) -> str:
        """The base URL of clients."""
        return self.base_url + self.base_path

    # -- requests ----------------------------------------------------------------------

    def _respond(self, request: Received) -> StubReply:
        with self._state:
            try:
                reply = self._route(request)
            except _Rejected as rejected:
                reply = self._error(rejected.answer)
        reply.headers.update(
            {
                "x-request-id": f"req_{secrets.token_hex(16)}",
                "openai-version": "2020-10-01",
                "openai-organization": "test",
                "openai-processing-ms": "1",
            }
        )
        return reply

    def _error(self, answer: ErrorAnswer) -> StubReply:
        status, body = answer.status, answer.body()
        if self.error_style == "azure":
            body = {"error": {"code": answer.code or str(status), "message": answer.message}}
        elif self.error_style == "detail":
            if status == 400:
                loc = ["body", *(answer.param or "").split(".")]
                status, body = 422, {"detail": [{"loc": loc, "msg": answer.message, "type": "x"}]}
            else:
                body = {"detail": answer.message}
        reply = _json(body, status)
        reply.headers.update(answer.headers)
        return reply

    def _route(self, request: Received) -> StubReply:
        # From the target: a name may contain an encoded slash.
        path = urlsplit(request.target).path
        if (
            not path.startswith(f"{self.base_path}/")
            or not self.query.items() <= dict(request.query).items()
        ):
            raise _Rejected(ErrorAnswer(status=404, message="Resource not found", code="404"))
        self._authenticate(request)
        parts = [unquote(part) for part in path[len(self.base_path) :].strip("/").split("/")]
        method = request.method
        if parts[0] == "files":
            return self._files(request, parts[1:])
        if parts[0] == "uploads" and method == "POST":
            return self._upload_parts(request, parts[1:])
        if parts[:2] == ["fine_tuning", "jobs"]:
            return self._jobs(request, parts[2:])
        if parts[0] == "models":
            return self._models(method, parts[1:])
        raise _Rejected(_no_route(request))

    def _authenticate(self, request: Received) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = request.headers.get("api-key") or (token if scheme == "Bearer" else "")
        if not given or self.key not in {None, given}:
            raise _Rejected(errors.invalid_key())

    def _files(self, request: Received, rest: list[str]) -> StubReply:
        if not rest:
            return self._upload(request) if request.method == "POST" else self._list_files(request)
        file = self.files.get(rest[0])
        if file is None:
            raise _Rejected(errors.no_file(rest[0]))
        if rest[1:] == ["content"]:
            disposition = f'attachment; filename="{quote(file.filename)}"'
            return StubReply(
                content=file.content,
                content_type="application/octet-stream",
                headers={"content-disposition": disposition},
            )
        if request.method == "DELETE":
            del self.files[file.id]
            return _json({"object": "file", "id": file.id, "deleted": True})
        shown = file.document()
        if file.status in {"pending", "running"} and self.auto != "none":
            file.status = "processed"
        return _json(shown)

    def _list_files(self, request: Received) -> StubReply:
        asked = dict(request.query)
        files = [f for f in self.files.values() if asked.get("purpose") in {None, f.purpose}]
        if asked.get("order", "desc") == "desc":
            files.reverse()
        shown = [file.document() for file in files]
        return self._page(shown, request, default=10_000, largest=10_000, ids=True)

    def _upload(self, request: Received) -> StubReply:
        parts = {part.name: part for part in request.form()}
        fields = {name: part.content.decode() for name, part in parts.items() if name != "file"}
        for name in ("file", "purpose"):
            if name not in parts:
                raise _bad(f"'{name}' is a required property")
        part = parts["file"]
        file_id = self._store_file(part.filename or "", fields["purpose"], part.content)
        if seconds := fields.get("expires_after[seconds]"):
            self.files[file_id].expires_at = self.clock() + int(seconds)
        return _json(self.files[file_id].document())

    def _store_file(self, filename: str, purpose: str, content: bytes) -> str:
        """Store a file; of a training file, only what is not JSON is rejected."""
        if purpose == "fine-tune":
            for number, line in enumerate(
                content.removeprefix(codecs.BOM_UTF8).splitlines(), start=1
            ):
                if line.strip() and not _is_json(line):
                    raise _Rejected(errors.not_jsonl(number))
        return self.add_file(content, filename=filename, purpose=purpose)

    def _upload_parts(self, request: Received, rest: list[str]) -> StubReply:
        now = self.clock()
        if not rest:
            asked = _validated(UploadIn, _body(request))
            parts = OpenAIUpload(id=f"upload_{secrets.token_hex(12)}", asked=asked, created_at=now)
            self.uploads[parts.id] = parts
            return _json(parts.document())
        found = self.uploads.get(rest[0])
        if found is None:
            message = f"No such Upload object: {rest[0]}"
            raise _Rejected(ErrorAnswer(status=404, message=message, param="upload_id"))
        if found.status != "pending":
            raise _Rejected(errors.wrong_state(f"Upload {found.id} is {found.status}."))
        if rest[1:] == ["parts"]:
            data = next((part.content for part in request.form() if part.name == "data"), None)
            if data is None:
                raise _bad("'data' is a required property")
            part_id = f"part_{secrets.token_hex(12)}"
            found.parts[part_id] = data
            return _json(
                {
                    "object": "upload.part",
                    "id": part_id,
                    "created_at": now,
                    "upload_id": found.id,
                }
            )
        if rest[1:] == ["cancel"]:
            found.status = "cancelled"
        elif rest[1:] == ["complete"]:
            self._complete(found, _validated(CompleteUploadIn, _body(request)))
        else:
            raise _Rejected(_no_route(request))
        return _json(found.document())

    def _complete(self, upload: OpenAIUpload, asked: CompleteUploadIn) -> None:
        if unknown := [part for part in asked.part_ids if part not in upload.parts]:
            raise _bad(f"No such Part object: {unknown[0]}", param="part_ids")
        content = b"".join(upload.parts[part] for part in asked.part_ids)
        if len(content) != upload.asked.bytes:
            raise _bad(f"Got {len(content)} bytes instead of {upload.asked.bytes}.", param="bytes")
        file_id = self._store_file(upload.asked.filename, upload.asked.purpose, content)
        upload.file, upload.status = self.files[file_id], "completed"

    def _jobs(self, request: Received, rest: list[str]) -> StubReply:
        if not rest:
            return self._create(request) if request.method == "POST" else self._list_jobs(request)
        job = self.jobs.get(rest[0])
        if job is None:
            raise _Rejected(errors.no_job(rest[0]))
        action = (request.method, *rest[1:])
        if action == ("GET", "events"):
            return self._page(job.events[::-1], request, default=20, largest=1000)
        if action == ("GET", "checkpoints"):
            return self._page(job.checkpoints[::-1], request, default=10, largest=1000, ids=True)
        if action == ("GET",):
            shown = self._job_document(job)
            # After the response, so that a client sees every status.
            if self.auto == "complete" or (
                self.auto == "validate" and job.status in {"validating_files", "pausing"}
            ):
                self.advance(job.id)
            return _json(shown)
        if action == ("POST", "cancel"):
            self._cancel(job)
        elif action == ("POST", "pause"):
            self._pause(job)
        elif action == ("POST", "resume"):
            self._resume(job)
        else:
            raise _Rejected(_no_route(request))
        return _json(self._job_document(job))

    def _job_document(self, job: OpenAIJob) -> dict[str, Any]:
        return {**job.document(), **self.extras}

    def _cancel(self, job: OpenAIJob) -> None:
        """Cancel at once; a finished job is rejected, which is not documented."""
        if job.is_over:
            raise _Rejected(errors.wrong_state(f"Job {job.id} is already {job.status}."))
        self.set_status(job.id, "cancelled")
        job.estimated_finish = None
        self.add_event(job.id, events.CANCELLED)

    def _pause(self, job: OpenAIJob) -> None:
        """Pause a running job, as Azure documents; what other jobs answer is not documented."""
        if job.status != "running":
            raise _Rejected(errors.wrong_state(f"Job {job.id} is {job.status}, not running."))
        job.status = "pausing"
        job.estimated_finish = None
        self.add_event(job.id, events.PAUSING)
        if self.pauses_at_once:
            self.advance(job.id)

    def _resume(self, job: OpenAIJob) -> None:
        if job.status != "paused":
            raise _Rejected(errors.wrong_state(f"Job {job.id} is {job.status}, not paused."))
        job.status = "queued"
        self.add_event(job.id, events.RESUMED)

    def _list_jobs(self, request: Received) -> StubReply:
        jobs = list(reversed(self.jobs.values()))
        if self.lists_lag:
            self.lists_lag -= 1
            jobs = jobs[1:]
        for late in self._late:
            late.left -= 1
        self._carry_out_late()
        shown = [self._job_document(job) for job in jobs if _has_metadata(job, request.query)]
        return self._page(shown, request, default=20, largest=1000)

    def _create(self, request: Received) -> StubReply:
        body = _body(request)
        _validated(self.job_model, body)
        if self.late_creates:
            late = _DelayedCreate(left=self.late_creates.pop(0), body=body, owner=self.owner)
            self._late.append(late)
            raise _Rejected(
                ErrorAnswer(status=504, message="The gateway timed out.", type="server_error")
            )
        job = self._accept(body, self.owner)
        reply = _json(self._job_document(job), self.created_status)
        if self.created_status == 201:
            reply.headers["location"] = f"{self.url}/fine_tuning/jobs/{job.id}"
        return reply

    def _accept(self, body: dict[str, Any], owner: str) -> OpenAIJob:
        name = self.aliases.get(body["model"], body["model"])
        if name not in self.models and name not in self._tuned_models():
            raise _Rejected(errors.model_not_available(name))
        for param in ("training_file", "validation_file"):
            file_id = body.get(param)
            if file_id is not None and file_id not in self.files:
                raise _Rejected(errors.invalid_training_file(file_id, param))
        return self._make_job(body, owner)

    def catch_up(self) -> None:
        """Carry out all delayed creates."""
        with self._state:
            for late in self._late:
                late.left = 0
            self._carry_out_late()

    def _carry_out_late(self) -> None:
        due = [late for late in self._late if late.left <= 0]
        self._late = [late for late in self._late if late.left > 0]
        for late in due:
            with suppress(_Rejected):  # its client already got a 504
                self._accept(late.body, late.owner)

    def _tuned_models(self) -> dict[str, int]:
        """Return the models of finished jobs and their checkpoints, with their times."""
        found = {
            str(point["fine_tuned_model_checkpoint"]): int(point["created_at"])
            for job in self.jobs.values()
            if job.fine_tuned_model
            for point in job.checkpoints
        }
        found |= {
            job.fine_tuned_model: job.finished_at or job.created_at
            for job in self.jobs.values()
            if job.fine_tuned_model
        }
        return {name: at for name, at in found.items() if name not in self._deleted_models}

    def _models(self, method: str, rest: list[str]) -> StubReply:
        base = dict.fromkeys([*self.models, *self.other_models, *self.aliases], 1_700_000_000)
        tuned = self._tuned_models()
        cards = {
            name: {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "test" if name in tuned else "system",
            }
            for name, created in (base | tuned).items()
        }
        if not rest:
            return _json({"object": "list", "data": list(cards.values())})
        name = rest[0]
        if name not in cards:
            raise _Rejected(errors.no_model(name))
        if method == "DELETE":
            if name in base:
                message = f"The model '{name}' belongs to another organization."
                raise _Rejected(ErrorAnswer(status=403, message=message))
            self._deleted_models.add(name)
            return _json({"id": name, "object": "model", "deleted": True})
        return _json(cards[name])

    def _page(
        self,
        found: Sequence[dict[str, Any]],
        request: Received,
        *,
        default: int,
        largest: int,
        ids: bool = False,
    ) -> StubReply:
        """Return a page; an `after` that is not in the list is rejected, which is a choice."""
        asked = dict(request.query)
        limit = asked.get("limit", str(default))
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= largest:
            raise _bad(f"limit must be between 1 and {largest}", param="limit")
        start = 0
        if after := asked.get("after"):
            start = 1 + next((n for n, item in enumerate(found) if item["id"] == after), -2)
            if start < 0:
                raise _bad(f"Could not find {after} in this list", param="after")
        shown = found[start : start + int(limit)]
        page: dict[str, Any] = {"object": "list", "data": shown}
        if self.says_has_more:
            page["has_more"] = start + len(shown) < len(found)
        if ids:
            page["first_id"] = shown[0]["id"] if shown else None
            page["last_id"] = shown[-1]["id"] if shown else None
        return _json(page)


def _json(body: Any, status: int = 200) -> StubReply:
    return StubReply(status=status, content=json.dumps(body).encode())


def _bad(message: str, *, param: str | None = None) -> _Rejected:
    return _Rejected(ErrorAnswer(status=400, message=message, param=param))


def _no_route(request: Received) -> ErrorAnswer:
    return ErrorAnswer(status=404, message=f"Invalid URL ({request.method} {request.path})")


def _body(request: Received) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError:
        raise _bad("We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise _bad("The body must be a JSON object.")
    return body


def _validated(model: type[_M], body: dict[str, Any]) -> _M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _bad(f"invalid {place}: {first['msg']}", param=place or None) from None


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _has_metadata(job: OpenAIJob, query: Sequence[tuple[str, str]]) -> bool:
    """Return whether a job has every pair of the query; `metadata=null` asks for jobs with none."""
    metadata = job.asked.get("metadata") or {}
    if ("metadata", "null") in query:
        return not metadata
    pairs = {
        name.removeprefix("metadata[")[:-1]: value
        for name, value in query
        if name.startswith("metadata[") and name.endswith("]")
    }
    return all(metadata.get(name) == value for name, value in pairs.items())
