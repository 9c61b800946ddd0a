"""Translation between the protocol's job statuses and `TrainingStatus`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from training_backends.core.status import TrainingStatus

__all__ = ["JOB_STATUSES", "JobStatus", "to_status", "to_wire"]

JobStatus = Literal[
    "QUEUED",
    "STARTED",
    "VALIDATING",
    "VALIDATED",
    "RUNNING",
    "FAILED_VALIDATION",
    "FAILED",
    "SUCCESS",
    "CANCELLED",
    "CANCELLATION_REQUESTED",
]
JOB_STATUSES: tuple[str, ...] = get_args(JobStatus)
"""All statuses of the specification."""

_STATUS: Mapping[str, TrainingStatus] = MappingProxyType(
    {
        "QUEUED": TrainingStatus.PENDING,
        "VALIDATING": TrainingStatus.VALIDATING,
        "VALIDATED": TrainingStatus.READY,
        "STARTED": TrainingStatus.INITIALIZING,
        "RUNNING": TrainingStatus.RUNNING,
        "CANCELLATION_REQUESTED": TrainingStatus.STOPPING,
        "SUCCESS": TrainingStatus.COMPLETED,
        "FAILED": TrainingStatus.FAILED,
        "FAILED_VALIDATION": TrainingStatus.FAILED,
        "CANCELLED": TrainingStatus.CANCELLED,
    }
)
_WORD: Mapping[TrainingStatus, str] = MappingProxyType(
    {status: word for word, status in _STATUS.items() if word != "FAILED_VALIDATION"}
    | {TrainingStatus.PAUSED: "RUNNING"}  # the protocol has no word for it
)


def to_status(word: str) -> TrainingStatus:
    """Translate a protocol status; an unrecognized one is UNKNOWN."""
    return _STATUS.get(word, TrainingStatus.UNKNOWN)


def to_wire(status: TrainingStatus) -> str | None:
    """Translate to a protocol status; None for UNKNOWN."""
    return _WORD.get(status)
