"""Read the state and the output of a command from its directory; see `supervisor` for the files."""

from collections.abc import Generator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from signal import Signals
from typing import Final, Literal

from pydantic import BaseModel, ValidationError

from training_backends.core.files import hold_lock, read_lines, write_atomic
from training_backends.core.run import Failure, LogRecord, RunState, UtcDatetime, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import RunDir

__all__ = ["CommandDir", "CommandSpec", "Exit"]

_SETTLED: Final = timedelta(seconds=0.02)
"""Resolution of file times: two writes within this time may leave the same one."""
_TAIL_BYTES: Final = 2000
_TAIL_LINES: Final = 5


class CommandSpec(BaseModel, frozen=True):
    """What to run.

    Attributes:
        token: Identifies the run, beyond its id.
        env: Variables set for the command.
        stop_timeout: Seconds between SIGTERM and SIGKILL.
        max_duration: Seconds until the command is stopped; None: no limit.
    """

    token: str
    argv: tuple[str, ...]
    cwd: Path
    env: dict[str, str]
    stop_timeout: float
    max_duration: float | None


class Exit(BaseModel, frozen=True):
    """How a command ended.

    Attributes:
        code: Exit code; negative: the number of a signal.
        reason: `lost`: the supervisor was killed, and the exit code is unknown.
        message: Why it could not be started.
        output: Bytes of output up to the end.
    """

    code: int
    reason: Literal["exit", "stop", "timeout", "lost"]
    at: UtcDatetime
    output: int
    message: str | None = None

    @property
    def status(self) -> TrainingStatus:
        """The terminal status."""
        if self.reason == "stop":
            return TrainingStatus.CANCELLED
        done = self.reason == "exit" and self.code == 0
        return TrainingStatus.COMPLETED if done else TrainingStatus.FAILED

    @property
    def raw_status(self) -> str:
        """The end in words."""
        if self.reason == "lost":
            return "lost"
        words = {"stop": "stopped, ", "timeout": "timed out, "}.get(self.reason, "")
        if self.code >= 0:
            return f"{words}exit code {self.code}"
        with suppress(ValueError):
            return f"{words}killed by {Signals(-self.code).name}"
        return f"{words}killed by signal {-self.code}"


class CommandDir(RunDir):
    """The directory of one command."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.spec = path / "command.json"
        self.started = path / "started"

    def read_end(self) -> Exit | None:
        """Return how the command ended, or None if it has not."""
        if found := self._read_exit():
            return found
        if not self.started.exists() or self.is_active():
            return None
        if found := self._read_exit():  # it ended in between
            return found
        at = datetime.fromtimestamp(self._newest(), UTC)
        lost = Exit(code=0, reason="lost", at=at, output=self._size())
        # Recorded, so that the log stays complete if the command itself still runs.
        with suppress(OSError), hold_lock(self.path / ".lost", patience=0):
            write_atomic(self.exit, lost.model_dump_json())
        return lost

    def read_state(self, end: Exit | None) -> RunState:
        """Return the state as of `end`."""
        state = RunState(
            status=TrainingStatus.PENDING, raw_status="starting", remote_id=self.path.name
        )
        changes: dict[str, object] = {}
        if self.started.exists():
            began = datetime.fromtimestamp(self.started.stat().st_mtime, UTC)
            changes |= {"status": TrainingStatus.RUNNING, "raw_status": "running"}
            changes |= {"started_at": began, "changed_at": self._changed_at()}
        if self.stop.exists():
            changes |= {"status": TrainingStatus.STOPPING, "raw_status": "stopping"}
        if end is not None:
            changes |= {"status": end.status, "raw_status": end.raw_status}
            changes |= {"finished_at": end.at, "changed_at": end.at, "failure": self._failure(end)}
            changes["result_model"] = self._result()
        return state.model_copy(update=changes)

    def read_records(self, offset: int, end: Exit | None) -> Generator[LogRecord, None, None]:
        """Yield a record per line of output after byte `offset`, up to the end of the command."""
        for line, after in read_lines(self.log, offset):
            if end is not None and after > end.output:
                break
            yield _record(line, after)
            offset = after
        if end is not None and offset < end.output:  # the last line has no newline
            with self.log.open("rb") as log:
                log.seek(offset)
                yield _record(log.read(end.output - offset), end.output)

    def _read_exit(self) -> Exit | None:
        try:
            return Exit.model_validate_json(self.exit.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def _failure(self, end: Exit) -> Failure | None:
        if end.status is not TrainingStatus.FAILED:
            return None
        if end.reason == "lost":
            message = (
                "The process that supervises the command exited unexpectedly: it was killed, or "
                "the machine was restarted. The command may still be running."
            )
            return Failure(kind="lost", message=message, retryable=True)
        message = end.message or end.raw_status
        if lines := self._last_lines(end):
            message += f"; last output: {' | '.join(lines)}"
        return Failure(kind="timeout" if end.reason == "timeout" else "program", message=message)

    def _last_lines(self, end: Exit) -> list[str]:
        if not end.output:
            return []
        begin = max(0, end.output - _TAIL_BYTES)
        with self.log.open("rb") as log:
            log.seek(begin)
            lines = log.read(end.output - begin).splitlines()
        return [text for line in lines if (text := _text(line).strip())][-_TAIL_LINES:]

    def _result(self) -> str | None:
        has_any = self.result.is_dir() and any(self.result.iterdir())
        return str(self.result) if has_any else None

    def _size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _newest(self) -> float:
        return max(path.stat().st_mtime for path in (self.started, self.log) if path.exists())

    def _changed_at(self) -> datetime:
        newest, now = datetime.fromtimestamp(self._newest(), UTC), utc_now()
        return now if now - newest < _SETTLED else newest


def _record(line: bytes, end: int) -> LogRecord:
    return LogRecord(message=_text(line), source="output", cursor=str(end))


def _text(line: bytes) -> str:
    """Return a line as a terminal shows it: progress bars return to the start of the line."""
    return line.rstrip(b"\r\n").rpartition(b"\r")[2].decode("utf-8", "replace")
