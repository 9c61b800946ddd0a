"""Requests to stop: SIGTERM, SIGINT, or a `stop` file in the run directory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from training_backends.rundir.directory import Event, RunDir

__all__ = ["STOP_SIGNALS", "StopRequest", "Stopped", "say_status"]


def say_status(run: RunDir, status: str, message: str, **data: object) -> None:
    """Append a `status` event; `data` goes beside the status."""
    run.add_event(Event(name="status", message=message, data={"status": status, **data}))


STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A stop was asked for before the first step of this process."""


class StopRequest:
    """Whether this process was asked to save a checkpoint and end.

    Args:
        file: The run directory's `stop`.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests for the block; main thread only."""
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
        """Whether what was learnt so far is to be kept."""
        try:
            return self._file.read_text(encoding="ascii") != "discard"
        except FileNotFoundError:
            return True  # a signal says nothing else

    @property
    def requested(self) -> bool:
        """Whether to stop; looks at the file too, so it also works from other machines."""
        return self._signalled or self._file.exists()

    def clear(self) -> None:
        """Remove a request that was made of an earlier process."""
        self._file.unlink(missing_ok=True)
