"""Requests to stop: SIGTERM, SIGINT, or a `stop` file in the run directory."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from training_backends.rundir.directory import RunDir

__all__ = ["STOP_SIGNALS", "StopRequest"]

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to save a checkpoint and end."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
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
            return self._run.stop.read_text(encoding="ascii") != "discard"
        except FileNotFoundError:
            return True  # a signal says nothing else

    @property
    def requested(self) -> bool:
        """Whether to stop; looks at the file too, so it also works from other machines."""
        return self._signalled or self._run.stop.exists()
