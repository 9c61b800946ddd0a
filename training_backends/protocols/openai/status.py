"""Translation between the protocol's words and ours: statuses of jobs and files, methods.

Sources: the OpenAPI document of 2026-08-21 (six statuses), OpenAI's documentation of 2026-11-10
(`pausing`, `paused`), Azure's specification 2024-10-21 (`created`, `pending`, states of files).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from training_backends.core.status import TrainingStatus

__all__ = [
    "FILE_FAILED",
    "FILE_PROCESSED",
    "FILE_STATUSES",
    "JOB_STATUSES",
    "METHODS",
    "TERMINAL_JOB_STATUSES",
    "is_file_settled",
    "to_method",
    "to_method_type",
    "to_status",
    "to_wire",
]

_STATUS: Mapping[str, TrainingStatus] = MappingProxyType(
    {
        "validating_files": TrainingStatus.VALIDATING,
        "queued": TrainingStatus.PENDING,
        "running": TrainingStatus.RUNNING,
        "pausing": TrainingStatus.STOPPING,
        "paused": TrainingStatus.PAUSED,
        "succeeded": TrainingStatus.COMPLETED,
        "failed": TrainingStatus.FAILED,
        "cancelled": TrainingStatus.CANCELLED,
        "created": TrainingStatus.PENDING,
        "pending": TrainingStatus.PENDING,
    }
)
# The protocol has no word between two others: a job that is being set up is still queued, and one
# that is being stopped still runs. The official clients know neither `pausing` nor Azure's words.
_WORD: Mapping[TrainingStatus, str] = MappingProxyType(
    {
        TrainingStatus.PENDING: "queued",
        TrainingStatus.VALIDATING: "validating_files",
        TrainingStatus.READY: "queued",
        TrainingStatus.INITIALIZING: "queued",
        TrainingStatus.RUNNING: "running",
        TrainingStatus.PAUSED: "paused",
        TrainingStatus.STOPPING: "running",
        TrainingStatus.COMPLETED: "succeeded",
        TrainingStatus.FAILED: "failed",
        TrainingStatus.CANCELLED: "cancelled",
    }
)

JOB_STATUSES: Final = tuple(_STATUS)
"""All known statuses of a job, OpenAI's first."""

TERMINAL_JOB_STATUSES: Final = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses that a job never leaves; any other word, also an unknown one, is not final."""

FILE_STATUSES: Final = (
    "uploaded",
    "pending",
    "running",
    "processed",
    "error",
    "deleting",
    "deleted",
)
"""All known statuses of a file. OpenAI's are uploaded, processed and error."""

FILE_PROCESSED: Final = frozenset({"processed"})
FILE_FAILED: Final = frozenset({"error", "deleting", "deleted"})
"""Statuses of a file that no job can use."""

METHODS: Final[Mapping[str, str]] = MappingProxyType(
    {"supervised": "sft", "dpo": "dpo", "reinforcement": "reinforcement"}
)
"""The protocol's training methods, each with our name."""
_METHOD_TYPES: Mapping[str, str] = MappingProxyType({ours: word for word, ours in METHODS.items()})


def to_status(word: str) -> TrainingStatus:
    """Translate a job's status; an unrecognized one is UNKNOWN."""
    return _STATUS.get(word, TrainingStatus.UNKNOWN)


def to_wire(status: TrainingStatus) -> str | None:
    """Translate to a job's status; None for UNKNOWN.

    Every status has a word, but not one of its own: READY and INITIALIZING are `queued`, and
    STOPPING is `running`.
    """
    return _WORD.get(status)


def is_file_settled(word: str | None) -> bool:
    """Return whether a file's status is final, so that there is nothing to wait for.

    Azure processes files before a job may use them; a server that sends no status does not.
    """
    return word is None or word in FILE_PROCESSED or word in FILE_FAILED


def to_method(word: str | None) -> str:
    """Translate a method's type to our name; one that is not known is kept."""
    return METHODS.get(word or "supervised", word or "sft")


def to_method_type(method: str) -> str | None:
    """Translate our name of a method to the protocol's type; None if it has none."""
    return _METHOD_TYPES.get(method)
