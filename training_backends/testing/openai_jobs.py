"""Files, uploads and jobs stored by `ScriptedOpenAIProvider`, and what its jobs do."""

import codecs
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, ClassVar, Literal

from training_backends.protocols.openai import events
from training_backends.protocols.openai.model_names import TunedModelName
from training_backends.protocols.openai.requests import UploadIn
from training_backends.protocols.openai.results import write_results
from training_backends.protocols.openai.status import TERMINAL_JOB_STATUSES
from training_backends.protocols.openai.wire import MIN_EXAMPLES, StepMetrics

__all__ = ["OpenAIFile", "OpenAIJob", "OpenAIState", "OpenAIUpload"]

_ORGANIZATION = "org-test"
_KEPT_CHECKPOINTS = 3


@dataclass(slots=True, kw_only=True)
class OpenAIFile:
    """A file of the server."""

    id: str
    filename: str
    purpose: str
    created_at: int
    status: str = "processed"
    expires_at: int | None = None
    content: bytes = field(repr=False, default=b"")

    @property
    def rows(self) -> list[bytes]:
        """The lines that are not blank."""
        return [
            line for line in self.content.removeprefix(codecs.BOM_UTF8).splitlines() if line.strip()
        ]

    def document(self) -> dict[str, Any]:
        """Return its JSON representation."""
        return {
            "object": "file",
            "id": self.id,
            "purpose": self.purpose,
            "filename": self.filename,
            "bytes": len(self.content),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "status": self.status,
            "status_details": None,
        }


@dataclass(slots=True, kw_only=True)
class OpenAIJob:
    """A job of the server.

    Attributes:
        asked: The body of the create request.
        model: The snapshot that the model of the request stands for.
        numbers: Its hyperparameters, `auto` until it starts.
        events: Oldest first, as are the checkpoints.
        metrics: Metrics of every step.
        tag: The last part of its model's name.
        owner: Its owner, as set by the test.
    """

    id: str
    asked: dict[str, Any]
    model: str
    created_at: int
    seed: int
    numbers: dict[str, Any]
    tag: str
    status: str = "validating_files"
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[StepMetrics] = field(default_factory=list)
    steps_per_epoch: int = 0
    total_steps: int = 0
    owner: str = ""

    @property
    def method(self) -> str:
        """The type of its method."""
        return str((self.asked.get("method") or {}).get("type") or "supervised")

    @property
    def is_over(self) -> bool:
        """Whether it never changes again."""
        return self.status in TERMINAL_JOB_STATUSES

    def name(self, tag: str, step: int | None = None) -> str:
        """Return the name of a model of this job."""
        suffix = self.asked.get("suffix") or ""
        name = TunedModelName(
            base=self.model, organization="test", suffix=suffix, tag=tag, step=step
        )
        return str(name)

    def document(self) -> dict[str, Any]:
        """Return its JSON representation; keys of unknown values are present with null."""
        options = {"hyperparameters": dict(self.numbers)}
        return {
            "object": "fine_tuning.job",
            "id": self.id,
            "model": self.model,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "fine_tuned_model": self.fine_tuned_model,
            "organization_id": _ORGANIZATION,
            "result_files": list(self.result_files),
            "status": self.status,
            "validation_file": self.asked.get("validation_file"),
            "training_file": self.asked["training_file"],
            "hyperparameters": dict(self.numbers) if self.method == "supervised" else None,
            "trained_tokens": self.trained_tokens,
            "error": self.error or {"code": None, "message": None, "param": None},
            "user_provided_suffix": self.asked.get("suffix"),
            "seed": self.seed,
            "estimated_finish": self.estimated_finish,
            "integrations": list(self.asked.get("integrations") or ()),
            "metadata": self.asked.get("metadata"),
            "method": {"type": self.method, self.method: options},
        }


@dataclass(slots=True, kw_only=True)
class OpenAIUpload:
    """An upload in parts."""

    id: str
    asked: UploadIn
    created_at: int
    status: str = "pending"
    parts: dict[str, bytes] = field(default_factory=dict)
    file: OpenAIFile | None = None

    def document(self) -> dict[str, Any]:
        """Return its JSON representation."""
        return {
            "object": "upload",
            "id": self.id,
            "bytes": self.asked.bytes,
            "created_at": self.created_at,
            "expires_at": self.created_at + 3600,
            "filename": self.asked.filename,
            "purpose": self.asked.purpose,
            "status": self.status,
            "file": self.file.document() if self.file else None,
        }


class OpenAIState:
    """The files and jobs of a server; tests read and change them directly.

    Attributes:
        new_file_status: Status of new files; Azure's is `pending`.
        pauses_at_once: Whether a pause skips the status `pausing`.
        result_coding: Coding of result files, as `result_layout` their columns.
        sends_metrics_data: Whether metrics events have `data`.
        clock: Returns Unix seconds.
        aliases: Names of models that stand for a snapshot.
        training_files: Ids of all training files ever added, also of those that were lost.
    """

    new_file_status = "processed"
    pauses_at_once = True
    result_coding: Literal["plain", "base64"] = "base64"
    result_layout: Literal["openai", "azure"] = "openai"
    sends_metrics_data = True
    aliases: ClassVar[Mapping[str, str]] = {
        "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
        "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    }

    def __init__(self) -> None:
        self.files: dict[str, OpenAIFile] = {}
        self.training_files: list[str] = []
        self.jobs: dict[str, OpenAIJob] = {}
        self.clock: Callable[[], int] = lambda: int(time.time())
        self._state = RLock()

    # -- direct access -----------------------------------------------------------------

    def add_file(
        self, content: bytes, *, filename: str = "train.jsonl", purpose: str = "fine-tune"
    ) -> str:
        """Add a file, as another client would, and return its id."""
        with self._state:
            file = OpenAIFile(
                id=f"file-{secrets.token_hex(11)}",
                filename=filename,
                purpose=purpose,
                created_at=self.clock(),
                status=self.new_file_status,
                content=content,
            )
            self.files[file.id] = file
            if purpose == "fine-tune":
                self.training_files.append(file.id)
            return file.id

    def lose_file(self, file_id: str) -> None:
        """Remove a file, as its expiry would."""
        with self._state:
            del self.files[file_id]

    def add_job(self, asked: Mapping[str, Any], status: str = "running") -> str:
        """Add a job of another client, without any check, and return its id."""
        with self._state:
            job = self._make_job(dict(asked), owner="")
            job.status = status
            return job.id

    def set_status(self, job_id: str, word: str) -> None:
        """Set a job's status, also to a word of no specification, without an event."""
        with self._state:
            job = self.jobs[job_id]
            job.status = word
            if job.is_over and job.finished_at is None:
                job.finished_at = self.clock()

    def add_event(
        self, job_id: str, message: str, *, level: str = "info", data: Any = None
    ) -> None:
        """Add an event; one with data is a metrics event."""
        with self._state:
            self.jobs[job_id].events.append(
                {
                    "object": "fine_tuning.job.event",
                    "id": f"ftevent-{secrets.token_hex(12)}",
                    "created_at": self.clock(),
                    "level": level,
                    "message": message,
                    "type": "metrics" if data else "message",
                    "data": data or {},
                }
            )

    def add_checkpoint(self, job_id: str, step: int, **metrics: float) -> str:
        """Add a checkpoint and return its model's name; only the last three are kept."""
        with self._state:
            job = self.jobs[job_id]
            name = job.name(secrets.token_hex(4), step)
            job.checkpoints.append(
                {
                    "object": "fine_tuning.job.checkpoint",
                    "id": f"ftckpt_{secrets.token_hex(12)}",
                    "created_at": self.clock(),
                    "fine_tuned_model_checkpoint": name,
                    "fine_tuning_job_id": job_id,
                    "step_number": step,
                    "metrics": {"step": step, **metrics},
                }
            )
            del job.checkpoints[:-_KEPT_CHECKPOINTS]
            return name

    def advance(self, job_id: str) -> str:
        """Take a job to its next status and return that; a paused or finished job keeps its own.

        Validation finds invalid data and ends in `failed`; training is done in one go.
        """
        with self._state:
            job = self.jobs[job_id]
            if job.status == "validating_files":
                self._validate(job)
            elif job.status == "queued":
                self._start(job)
            elif job.status == "running":
                self._succeed(job)
            elif job.status == "pausing":
                job.status = "paused"
                self.add_event(job_id, events.PAUSED)
            return job.status

    def run_to(self, job_id: str, status: str) -> None:
        """Advance a job until it has this status.

        Raises:
            ValueError: The job cannot reach it.
        """
        with self._state:
            while self.jobs[job_id].status != status:
                before = self.jobs[job_id].status
                if self.advance(job_id) == before:
                    raise ValueError(f"job {job_id} is {before} and cannot become {status}")

    def train(self, job_id: str, steps: int) -> None:
        """Let a running job do steps, at most to its end, without ending it.

        Each has a metrics event; each epoch's end also has a checkpoint.
        """
        with self._state:
            job = self.jobs[job_id]
            first = len(job.metrics) + 1
            for step in range(first, min(first + steps, job.total_steps + 1)):
                self._train_step(job, step)

    def fail_job(self, job_id: str, *, code: str, message: str, param: str | None = None) -> None:
        """End a job as failed."""
        with self._state:
            self.jobs[job_id].error = {"code": code, "message": message, "param": param}
            self.set_status(job_id, "failed")
            self.add_event(job_id, events.failed_message(message), level="error")

    # -- what jobs do ------------------------------------------------------------------

    def _make_job(self, asked: dict[str, Any], owner: str) -> OpenAIJob:
        seed = asked.get("seed")
        method = asked.get("method") or {}
        kind = method.get("type") or "supervised"
        given = (method.get(kind) or {}).get("hyperparameters") or asked.get("hyperparameters")
        names = ["n_epochs", "batch_size", "learning_rate_multiplier"]
        numbers = dict.fromkeys([*names, "beta"] if kind == "dpo" else names, "auto")
        numbers |= {name: value for name, value in (given or {}).items() if value is not None}
        job = OpenAIJob(
            id=f"ftjob-{secrets.token_hex(12)}",
            asked=asked,
            model=self.aliases.get(asked["model"], asked["model"]),
            created_at=self.clock(),
            seed=secrets.randbelow(2**31) if seed is None else seed,
            numbers=numbers,
            tag=secrets.token_hex(4),
            owner=owner,
        )
        self.jobs[job.id] = job
        self.add_event(job.id, events.created_message(job.id))
        files = asked["training_file"], asked.get("validation_file")
        self.add_event(job.id, events.validating_message(*files))
        return job

    def _validate(self, job: OpenAIJob) -> None:
        for param in ("training_file", "validation_file"):
            file = self.files.get(job.asked.get(param) or "")
            if file is not None and (fault := _data_fault(file, param, job.method)):
                self.fail_job(job.id, code=fault[0], message=fault[1], param=param)
                return
        job.status = "queued"
        self.add_event(job.id, events.VALIDATED)

    def _start(self, job: OpenAIJob) -> None:
        file = self.files.get(job.asked["training_file"])
        chosen = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8, "beta": 0.1}
        for name, value in chosen.items():
            if job.numbers.get(name) == "auto":
                job.numbers[name] = value
        rows = len(file.rows) if file else MIN_EXAMPLES
        job.steps_per_epoch = max(1, math.ceil(rows / (job.numbers.get("batch_size") or 1)))
        job.total_steps = job.steps_per_epoch * (job.numbers.get("n_epochs") or 1)
        job.status = "running"
        job.estimated_finish = self.clock() + 60
        if not job.metrics:
            self.add_event(job.id, events.STARTED)

    def _train_step(self, job: OpenAIJob, step: int) -> None:
        loss = round(2 / (1 + step / 10), 4)
        ends_epoch = step % job.steps_per_epoch == 0
        values: dict[str, float] = {
            "train_loss": loss,
            "train_mean_token_accuracy": round(1 - loss / 3, 4),
        }
        if job.asked.get("validation_file"):
            values["valid_loss"] = values["valid_mean_token_accuracy"] = 0.5
            if ends_epoch:
                values["full_valid_loss"] = values["full_valid_mean_token_accuracy"] = 0.25
        metrics = StepMetrics.model_validate(
            {"step": step, "total_steps": job.total_steps, **values}
        )
        job.metrics.append(metrics)
        data = events.metrics_data(metrics) if self.sends_metrics_data else None
        self.add_event(job.id, events.metrics_message(metrics), data=data)
        if ends_epoch:
            name = self.add_checkpoint(job.id, step, **values)
            if step < job.total_steps:
                self.add_event(job.id, events.checkpoint_message(step, name))

    def _succeed(self, job: OpenAIJob) -> None:
        self.train(job.id, job.total_steps)
        job.fine_tuned_model = job.name(job.tag)
        if job.checkpoints:
            job.checkpoints[-1]["fine_tuned_model_checkpoint"] = job.fine_tuned_model
        content = write_results(job.metrics, coding=self.result_coding, layout=self.result_layout)
        file_id = self.add_file(content, filename="step_metrics.csv", purpose="fine-tune-results")
        self.files[file_id].status = "processed"
        file = self.files.get(job.asked["training_file"])
        epochs = job.numbers.get("n_epochs") or 1
        job.trained_tokens = (len(file.content) if file else 1000) // 4 * epochs
        job.result_files = [file_id]
        job.estimated_finish = None
        self.set_status(job.id, "succeeded")
        self.add_event(job.id, events.model_message(job.fine_tuned_model))
        self.add_event(job.id, events.COMPLETED)


def _data_fault(file: OpenAIFile, param: str, method: str) -> tuple[str, str] | None:
    """Return code and message of what is wrong with a file; the service finds it after create."""
    rows = file.rows
    what = param.replace("_", " ").capitalize()
    if len(rows) < MIN_EXAMPLES and param == "training_file":
        return (
            "invalid_n_examples",
            f"{what} has {len(rows)} example(s), but must have at least {MIN_EXAMPLES} examples",
        )
    wanted = ("input", "preferred_output", "non_preferred_output")
    for number, line in enumerate(rows, start=1):
        row = json.loads(line)
        if method == "dpo":
            missing = next((name for name in wanted if name not in row), None)
        else:
            messages = row.get("messages")
            missing = None if isinstance(messages, list) and messages else "messages"
            if missing is None and not all("role" in message for message in messages):
                missing = "role"
        if missing:
            said = f"The job failed due to an invalid {what.lower()}. Invalid file format. "
            return "invalid_training_file", f"{said}Example {number} is missing '{missing}'"
    return None
