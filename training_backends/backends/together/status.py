"""Statuses of Together's jobs and files, as data. Source: together 3.1.1 (PyPI), 2026-11."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from training_backends.core.status import TrainingStatus

__all__ = ["FILE_FAILED", "FILE_READY", "to_status"]

_STATUSES: Final[Mapping[str, TrainingStatus]] = MappingProxyType(
    {
        "pending": TrainingStatus.PENDING,
        "queued": TrainingStatus.PENDING,
        "running": TrainingStatus.RUNNING,
        # Training is finished, and the result is being stored.
        "compressing": TrainingStatus.RUNNING,
        "uploading": TrainingStatus.RUNNING,
        "cancel_requested": TrainingStatus.STOPPING,
        "cancelled": TrainingStatus.CANCELLED,
        "error": TrainingStatus.FAILED,
        "user_error": TrainingStatus.FAILED,
        "completed": TrainingStatus.COMPLETED,
    }
)

FILE_READY: Final = "COMPLETED"
FILE_FAILED: Final = frozenset({"FAILED", "INVALID_FORMAT"})


def to_status(word: str) -> TrainingStatus:
    """Translate a job status; an unknown one is UNKNOWN."""
    return _STATUSES.get(word.lower(), TrainingStatus.UNKNOWN)
