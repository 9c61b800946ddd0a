"""An in-memory server of Together's fine-tuning API, with direct access for tests.

It behaves as the official client (together 3.1.1) expects; where that does not show what the
service does, the docstrings say what was chosen. Uploads go to a presigned URL of a second server.
"""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from threading import RLock
from typing import Any, ClassVar

from training_backends.testing.server import LoopbackServer, Received, StubReply

__all__ = ["ScriptedTogetherProvider", "TogetherFile", "TogetherJob"]

_FINAL = frozenset({"error", "user_error", "completed", "cancelled"})
_EVENTS = {
    "pending": ("job_pending", "info", "Job is pending"),
    "running": ("training_start", "info", "Training started"),
    "compressing": ("model_compressing", "info", "Compressing model"),
    "uploading": ("model_uploading", "info", "Uploading model"),
    "cancel_requested": ("cancel_requested", "info", "Cancel requested"),
    "cancelled": ("job_stopped", "info", "Job stopped"),
    "error": ("job_error", "error", "Job failed"),
    "user_error": ("job_user_error", "error", "The data is invalid"),
    "completed": ("job_complete", "info", "Job finished"),
}
"""Type, level and message of the event of each status."""


class _ErrorReply(Exception):
    """An error response."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.reply = _json(
            {"error": {"message": message, "type": "invalid_request_error", "code": None}}, status
        )


@dataclass(slots=True, kw_only=True)
class TogetherFile:
    """A file of the server.

    Attributes:
        content: None until it is uploaded.
        processing_status: None until it is to be processed.
    """

    id: str
    filename: str
    purpose: str
    file_type: str
    checksum: str
    created_at: int
    content: bytes | None = field(repr=False, default=None)
    processing_status: str | None = None
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """Return its JSON representation."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": "file",
            "filename": self.filename,
            "bytes": len(self.content or b""),
            "created_at": self.created_at,
            "purpose": self.purpose,
            "FileType": self.file_type,
        }
        if self.processing_status is not None:
            body["processing_status"] = self.processing_status
        if self.processing_status in {"COMPLETED", "INVALID_FORMAT"}:
            body["validation_report"] = {"valid": self.error is None, "error": self.error}
        return body


@dataclass(slots=True, kw_only=True)
class TogetherJob:
    """A job of the server.

    Attributes:
        asked: The body of the create request.
        events: Oldest first, as are the checkpoints and metrics.
        price: In dollars.
        tokens: Trained tokens.
    """

    id: str
    asked: dict[str, Any]
    output_name: str
    created_at: float
    updated_at: float
    status: str = "pending"
    started_at: float | None = None
    price: float = 0.0
    tokens: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return its JSON representation, which repeats the request without keys."""
        echoed = {name: value for name, value in self.asked.items() if name != "wandb_key"}
        return {
            **echoed,
            "id": self.id,
            "status": self.status,
            "user_id": "user-test",
            "created_at": _iso(self.created_at),
            "updated_at": _iso(self.updated_at),
            "started_at": None if self.started_at is None else _iso(self.started_at),
            "model_output_name": self.output_name,
            "adapter_output_name": None,
            "token_count": self.tokens if self.status == "completed" else None,
            "total_price": round(self.price * 10**9),
            "events": self.events,
        }


class ScriptedTogetherProvider(LoopbackServer):
    """Implements the API; tests control everything else.

    Jobs stay in their status until the test changes it: see `set_status`.

    Attributes:
        key: The only accepted API key; None accepts any.
        storage: The server behind presigned URLs; faults and requests of its own.
        models: Base models that can be trained.
        limits: The limits of every model.
        dollars_per_byte: Price of an epoch over a byte of training data.
        credit: The account's limit in dollars.
        processes_files: Whether files are processed once their status was asked for.
        upper_case_events: Whether event types are in upper case.
        late_creates: For each of the next creates, the number of job lists after which it is
            carried out; its response is a 504.
        lists_lag: Number of job lists that do not yet include the newest job.
    """

    models: ClassVar[tuple[str, ...]] = ("meta-llama/Tiny-8B", "org/other-model")

    def __init__(self) -> None:
        super().__init__(self._respond)
        self.storage = LoopbackServer(self._store)
        self.key: str | None = "test-key"
        self.files: dict[str, TogetherFile] = {}
        self.jobs: dict[str, TogetherJob] = {}
        self.clock: Callable[[], float] = time.time
        self.dollars_per_byte = 0.001
        self.credit = 100.0
        self.processes_files = True
        self.upper_case_events = False
        self.late_creates: list[int] = []
        self.lists_lag = 0
        self.limits: dict[str, Any] = {
            "default_gradient_accumulation_steps": 1,
            "lora_training": {
                "default_rank": 64,
                "max_rank": 64,
                "min_batch_size": 8,
                "max_batch_size": 32,
                "max_batch_size_dpo": 16,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            "full_training": {
                "min_batch_size": 8,
                "max_batch_size": 16,
                "max_batch_size_dpo": 8,
            },
            "min_learning_rate": 1e-8,
            "max_learning_rate": 0.01,
            "max_num_epochs": 20,
            "max_num_evals": 100,
            "max_num_checkpoints": 10,
            "min_max_seq_length": 128,
            "max_seq_length_sft": 8192,
            "max_seq_length_dpo": 4096,
            "merge_output_lora": True,
            "supports_full_training": True,
            "supports_vision": False,
            "supports_tools": True,
            "supports_reasoning": False,
        }
        self._late: list[tuple[int, dict[str, Any]]] = []
        self._presigned: dict[str, str] = {}
        self._state = RLock()

    def start(self, port: int = 0) -> None:
        """Start both servers."""
        self.storage.start()
        super().start(port)

    def stop(self) -> None:
        """Stop both servers."""
        super().stop()
        self.storage.stop()

    # -- direct access -----------------------------------------------------------------

    def add_file(self, content: bytes, *, filename: str = "data.jsonl") -> str:
        """Store a processed file and return its id."""
        file = self._new_file(filename, "fine-tune", "jsonl", sha256(content).hexdigest())
        file.content, file.processing_status = content, "COMPLETED"
        return file.id

    def add_job(self, **asked: Any) -> str:
        """Create a job of someone else and return its id."""
        return self._make_job({"model": self.models[0], **asked}).id

    def set_status(self, job_id: str, status: str, message: str | None = None) -> None:
        """Change a job's status and log it."""
        with self._state:
            job = self.jobs[job_id]
            job.status = status
            if status == "running" and job.started_at is None:
                job.started_at = self.clock()
            kind, level, text = _EVENTS.get(status, (status, "info", status))
            self.add_event(job_id, kind, message or text, level=level)

    def add_event(self, job_id: str, kind: str, message: str, **fields: Any) -> None:
        """Add an event to a job's log."""
        job = self.jobs[job_id]
        job.updated_at = self.clock()
        event = {
            "object": "fine-tune-event",
            "created_at": _iso(job.updated_at),
            "type": kind.upper() if self.upper_case_events else kind,
            "message": message,
            "level": "info",
            **fields,
        }
        job.events.append(event)

    def add_metrics(self, job_id: str, step: int, *, part: str = "train", **values: float) -> None:
        """Log metrics of a step, for example `loss`."""
        row = {"train/global_step": float(step), "timestamp": self.clock()}
        self.jobs[job_id].metrics.append(row | {f"{part}/{k}": v for k, v in values.items()})

    def add_checkpoint(self, job_id: str, step: int) -> None:
        """Save a checkpoint and log it."""
        self.add_event(job_id, "checkpoint_save", f"Checkpoint saved at step {step}", step=step)
        entry = {
            "step": step,
            "created_at": _iso(self.clock()),
            "path": f"s3://checkpoints/{job_id}/{step}",
            "checkpoint_type": f"Intermediate (step {step})",
            "checkpoint": "adapter",
        }
        self.jobs[job_id].checkpoints.append(entry)

    # -- storage -----------------------------------------------------------------------

    def _store(self, request: Received) -> StubReply:
        """Accept a presigned PUT; as object stores do, reject one that also has a key."""
        token = dict(request.query).get("signature", "")
        with self._state:
            file_id = self._presigned.get(token)
            if file_id is None or "authorization" in request.headers:
                return StubReply(status=403, content=b"<Code>AccessDenied</Code>")
            self.files[file_id].content = request.body
        return StubReply()

    # -- requests ----------------------------------------------------------------------

    def _respond(self, request: Received) -> StubReply:
        with self._state:
            try:
                return self._route(request)
            except _ErrorReply as rejected:
                return rejected.reply

    def _route(self, request: Received) -> StubReply:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not given or self.key not in {None, given}:
            raise _ErrorReply(401, "Invalid API key provided.")
        match (request.method, *request.path.strip("/").split("/")):
            case ("POST", "v1", "files"):
                return self._upload(request)
            case ("GET", "v1", "files"):
                return _json({"data": [file.document() for file in self.files.values()]})
            case (method, "v1", "files", file_id, *rest):
                return self._file(method, self._known(self.files, file_id, "file"), rest)
            case ("POST", "v1", "fine-tunes"):
                return self._create(_body(request))
            case ("GET", "v1", "fine-tunes"):
                return self._list()
            case ("GET", "v1", "fine-tunes", "models", "limits"):
                return self._limits(dict(request.query).get("model_name", ""))
            case ("POST", "v1", "fine-tunes", "estimate-price"):
                return _json(self._price(_body(request)))
            case ("GET", "v1", "finetune", "download"):
                return self._download(dict(request.query))
            case (method, "v1", "fine-tunes", job_id, *rest):
                return self._job(method, self._known(self.jobs, job_id, "fine-tune job"), rest)
        raise _ErrorReply(404, f"No such route: {request.method} {request.path}")

    @staticmethod
    def _known(known: dict[str, Any], identifier: str, what: str) -> Any:
        if identifier not in known:
            raise _ErrorReply(404, f"No {what} found with id {identifier}.")
        return known[identifier]

    def _new_file(self, name: str, purpose: str, kind: str, checksum: str) -> TogetherFile:
        file = TogetherFile(
            id=f"file-{secrets.token_hex(8)}",
            filename=name,
            purpose=purpose,
            file_type=kind,
            checksum=checksum,
            created_at=int(self.clock()),
        )
        self.files[file.id] = file
        return file

    def _upload(self, request: Received) -> StubReply:
        """Redirect to a presigned URL; a checksum counts as stored once its bytes arrived."""
        fields = {part.name: part.content.decode() for part in request.form()}
        if missing := {"purpose", "file_name", "file_type", "checksum"} - fields.keys():
            raise _ErrorReply(400, f"Missing form field: {min(missing)}")
        for file in self.files.values():
            if file.checksum == fields["checksum"] and file.content is not None:
                return _json({"file_id": file.id, "message": "File already exists"}, 409)
        file = self._new_file(
            fields["file_name"], fields["purpose"], fields["file_type"], fields["checksum"]
        )
        token = secrets.token_hex(16)
        self._presigned[token] = file.id
        url = f"{self.storage.base_url}/bucket/{file.id}?signature={token}"
        return StubReply(status=302, headers={"location": url, "x-together-file-id": file.id})

    def _file(self, method: str, file: TogetherFile, rest: list[str]) -> StubReply:
        if (method, *rest) == ("POST", "preprocess"):
            if file.content is None:
                raise _ErrorReply(400, "The file was not uploaded.")
            file.processing_status = file.processing_status or "PENDING"
            return _json(file.document())
        if (method, *rest) == ("DELETE",):
            del self.files[file.id]
            return _json({"id": file.id, "deleted": True})
        shown = file.document()
        if file.processing_status == "PENDING" and self.processes_files:
            file.error = _format_error(file.content or b"")
            file.processing_status = "INVALID_FORMAT" if file.error else "COMPLETED"
        return _json(shown)

    def _limits(self, name: str) -> StubReply:
        if name not in self.models and name not in self.jobs:
            raise _ErrorReply(404, f"Model {name} is not available for fine-tuning.")
        return _json({"model_name": name, **self.limits})

    def _price(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = self._known(self.files, str(asked.get("training_file")), "file")
        if file.processing_status != "COMPLETED":
            reason = "train_file_invalid" if file.error else "train_file_not_validated"
            return {"estimation_available": False, "unavailable_reason": reason}
        tokens = len(file.content or b"") * asked.get("n_epochs", 1)
        price = tokens * self.dollars_per_byte
        return {
            "estimation_available": True,
            "allowed_to_proceed": price <= self.credit,
            "estimated_total_price": price,
            "estimated_train_token_count": tokens,
            "estimated_eval_token_count": 0,
            "user_limit": self.credit,
        }

    def _create(self, asked: dict[str, Any]) -> StubReply:
        if self.late_creates:
            self._late.append((self.late_creates.pop(0), asked))
            raise _ErrorReply(504, "The gateway timed out.")
        return _json(self._accept(asked).document())

    def _accept(self, asked: dict[str, Any]) -> TogetherJob:
        if bool(asked.get("model")) == bool(asked.get("from_checkpoint")):
            raise _ErrorReply(400, "Give either model or from_checkpoint.")
        if asked.get("model") not in {None, *self.models}:
            raise _ErrorReply(400, f"Model {asked['model']} is not available for fine-tuning.")
        if source := asked.get("from_checkpoint"):
            job_id, _, step = str(source).partition(":")
            saved = {
                str(each["step"]) for each in self._known(self.jobs, job_id, "job").checkpoints
            }
            if step and step not in saved:
                raise _ErrorReply(400, f"Job {job_id} has no checkpoint at step {step}.")
        if len(asked.get("suffix") or "") > 40:
            raise _ErrorReply(400, "suffix must be at most 40 characters.")
        price = self._price(asked)
        if not price["estimation_available"]:
            raise _ErrorReply(
                400, f"The training file cannot be used: {price['unavailable_reason']}"
            )
        if not price["allowed_to_proceed"]:
            raise _ErrorReply(402, "Insufficient credits.")
        job = self._make_job(asked)
        job.price = price["estimated_total_price"]
        job.tokens = price["estimated_train_token_count"]
        return job

    def _make_job(self, asked: dict[str, Any]) -> TogetherJob:
        now = self.clock()
        tag = secrets.token_hex(4)
        model = str(asked.get("model") or "continued").rpartition("/")[2]
        name = "-".join(part for part in (model, asked.get("suffix"), tag) if part)
        job = TogetherJob(
            id=f"ft-{secrets.token_hex(4)}-{secrets.token_hex(4)}",
            asked=asked,
            output_name=f"account/{name}",
            created_at=now,
            updated_at=now,
        )
        self.jobs[job.id] = job
        self.set_status(job.id, "pending")
        return job

    def _list(self) -> StubReply:
        shown = list(self.jobs.values())[::-1]
        if self.lists_lag:
            self.lists_lag -= 1
            shown = shown[1:]
        due = [asked for left, asked in self._late if left <= 1]
        self._late = [(left - 1, asked) for left, asked in self._late if left > 1]
        for asked in due:
            with suppress(_ErrorReply):  # its client already got a 504
                self._accept(asked)
        return _json({"data": [job.document() for job in shown]})

    def _job(self, method: str, job: TogetherJob, rest: list[str]) -> StubReply:
        match (method, *rest):
            case ("GET",):
                return _json(job.document())
            case ("GET", "events"):
                return _json({"data": job.events})
            case ("GET", "checkpoints"):
                return _json({"data": job.checkpoints})
            case ("GET", "metrics"):
                return _json({"metrics": job.metrics or None})
            case ("POST", "cancel"):
                return self._cancel(job)
            case ("DELETE",):
                if job.status not in _FINAL:
                    raise _ErrorReply(400, "The job is still running.")
                del self.jobs[job.id]
                return _json({"message": "The job was deleted."})
        raise _ErrorReply(404, "No such route.")

    def _cancel(self, job: TogetherJob) -> StubReply:
        """Request a cancel; a finished job is rejected, which is a choice."""
        if job.status in _FINAL:
            raise _ErrorReply(400, f"Job {job.id} is already {job.status}.")
        if job.status != "cancel_requested":
            self.set_status(job.id, "cancel_requested")
        return _json(job.document())

    def _download(self, asked: dict[str, str]) -> StubReply:
        job = self._known(self.jobs, asked.get("ft_id", ""), "fine-tune job")
        if job.status != "completed":
            raise _ErrorReply(400, "The job has no model yet.")
        content = f"{job.output_name} {asked.get('checkpoint')}".encode()
        return StubReply(content=content, content_type="application/octet-stream")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _json(body: Any, status: int = 200) -> StubReply:
    return StubReply(status=status, content=json.dumps(body).encode())


def _body(request: Received) -> dict[str, Any]:
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _ErrorReply(400, "The body must be a JSON object.")
    return body


def _format_error(content: bytes) -> str | None:
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            return f"Line {number} is not valid JSON."
    return None
