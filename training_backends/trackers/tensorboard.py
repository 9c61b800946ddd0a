"""Event files for TensorBoard, written without torch or TensorFlow."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from training_backends.trackers.tracker import Measurement, Tracker

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker(Tracker):
    """Writes one event file for each process; a restarted run replaces its later steps."""

    requires: ClassVar[Sequence[str]] = ("tensorboard",)
    install: ClassVar[str] = "pip install 'training-backends[tensorboard]'"
    _writer: Any = None

    def start(self) -> None:
        """Open an event file."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        given = self.integration.directory
        directory = given / self.run.id if given else self.run.directory / "tensorboard"
        self._writer = EventFileWriter(str(directory))

    def measured(self, measurements: Sequence[Measurement]) -> None:
        """Add scalars with the steps' own times, and write them to the disk."""
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415

        for each in measurements:
            values = [Summary.Value(tag=name, simple_value=it) for name, it in each.values.items()]
            event = Event(
                wall_time=each.at.timestamp(), step=each.step, summary=Summary(value=values)
            )
            self._writer.add_event(event)
        self._writer.flush()

    def finish(self, status: Literal["completed", "failed", "cancelled"], message: str) -> None:
        """Nothing to report: an event file has no status."""
        del status, message
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
