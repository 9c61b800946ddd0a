"""The statuses of a training run and their transitions (standard library only)."""

from enum import StrEnum

__all__ = ["FINISHED", "ON_THE_WAY", "TrainingStatus", "may_follow", "statuses_of"]


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
        return self in FINISHED


FINISHED = frozenset(
    {TrainingStatus.COMPLETED, TrainingStatus.FAILED, TrainingStatus.CANCELLED},
)
"""The terminal statuses."""
ON_THE_WAY = (
    TrainingStatus.PENDING,
    TrainingStatus.VALIDATING,
    TrainingStatus.READY,
    TrainingStatus.INITIALIZING,
    TrainingStatus.RUNNING,
)
"""The statuses of a run up to its training, in order."""


def statuses_of(*words: str) -> frozenset[TrainingStatus]:
    """Return the statuses with these names; `finished` stands for all terminal ones.

    Raises:
        ValueError: There is no such status.
    """
    found: set[TrainingStatus] = set()
    for word in words:
        if word == "finished":
            found |= FINISHED
        elif word in list(TrainingStatus):
            found.add(TrainingStatus(word))
        else:
            known = ", ".join(("finished", *TrainingStatus))
            raise ValueError(f"{word!r} is not one of: {known}")
    return frozenset(found)


def may_follow(before: TrainingStatus, after: TrainingStatus) -> bool:
    """Return whether a run may change from status `before` to `after`.

    A run never leaves a terminal status. Any other transition is allowed, because polling skips
    statuses and some providers queue a run again after validation.
    """
    return after is before or not before.is_terminal
