"""Files and jobs stored by `ScriptedProvider`, and their JSON representation."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ProviderFile", "StoredJob", "base_card", "file_id_of", "tuned_card"]


def file_id_of(entry: Any) -> str:
    """Return the file id of an entry of training_files, an id or an object."""
    return str(entry["file_id"] if isinstance(entry, dict) else entry)


@dataclass(slots=True, kw_only=True)
class ProviderFile:
    """An uploaded file."""

    id: str
    filename: str
    size: int
    digest: str
    purpose: str
    created_at: int
    visibility: str | None = None
    deleted: bool = False
    content: bytes = field(repr=False, default=b"")

    def document(self) -> dict[str, Any]:
        """Return its JSON representation."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "sample_type": "instruct",
            "num_lines": self.content.count(b"\n"),
            "mimetype": "application/jsonl",
            "source": "upload",
            "signature": self.digest[:16],
            "visibility": self.visibility,
        }


@dataclass(slots=True, kw_only=True)
class StoredJob:
    """A created job.

    Attributes:
        asked: The body of the create request.
        starts: How often its start was accepted.
        owner: Its owner, as set by the test.
    """

    id: str
    asked: dict[str, Any]
    created_at: int
    status: str = "QUEUED"
    modified_at: int = 0
    started: bool = False
    starts: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] | None = None
    fine_tuned_model: str | None = None
    owner: str = ""

    @property
    def latest_step(self) -> int:
        """Step of the last checkpoint."""
        return int(max((point["step_number"] for point in self.checkpoints), default=0))

    def document(self, *, newest_first: bool = True, detailed: bool = True) -> dict[str, Any]:
        """Return its JSON representation."""
        order = -1 if newest_first else 1
        shown: dict[str, Any] = {
            "id": self.id,
            "object": "job",
            "auto_start": self.asked.get("auto_start", False),
            "model": self.asked["model"],
            "status": self.status,
            "created_at": self.created_at,
            "modified_at": self.modified_at,
            "training_files": [file_id_of(entry) for entry in self.asked["training_files"]],
            "validation_files": self.asked.get("validation_files") or [],
            "fine_tuned_model": self.fine_tuned_model,
            "suffix": self.asked.get("suffix"),
            "integrations": [
                {name: value for name, value in entry.items() if name != "api_key"}
                for entry in self.asked.get("integrations") or ()
            ],
            "metadata": self.metadata,
            "job_type": self.asked.get("job_type") or "completion",
            "hyperparameters": {"learning_rate": 1e-4, **self.asked["hyperparameters"]},
        }
        if shown["job_type"] == "completion":
            shown["repositories"] = [
                {
                    **{name: value for name, value in entry.items() if name != "token"},
                    "commit_id": "0" * 40,
                }
                for entry in self.asked.get("repositories") or ()
            ]
        else:
            shown["classifier_targets"] = [
                {"weight": 1.0, "loss_function": "single_class", **target}
                for target in self.asked.get("classifier_targets") or ()
            ]
        if detailed:
            shown |= {"events": self.events[::order], "checkpoints": self.checkpoints[::order]}
        return shown


def base_card(name: str, created: int) -> dict[str, Any]:
    """Return the JSON of a base model."""
    abilities = {"completion_chat": True, "fine_tuning": True}
    return {
        "id": name,
        "object": "model",
        "created": created,
        "type": "base",
        "capabilities": abilities,
    }


def tuned_card(job: StoredJob) -> dict[str, Any]:
    """Return the JSON of a job's fine-tuned model."""
    assert job.fine_tuned_model is not None  # noqa: S101  # for the type checker
    card = base_card(job.fine_tuned_model, job.modified_at)
    return {**card, "type": "fine-tuned", "job": job.id, "root": job.asked["model"]}
