"""Stop requests: SIGTERM, SIGINT, or a `stop` file in the run directory."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from training_backends.rundir.directory import RunDir

__all__ = ["STOP_SIGNALS", "EarlyStopping", "StopRequest", "Stopped", "report_status"]


def report_status(run: "RunDir", status: str, message: str, **data: object) -> None:
    """Append a `status` event; `data` is stored with the status."""
    from training_backends.rundir.directory import Event  # noqa: PLC0415  # loads pydantic

    run.add_event(Event(name="status", message=message, data={"status": status, **data}))


STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stop was requested before this process's first step."""


class EarlyStopping:
    """Counts validations since the lowest validation loss; part of each checkpoint.

    Args:
        patience: Validations without a lower loss after which training stops; None: never.
    """

    def __init__(self, patience: int | None, state: Mapping[str, Any] | None = None) -> None:
        self._patience = patience
        self.state: dict[str, Any] = dict(state or {"loss": None, "step": 0, "since": 0})

    def add(self, step: int, loss: float) -> None:
        """Add the validation loss at a step."""
        best = self.state["loss"]
        if best is None or loss < best:
            self.state = {"loss": loss, "step": step, "since": 0}
        else:
            self.state["since"] += 1

    @property
    def is_due(self) -> bool:
        """Whether to stop."""
        return self._patience is not None and self.state["since"] >= self._patience


class StopRequest:
    """Whether this process was asked to save a checkpoint and exit.

    Args:
        file: The run directory's `stop`.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT as stop requests for the block; main thread only."""
        before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signalled = True

    @property
    def saves_checkpoint(self) -> bool:
        """Whether to save a checkpoint before exiting."""
        try:
            return self._file.read_text(encoding="ascii") != "discard"
        except FileNotFoundError:
            return True  # the default for a signal

    @property
    def suspends(self) -> bool:
        """Whether the run continues later, in a new process."""
        try:
            return self._file.read_text(encoding="ascii") == "suspend"
        except FileNotFoundError:
            return False

    @property
    def requested(self) -> bool:
        """Whether to stop; also checks the file, so that it works across machines."""
        return self._signalled or self._file.exists()

    def clear(self) -> None:
        """Remove a request that was meant for an earlier process."""
        self._file.unlink(missing_ok=True)
