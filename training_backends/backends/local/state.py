"""What a run directory says of its run."""

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
    "ENGINE_STATUS",
    "LOST",
    "Ending",
    "Look",
    "has_begun",
    "is_orphaned",
    "read_ending",
    "read_state",
]

_SETTLED: Final = timedelta(seconds=0.2)
"""Rows younger than this wait: one with an earlier time may just be being written to the
other file, and the log must be the same however it is read."""
_FOREVER: Final = datetime.max.replace(tzinfo=UTC)
_REVIVE_PAUSE: Final = 5.0
"""Seconds after a start before another is tried, should processes keep dying in the queue."""
START_PATIENCE: Final = 60.0
"""Seconds in which a process must take its lock; more means that it died before that."""

ENGINE_STATUS: Final[Mapping[str, TrainingStatus]] = MappingProxyType(
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
        "The training process ended without a word: killed, out of memory or of disk space, "
        "or the machine was restarted. log.txt in the run's directory has its last output."
    ),
    retryable=True,
)


def has_begun(run: RunDir) -> bool:
    """Tell whether a process lives here, or has ended here."""
    return run.is_active() or run.exit.is_file()


class Ending(NamedTuple):
    """How a run ended; `record` is what it could still say of it."""

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
        """When it ended, if it could still say so."""
        return self.record.at if self.record else None


class Look(NamedTuple):
    """One look at a run, so that its state and its log tell of the same moment.

    What is written after `ending` was read belongs to the next look: none is missed.

    Attributes:
        until: Rows up to then are told.
    """

    ending: Ending | None
    until: datetime

    @classmethod
    def at(cls, run: RunDir) -> Self:
        """Begin a look."""
        ending = read_ending(run)
        return cls(ending, _FOREVER if ending else utc_now() - _SETTLED)


def read_ending(run: RunDir) -> Ending | None:
    """Say how a run ended, or None while it goes on; cheap, for it reads no rows."""
    record = run.read_exit()
    if record is None and (run.is_active() or _may_still_start(run)):
        return None
    # It may have begun or ended between these looks; once its lock is free, it has ended.
    if record is None and run.is_active():
        return None
    if record := record or run.read_exit():
        return Ending(ENGINE_STATUS[record.status], record.status, record)
    if run.stop.exists():
        # Asked to end before it could listen, so it had nothing to save either.
        return Ending(TrainingStatus.CANCELLED, "stopped")
    if _last_word(run) == "queued":
        return None  # nothing is lost: a new process takes its place in the queue, see `revive`
    return Ending(TrainingStatus.FAILED, "lost")


def is_orphaned(run: RunDir) -> bool:
    """Tell whether a run waits in the queue without a process that does the waiting."""
    try:
        if has_begun(run) or run.stop.exists() or _may_still_start(run):
            return False
        settled = time.time() - run.spec.stat().st_mtime > _REVIVE_PAUSE
    except FileNotFoundError:
        return False
    return settled and _last_word(run) == "queued"


def read_state(run: RunDir, look: Look | None = None) -> RunState:
    """Read where a run stands; blocks for as long as the files take.

    Reads the end of the metrics and all events, of which there are few: what grows with a
    run's length among them is its checkpoints, and each is told of.
    """
    ending, until = look or Look.at(run)
    events = [event for event, _ in run.read_events()]
    rows = run.read_newest_metrics()
    checkpoints = _checkpoints(run, events)
    status, raw = ending[:2] if ending else _going(run, events)
    record = ending.record if ending else None
    times = [event.at for event in events] + [row.at for row in rows]
    times += [record.at] if record else []
    return RunState(
        status=status,
        raw_status=raw,
        remote_id=run.path.name,
        failure=ending.failure if ending else None,
        started_at=next((e.at for e in events if _word(e) == "running"), None),
        finished_at=record.at if record else None,
        step=rows[-1].step if rows else None,
        total_steps=rows[-1].total_steps if rows else _announced_steps(events),
        metrics=_latest(checkpoints, rows) or None,
        checkpoints=checkpoints or None,
        result_model=str(run.path / record.result.path) if record and record.result else None,
        changed_at=max((at for at in times if at <= until), default=None),
    )


def _going(run: RunDir, events: list[Event]) -> tuple[TrainingStatus, str]:
    if run.stop.exists():
        return TrainingStatus.STOPPING, "stopping"
    words = (word for event in reversed(events) if (word := _word(event)))
    # Before it has its lock, the events are those of an earlier process, if there are any.
    word = next(words, "starting") if took_lock(run) else "starting"
    status = ENGINE_STATUS.get(word, TrainingStatus.PENDING)
    if word == "queued":
        return status, _queued(events)
    # It tells its end before it writes how it ended: over is what exit.json says is over.
    return (TrainingStatus.RUNNING if status.is_terminal else status), word


def _queued(events: list[Event]) -> str:
    said = next(event for event in reversed(events) if _word(event))
    position = said.data.get("position")
    return f"queued, position {position}" if position else "queued"


def _last_word(run: RunDir) -> str | None:
    words = (word for event, _ in reversed(run.read_events()) if (word := _word(event)))
    return next(words, None)


def _may_still_start(run: RunDir) -> bool:
    """Tell whether the process was started so recently that it may not hold its lock yet."""
    return not took_lock(run) and time.time() - run.spec.stat().st_mtime < START_PATIENCE


def _word(event: Event) -> str | None:
    return str(event.data.get("status")) if event.name == "status" else None


def _announced_steps(events: list[Event]) -> int | None:
    steps = [e.data.get("total_steps") for e in events if _word(e) == "running"]
    return steps[-1] if steps and isinstance(steps[-1], int) else None


def _latest(checkpoints: tuple[Checkpoint, ...], rows: list[MetricsRow]) -> dict[str, float]:
    """Return the latest value of each metric.

    Validation is measured at checkpoints only, so the last rows may not have it.
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
