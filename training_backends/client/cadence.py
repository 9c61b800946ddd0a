"""How often to look at a run: often while it is young or about to end, else rarely."""

from datetime import datetime, timedelta
from typing import ClassVar, Final
from zlib import crc32

from pydantic import Field

from training_backends.core.estimate import Duration
from training_backends.core.run import TrainingRun
from training_backends.core.settings import SectionSettings

__all__ = ["WatchSettings", "due_at", "expected_end", "interval", "last_change"]

_TENTH: Final = 10
"""A change is noticed after a tenth of the time that it took to come, roughly."""
_JITTER: Final = 0.2
"""Looks of many watchers at many runs are spread by this share of the interval."""


class WatchSettings(SectionSettings):
    """Section `watch`: `TRAINING_BACKENDS_WATCH__STILL_AFTER` and so on, as `90` (seconds) or `2h`.

    Attributes:
        still_after: A run of which nothing has changed for so long is said to be still.
        lost_after: A run that its provider does not know any more for so long has failed.
        give_up_after: `wait` and a followed log end with an error once a provider could not
            be reached for so long.
    """

    section: ClassVar[str | None] = "watch"

    still_after: Duration = Field(default=timedelta(hours=6))
    lost_after: Duration = Field(default=timedelta(minutes=10))
    give_up_after: Duration = Field(default=timedelta(days=1))


def interval(run: TrainingRun, now: datetime, bounds: tuple[timedelta, timedelta]) -> timedelta:
    """Return the time between two looks at a run.

    Args:
        bounds: Of what is returned, before jitter.
    """
    shortest, longest = bounds
    wanted = max(now - last_change(run), timedelta(0)) / _TENTH
    end = expected_end(run)
    if end is not None:
        # Soon after the time it was to end, the end is as near as soon before.
        wanted = min(wanted, abs(end - now) / _TENTH)
    return min(max(wanted, shortest), longest)


def due_at(run: TrainingRun, now: datetime, bounds: tuple[timedelta, timedelta]) -> datetime:
    """Return when a run is to be looked at again; the same for everybody who asks.

    It follows from the record alone, so that several watchers agree without a word.
    """
    if run.last_seen_at is None:
        return now
    mark = f"{run.id} {run.last_seen_at.isoformat()}"
    spread = 1 + _JITTER * (2 * crc32(mark.encode()) / 0xFFFFFFFF - 1)
    return run.last_seen_at + interval(run, run.last_seen_at, bounds) * spread


def last_change(run: TrainingRun) -> datetime:
    """Return when anything of a run was last known to change."""
    moments = [run.created_at, run.started_at, run.finished_at, run.changed_at]
    moments += [point.at for point in run.checkpoints]
    return max(moment for moment in moments if moment is not None)


def expected_end(run: TrainingRun) -> datetime | None:
    """Return when a run that trains will be over at its present pace, or None."""
    if run.started_at is None:
        return None
    if run.step and run.total_steps and run.step < run.total_steps:
        reached = last_change(run)
        return run.started_at + (reached - run.started_at) * (run.total_steps / run.step)
    if run.estimate is not None and run.estimate.duration is not None:
        return run.started_at + run.estimate.duration
    return None
