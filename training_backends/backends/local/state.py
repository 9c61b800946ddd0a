"""What a run directory says of its run."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from training_backends.backends.local.process import took_lock
from training_backends.core.run import Checkpoint, Failure, RunState
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, ExitRecord, MetricsRow, RunDir

__all__ = ["ENGINE_STATUS", "LOST", "Ending", "has_begun", "read_ending", "read_state"]

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
    """How a run ended, and when if it could still say so."""

    failure: Failure | None
    at: datetime | None


def read_ending(run: RunDir) -> Ending | None:
    """Say how a run ended, or None while it goes on; cheap, for it reads no metrics."""
    status, _, record = _status(run, _events(run))
    if not status.is_terminal:
        return None
    return Ending(_failure(status, record), record.at if record else None)


def read_state(run: RunDir) -> RunState:
    """Read where a run stands; blocks for as long as the files take."""
    events = _events(run)
    rows = [row for row, _ in run.read_metrics()]
    status, raw, record = _status(run, events)
    return RunState(
        status=status,
        raw_status=raw,
        remote_id=run.path.name,
        failure=_failure(status, record),
        started_at=next((e.at for e in events if _word(e) == "running"), None),
        finished_at=record.at if record else None,
        step=rows[-1].step if rows else None,
        total_steps=rows[-1].total_steps if rows else _announced_steps(events),
        metrics=_latest(rows) or None,
        checkpoints=_checkpoints(run, events) or None,
        result_model=str(run.path / record.result.path) if record and record.result else None,
    )


def _events(run: RunDir) -> list[Event]:
    return [event for event, _ in run.read_events()]


def _failure(status: TrainingStatus, record: ExitRecord | None) -> Failure | None:
    if record and record.failure:
        return record.failure
    return LOST if status is TrainingStatus.FAILED else None


def _status(run: RunDir, events: list[Event]) -> tuple[TrainingStatus, str, ExitRecord | None]:
    if record := run.read_exit():
        return ENGINE_STATUS[record.status], record.status, record
    if run.is_active():
        return *_living(run, events), None
    # It may have ended between the two looks.
    if record := run.read_exit():
        return ENGINE_STATUS[record.status], record.status, record
    if _may_still_start(run):
        status = TrainingStatus.STOPPING if run.stop.exists() else TrainingStatus.PENDING
        return status, "starting", None
    if run.stop.exists():
        # Asked to end before it could listen, so it had nothing to save either.
        return TrainingStatus.CANCELLED, "stopped", None
    return TrainingStatus.FAILED, "lost", None


def _living(run: RunDir, events: list[Event]) -> tuple[TrainingStatus, str]:
    if run.stop.exists():
        return TrainingStatus.STOPPING, "stopping"
    word = next((word for e in reversed(events) if (word := _word(e))), "starting")
    status = ENGINE_STATUS.get(word, TrainingStatus.PENDING)
    # It tells its end before it writes how it ended: over is what exit.json says is over.
    return (TrainingStatus.RUNNING if status.is_terminal else status), word


def _may_still_start(run: RunDir) -> bool:
    """Tell whether the process was started so recently that it may not hold its lock yet."""
    return not took_lock(run) and time.time() - run.spec.stat().st_mtime < START_PATIENCE


def _word(event: Event) -> str | None:
    return str(event.data.get("status")) if event.name == "status" else None


def _announced_steps(events: list[Event]) -> int | None:
    steps = [e.data.get("total_steps") for e in events if _word(e) == "running"]
    return steps[-1] if steps and isinstance(steps[-1], int) else None


def _latest(rows: list[MetricsRow]) -> dict[str, float]:
    """Return the latest value of each metric; validation is not measured at every step."""
    latest: dict[str, float] = {}
    for row in rows:
        latest.update(metrics_of(row))
    return latest


def metrics_of(row: MetricsRow) -> dict[str, float]:
    """Return a row's measured values by name."""
    values = row.model_dump(exclude={"at", "step", "total_steps"}, exclude_none=True)
    return {name: float(value) for name, value in values.items()}


def _checkpoints(run: RunDir, events: list[Event]) -> tuple[Checkpoint, ...]:
    found: dict[int, Checkpoint] = {}
    for event in events:
        if event.name == "checkpoint" and event.step is not None:
            path = run.path / str(event.data.get("path"))
            found[event.step] = Checkpoint(
                step=event.step,
                at=event.at,
                metrics=event.data.get("metrics") or {},
                path=_existing(path),
            )
    return tuple(found[step] for step in sorted(found))


def _existing(path: Path) -> Path | None:
    return path if path.is_dir() else None
