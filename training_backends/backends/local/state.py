"""Read the state of a run from its run directory."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final, NamedTuple, Self

from training_backends.backends.local.process import took_lock
from training_backends.core.run import Checkpoint, Failure, RunState, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, ExitRecord, MetricsRow, RunDir

__all__ = [
    "LOST",
    "TRAINER_STATUS",
    "Ending",
    "Snapshot",
    "has_begun",
    "is_orphaned",
    "read_ending",
    "read_state",
]

_SETTLED: Final = timedelta(seconds=0.2)
"""Newer records are held back: one with an earlier time may still be written to the other file,
and the order of the log must not depend on when it is read.
"""
_FOREVER: Final = datetime.max.replace(tzinfo=UTC)
_REVIVE_PAUSE: Final = 5.0
"""Minimum seconds between two restarts of a process that keeps dying in the queue."""
START_PATIENCE: Final = 60.0
"""Seconds within which a process must take its lock; after that it is considered dead."""

TRAINER_STATUS: Final[Mapping[str, TrainingStatus]] = MappingProxyType(
    {
        "queued": TrainingStatus.PENDING,
        "initializing": TrainingStatus.INITIALIZING,
        "running": TrainingStatus.RUNNING,
        "completed": TrainingStatus.COMPLETED,
        "stopped": TrainingStatus.CANCELLED,
        "failed": TrainingStatus.FAILED,
    }
)

LOST: Final = Failure(
    kind="lost",
    message=(
        "The training process exited unexpectedly: it was killed, ran out of memory or disk "
        "space, or the machine was restarted. See log.txt in the run directory for its last output."
    ),
    retryable=True,
)


def has_begun(run: RunDir) -> bool:
    """Return whether a process is running here, or has finished here."""
    return run.is_active() or run.exit.is_file()


class Ending(NamedTuple):
    """How a run ended; `record` is None if the process could not write one."""

    status: TrainingStatus
    raw: str
    record: ExitRecord | None = None

    @property
    def failure(self) -> Failure | None:
        """Why it failed, if it did."""
        if self.record and self.record.failure:
            return self.record.failure
        return LOST if self.status is TrainingStatus.FAILED else None

    @property
    def at(self) -> datetime | None:
        """When it ended, if recorded."""
        return self.record.at if self.record else None


class Snapshot(NamedTuple):
    """A point in time at which a run is read, so that its state and its log agree.

    Anything written after `ending` was read belongs to the next read, so nothing is missed.

    Attributes:
        until: Records up to this time are included.
    """

    ending: Ending | None
    until: datetime

    @classmethod
    def at(cls, run: RunDir) -> Self:
        """Start a read."""
        ending = read_ending(run)
        return cls(ending, _FOREVER if ending else utc_now() - _SETTLED)


def read_ending(run: RunDir) -> Ending | None:
    """Return how a run ended, or None if it has not; cheap, as it reads no metrics."""
    record = run.read_exit()
    if record is None and (run.is_active() or _may_still_start(run)):
        return None
    # It may have started or ended between these reads; once its lock is free, it has ended.
    if record is None and run.is_active():
        return None
    if record := record or run.read_exit():
        return Ending(TRAINER_STATUS[record.status], record.status, record)
    if run.is_stopping():
        # Stopped before it handled signals, so there was nothing to save.
        return Ending(TrainingStatus.CANCELLED, "stopped")
    if _waits_for_process(run):
        return None  # not lost: a new process takes over, see `revive`
    return Ending(TrainingStatus.FAILED, "lost")


def is_orphaned(run: RunDir) -> bool:
    """Return whether a run is queued or suspended, but has no process."""
    try:
        if has_begun(run) or run.is_stopping() or _may_still_start(run):
            return False
        settled = time.time() - run.spec.stat().st_mtime > _REVIVE_PAUSE
    except FileNotFoundError:
        return False
    return settled and _waits_for_process(run)


def _waits_for_process(run: RunDir) -> bool:
    # One killed before it had saved what it was suspended for continues from its last checkpoint.
    return run.is_suspended() or _last_status(run) == "queued"


def read_state(run: RunDir, snapshot: Snapshot | None = None) -> RunState:
    """Read the state of a run; blocks while reading its files.

    Reads all events, which are few (checkpoints are the only ones that grow with a run's length),
    and the end of the metrics.
    """
    ending, until = snapshot or Snapshot.at(run)
    events = [event for event, _ in run.read_events()]
    rows = run.read_newest_metrics()
    checkpoints = _checkpoints(run, events)
    status, raw = ending[:2] if ending else _live_status(run, events)
    record = ending.record if ending else None
    times = [event.at for event in events] + [row.at for row in rows]
    times += [record.at] if record else []
    return RunState(
        status=status,
        raw_status=raw,
        remote_id=run.path.name,
        failure=ending.failure if ending else None,
        started_at=next((e.at for e in events if _status_of(e) == "running"), None),
        finished_at=record.at if record else None,
        step=rows[-1].step if rows else None,
        total_steps=rows[-1].total_steps if rows else _announced_steps(events),
        metrics=_latest(checkpoints, rows) or None,
        checkpoints=checkpoints or None,
        result_model=str(run.path / record.result.path) if record and record.result else None,
        changed_at=max((at for at in times if at <= until), default=None),
    )


def _live_status(run: RunDir, events: list[Event]) -> tuple[TrainingStatus, str]:
    if run.is_stopping():
        return TrainingStatus.STOPPING, "stopping"
    if run.is_suspended() and not run.is_active():
        return TrainingStatus.PENDING, "queued"
    words = (word for event in reversed(events) if (word := _status_of(event)))
    # Until it holds the lock, any events are from an earlier process.
    word = next(words, "starting") if took_lock(run) else "starting"
    status = TRAINER_STATUS.get(word, TrainingStatus.PENDING)
    if word == "queued":
        return status, _queued(events)
    # The final event is written before exit.json, but only exit.json marks the run as finished.
    return (TrainingStatus.RUNNING if status.is_terminal else status), word


def _queued(events: list[Event]) -> str:
    latest = next(event for event in reversed(events) if _status_of(event))
    position = latest.data.get("position")
    return f"queued, position {position}" if position else "queued"


def _last_status(run: RunDir) -> str | None:
    words = (word for event, _ in reversed(run.read_events()) if (word := _status_of(event)))
    return next(words, None)


def _may_still_start(run: RunDir) -> bool:
    """Return whether the process was started too recently to hold its lock yet."""
    return not took_lock(run) and time.time() - run.spec.stat().st_mtime < START_PATIENCE


def _status_of(event: Event) -> str | None:
    return str(event.data.get("status")) if event.name == "status" else None


def _announced_steps(events: list[Event]) -> int | None:
    steps = [e.data.get("total_steps") for e in events if _status_of(e) == "running"]
    return steps[-1] if steps and isinstance(steps[-1], int) else None


def _latest(checkpoints: tuple[Checkpoint, ...], rows: list[MetricsRow]) -> dict[str, float]:
    """Return the latest value of each metric.

    Validation is measured at checkpoints only, so the last rows may not include it.
    """
    latest: dict[str, float] = {}
    for checkpoint in checkpoints:
        latest.update(checkpoint.metrics)
    for row in rows:
        latest.update(row.measures())
    return latest


def _checkpoints(run: RunDir, events: list[Event]) -> tuple[Checkpoint, ...]:
    kept = {str(path.relative_to(run.path)): path for path in run.checkpoints.glob("step-*")}
    found: dict[int, Checkpoint] = {}
    for event in events:
        if event.name == "checkpoint" and event.step is not None:
            found[event.step] = Checkpoint(
                step=event.step,
                at=event.at,
                metrics=event.data.get("metrics") or {},
                path=kept.get(str(event.data.get("path"))),
            )
    return tuple(found[step] for step in sorted(found))
