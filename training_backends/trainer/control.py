"""Stop requests: SIGTERM, SIGINT, or a `stop` file in the run directory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from training_backends.rundir.directory import RunDir

__all__ = ["STOP_SIGNALS", "StopRequest", "Stopped", "report_status"]


def report_status(run: "RunDir", status: str, message: str, **data: object) -> None:
    """Append a `status` event; `data` is stored with the status."""
    from training_backends.rundir.directory import Event  # noqa: PLC0415  # loads pydantic

    run.add_event(Event(name="status", message=message, data={"status": status, **data}))


STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stop was requested before this process's first step."""


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
    def requested(self) -> bool:
        """Whether to stop; also checks the file, so that it works across machines."""
        return self._signalled or self._file.exists()

    def clear(self) -> None:
        """Remove a request that was meant for an earlier process."""
        self._file.unlink(missing_ok=True)
