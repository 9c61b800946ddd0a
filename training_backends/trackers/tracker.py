"""What a tracker is, and how it is found."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

from pydantic import SecretStr

from training_backends.core.errors import ConfigError, suggest
from training_backends.core.integrations import Integration
from training_backends.core.plugins import entries_of
from training_backends.core.run import LogRecord

__all__ = ["Measurement", "TrackedRun", "Tracker", "make_tracker", "tracker_class", "tracker_names"]

_GROUP: Final = "training_backends.trackers"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker knows of its run.

    Attributes:
        directory: Where a tracker may keep files; it is deleted with the run.
        parameters: Model, method, hyperparameters and options in effect, by dotted name.
    """

    id: str
    directory: Path
    parameters: Mapping[str, str | int | float | bool] = field(
        default_factory=lambda: MappingProxyType({})
    )


@dataclass(frozen=True, slots=True)
class Measurement:
    """The metrics of one step."""

    step: int
    at: datetime
    values: Mapping[str, float]


class Tracker(ABC):
    """Reports one run to one system; created in a process of its own, once for each attempt.

    Every method may raise: the call is repeated with growing pauses, after the tracker has been
    closed and made again. What was reported before may therefore be reported twice, and the run is
    never affected. Must not need anything that is not in the run's directory.

    Args:
        integration: The entry of `TrainingConfig.integrations`.
        run: The run.
        key: The secret that the entry's `credential` names, or None.
    """

    requires: ClassVar[Sequence[str]] = ()
    """Modules that must be installed where the run trains."""
    install: ClassVar[str] = ""
    """The command that installs them."""

    def __init__(
        self, integration: Integration, run: TrackedRun, key: SecretStr | None = None
    ) -> None:
        self.integration: Any = integration
        self.run = run
        self.key = key

    @abstractmethod
    def start(self) -> None:
        """Open the run in the system, or find it there if it was opened before."""

    @abstractmethod
    def measured(self, measurements: Sequence[Measurement]) -> None:
        """Report metrics, in order of steps."""

    def happened(self, record: LogRecord) -> None:
        """Report a change of status, a checkpoint or a message; does nothing by default."""
        del record

    @abstractmethod
    def finish(self, status: Literal["completed", "failed", "cancelled"], message: str) -> None:
        """Close the run in the system.

        Args:
            message: Why the run failed; empty otherwise.
        """

    def close(self) -> None:
        """Release what the tracker holds, without closing the run; must not raise."""
        return


def tracker_names() -> Sequence[str]:
    """Return the types of integrations for which a tracker is installed."""
    return sorted(entry.name for entry in entries_of(_GROUP))


def tracker_class(kind: str) -> type[Tracker]:
    """Return the tracker of an integration's type.

    Raises:
        ConfigError: No installed package has it.
    """
    for entry in entries_of(_GROUP):
        if entry.name == kind:
            loaded: type[Tracker] = entry.load()
            return loaded
    names = tracker_names()
    hint = f"Installed: {', '.join(names)}."
    raise ConfigError(f"There is no tracker {kind!r}.", hint=suggest(kind, names, hint))


def make_tracker(integration: Integration, run: TrackedRun, key: SecretStr | None) -> Tracker:
    """Return a tracker for one entry of `TrainingConfig.integrations`."""
    return tracker_class(integration.type)(integration, run, key)
