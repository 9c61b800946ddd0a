"""Report a run to its trackers, in a process that outlives the training process.

It reads the run directory, as any observer does, and keeps how far each tracker got in
`.tracking-N.json`. Nothing that a tracker does can therefore harm the run.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, SecretStr

from training_backends.core.backoff import Backoff
from training_backends.core.errors import first_line
from training_backends.core.files import hold_lock, write_atomic
from training_backends.core.integrations import Integration
from training_backends.core.logging import register_secret
from training_backends.core.redaction import redact
from training_backends.core.run import LogRecord, to_source
from training_backends.rundir.directory import Event, RunDir, RunSpec
from training_backends.trackers.tracker import Measurement, TrackedRun, Tracker, make_tracker
from training_backends.trainer.environment import environment_without_secrets, tracker_keys

__all__ = ["start_tracking", "track"]

_POLL: Final = 1.0
"""Seconds between two looks at the run directory."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts while a tracker fails."""
_PATIENCE: Final = 600.0
"""Seconds after the end of the run for which a failing tracker is tried again."""
_HANDOVER: Final = 60.0
"""Seconds that the process of a restarted run waits for its predecessor to end."""
_BATCH: Final = 1000
_NOT_PARAMETERS: Final = {
    "chat_template_text", "classifier_targets", "integrations", "run_id", "slots", "slots_dir",
    "train", "validation", "version",
}  # fmt: skip
_ENDINGS: Final[Mapping[str, Literal["completed", "failed", "cancelled"]]] = {
    "completed": "completed",
    "failed": "failed",
    "stopped": "cancelled",
}


def start_tracking(run: RunDir) -> None:
    """Start the process that reports a run; it ends by itself after the run."""
    with run.trackers.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603  # our own program and directory
            [sys.executable, "-P", "-m", "training_backends.trainer", "track", str(run.path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=run.path,
            env=environment_without_secrets(),
            start_new_session=True,
        )
    # Not in its environment, which other processes of the user can read.
    if process.stdin is not None:
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(tracker_keys()).encode())
    threading.Thread(target=process.wait, name="tracking", daemon=True).start()


def track(path: Path) -> int:
    """Report a run until it has ended and everything is reported; return the exit code.

    Reads the secrets of the integrations, a JSON object by their numbers, from standard input.
    """
    keys = {
        int(number): key for number, key in json.loads(sys.stdin.buffer.read() or b"{}").items()
    }
    for key in keys.values():
        register_secret(key)
    run = RunDir(path)
    spec = run.read_spec()
    try:
        with hold_lock(path / ".tracking.lock", patience=_HANDOVER):
            threads = [
                threading.Thread(target=_Follower(run, spec, number, keys.get(number)).follow)
                for number in range(len(spec.integrations))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    except BlockingIOError:
        print("another process already reports this run", file=sys.stderr)  # noqa: T201
    return 0


class _TrackingPosition(BaseModel):
    """How far a tracker got.

    Attributes:
        events: Bytes of events.jsonl.
        metrics: Bytes of metrics.jsonl.
        finished: Whether the end was reported.
    """

    events: int = 0
    metrics: int = 0
    finished: bool = False


class _Follower:
    """Reports one run to one tracker."""

    def __init__(self, run: RunDir, spec: RunSpec, number: int, key: str | None) -> None:
        self._run = run
        self._entry: Integration = spec.integrations[number]
        self._key = SecretStr(key) if key else None
        self._tracked = TrackedRun(spec.run_id, run.path, dict(_parameters(spec)))
        self._file = run.path / f".tracking-{number}.json"
        self._position = self._read_position()
        self._tracker: Tracker | None = None

    def follow(self) -> None:
        """Report until the run has ended, or its directory was deleted."""
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        deadline, failing = None, False
        while self._run.path.is_dir() and not self._position.finished:
            # Before reading: what is written until then is reported.
            ended = not self._run.is_active()
            deadline = (deadline or time.monotonic() + _PATIENCE) if ended else None
            try:
                self._report()
                if ended:
                    self._finish()
                    break
                failing = False
                backoff.reset()
                time.sleep(_POLL)
            except Exception as error:  # whatever a tracker raises; the run is not affected
                self._forget_tracker()
                if not failing:
                    self._warn(error)
                failing = True
                if deadline is not None and time.monotonic() > deadline:
                    break
                time.sleep(backoff.next())
        self._forget_tracker()

    def _report(self) -> None:
        tracker = self._opened()
        for batch in _batches(self._run.read_metrics(self._position.metrics)):
            tracker.measured([Measurement(row.step, row.at, row.measures()) for row, _ in batch])
            self._move(metrics=batch[-1][1])
        for event, end in self._run.read_events(self._position.events):
            if event.name in {"status", "checkpoint", "message", "sample"}:
                tracker.happened(_record(event))
            self._move(events=end)

    def _opened(self) -> Tracker:
        if self._tracker is None:
            tracker = make_tracker(self._entry, self._tracked, self._key)
            try:
                tracker.start()
            except BaseException:
                tracker.close()
                raise
            self._tracker = tracker
        return self._tracker

    def _finish(self) -> None:
        """Report how the run ended; a run that was suspended or has crashed may continue."""
        record = self._run.read_exit()
        if record is None:
            return
        message = record.failure.message if record.failure else ""
        self._opened().finish(_ENDINGS[record.status], message)
        self._move(finished=True)

    def _forget_tracker(self) -> None:
        if self._tracker is not None:
            with suppress(Exception):
                self._tracker.close()
            self._tracker = None

    def _warn(self, error: Exception) -> None:
        reason = redact(f"{type(error).__name__}: {first_line(error)}")
        print(f"{self._entry.type}: {reason}", file=sys.stderr, flush=True)  # noqa: T201
        message = f"Cannot report to {self._entry.type}: {reason}"
        # After the end, nothing may be added to a complete log.
        if self._run.is_active():
            with suppress(OSError):
                self._run.add_event(Event(name="message", level="warning", message=message))

    def _move(self, **change: Any) -> None:
        self._position = self._position.model_copy(update=change)
        write_atomic(self._file, self._position.model_dump_json())

    def _read_position(self) -> _TrackingPosition:
        try:
            found = _TrackingPosition.model_validate_json(self._file.read_bytes())
        except (OSError, ValueError):
            return _TrackingPosition()
        # A run that is trained again after it was stopped has another end.
        return found.model_copy(update={"finished": False})


def _record(event: Event) -> LogRecord:
    return LogRecord(
        at=event.at,
        level=event.level,
        message=event.message,
        source=to_source({"status": "status", "checkpoint": "checkpoint"}.get(event.name, "event")),
        step=event.step,
        fields=event.data,
        cursor="",
    )


def _batches(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    left = iter(rows)
    while batch := list(islice(left, _BATCH)):
        yield batch


def _parameters(spec: RunSpec) -> Iterator[tuple[str, str | int | float | bool]]:
    """Yield what determines the result, with every default resolved."""
    values = spec.model_dump(mode="json", exclude_none=True, exclude=_NOT_PARAMETERS)
    for name, value in values.items():
        for key, each in value.items() if isinstance(value, dict) else [(None, value)]:
            if isinstance(each, str | int | float | bool):
                yield (f"{name}.{key}" if key else name), each
    for name in ("train", "validation"):
        for number, source in enumerate(getattr(spec, name)):
            yield f"data.{name}.{number}", os.fspath(source.path or source.uri or "")
