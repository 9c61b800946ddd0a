"""The statuses of a training run and their transitions (standard library only)."""

from enum import StrEnum

__all__ = ["TrainingStatus", "may_follow"]


class TrainingStatus(StrEnum):
    """The status of a training run, the same for every provider."""

    PENDING = "pending"
    VALIDATING = "validating"
    READY = "ready"
    """Validated, not started yet."""
    INITIALIZING = "initializing"
    RUNNING = "running"
    PAUSED = "paused"
    """Paused on request; it continues in place when it is unpaused."""
    STOPPING = "stopping"
    """A stop was requested and is not confirmed yet."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """The provider reported a status that is not known; see `raw_status`."""

    @property
    def is_terminal(self) -> bool:
        """Whether the run has finished."""
        return self in _TERMINAL


_TERMINAL = frozenset(
    {TrainingStatus.COMPLETED, TrainingStatus.FAILED, TrainingStatus.CANCELLED},
)


def may_follow(before: TrainingStatus, after: TrainingStatus) -> bool:
    """Return whether a run may change from status `before` to `after`.

    A run never leaves a terminal status. Any other transition is allowed, because polling skips
    statuses and some providers queue a run again after validation.
    """
    return after is before or not before.is_terminal
