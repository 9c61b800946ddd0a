"""The states of a training run and what may follow what (standard library only)."""

from enum import StrEnum

__all__ = ["TrainingStatus", "may_follow"]


class TrainingStatus(StrEnum):
    """Where a training run stands, in words that hold for every provider."""

    PENDING = "pending"
    VALIDATING = "validating"
    READY = "ready"
    """Validated; waits to be started."""
    INITIALIZING = "initializing"
    RUNNING = "running"
    STOPPING = "stopping"
    """A stop was asked for; the provider has not confirmed it yet."""
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"
    """The provider said a word that we have never heard; see `raw_status`."""

    @property
    def is_terminal(self) -> bool:
        """Whether the run is over for good."""
        return self in _TERMINAL


_TERMINAL = frozenset(
    {TrainingStatus.COMPLETED, TrainingStatus.FAILED, TrainingStatus.CANCELLED},
)


def may_follow(before: TrainingStatus, after: TrainingStatus) -> bool:
    """Tell whether a run that was `before` may lawfully be `after`.

    A run never leaves a terminal status. Everything else is lawful, because a poll
    sees only some of the states a run went through and some providers queue a run
    again after it was validated.
    """
    return after is before or not before.is_terminal
