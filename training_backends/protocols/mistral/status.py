"""The protocol's job statuses and job types, and what they are called in this package."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

from training_backends.core.status import TrainingStatus

__all__ = [
    "ACTIVE",
    "ENDED",
    "JOB_STATUSES",
    "METHODS",
    "UNSTARTED",
    "JobStatus",
    "JobType",
    "job_type_of",
    "to_status",
    "to_wire",
]

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
UNSTARTED: tuple[JobStatus, ...] = ("QUEUED", "VALIDATING", "VALIDATED")
"""Statuses of a job that has not been started; QUEUED follows VALIDATED once it is."""
ACTIVE: tuple[JobStatus, ...] = (*UNSTARTED, "STARTED", "RUNNING", "CANCELLATION_REQUESTED")
"""Statuses of a job that has not ended, in the order of its life."""
ENDED: tuple[JobStatus, ...] = ("SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED")
"""Statuses that never change again."""

JobType = Literal["completion", "classifier"]
METHODS: Mapping[str, Literal["sft", "classifier"]] = MappingProxyType(
    {"completion": "sft", "classifier": "classifier"}
)
"""`TrainingConfig.method` of each job type."""

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
    """Translate to a protocol status; None for UNKNOWN and PAUSED."""
    return _WORD.get(status)


def job_type_of(method: str) -> JobType:
    """Return the job type of a `TrainingConfig.method`."""
    return "classifier" if method == "classifier" else "completion"
