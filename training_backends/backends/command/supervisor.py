"""The process that starts a command once, passes on a stop, and records how it ended.

`python -P -m training_backends.backends.command.supervisor DIRECTORY` returns once the command is
started; the supervisor itself keeps running. Standard library only. Files, see `state`:

    command.json    what to run
    started         created once, before the command is started
    lock            locked while the supervisor lives
    log.txt         stdout and stderr of the command
    stop            asks the supervisor to stop the command
    exit.json       how the command ended; missing while the lock is free: the supervisor was killed
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from training_backends.core.files import hold_lock, sync_directory, write_atomic

__all__ = ["Supervisor"]

_TICK: Final = 0.5
"""Seconds between two checks for a stop or the time limit; a signal makes a stop faster."""


class Supervisor:
    """Runs the command of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._spec: dict[str, Any] = json.loads((directory / "command.json").read_bytes())
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._reason = "exit"
        self._killed_at = 0.0

    def run(self) -> None:
        """Run the command to its end, unless it has been started before."""
        if not self._mark_started():
            return
        signal.signal(signal.SIGTERM, self._check)
        signal.signal(signal.SIGALRM, self._check)
        if (self._directory / "stop").exists():
            self._reason = "stop"
            self._end(0)
            return
        try:
            self._process = self._start()
        except (OSError, ValueError) as error:
            self._end(127, f"The command could not be started: {error}")
            return
        signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
        _detach()
        code = self._process.wait()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._reason != "exit":
            self._end_group(self._process.pid)
        self._end(code)

    def _mark_started(self) -> bool:
        try:
            (self._directory / "started").touch(exist_ok=False)
        except FileExistsError:
            return False
        sync_directory(self._directory)
        return True

    def _start(self) -> "subprocess.Popen[bytes]":
        with (self._directory / "log.txt").open("ab") as log:
            return subprocess.Popen(  # noqa: S603  # running it is the purpose
                self._spec["argv"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._spec["cwd"],
                env=os.environ | self._spec["env"],
                start_new_session=True,
            )

    def _check(self, number: int, _: object) -> None:
        """End the command if it has to be, within any wait: Python resumes it afterwards."""
        if self._process is None:
            return
        now, limit = time.monotonic(), self._spec["max_duration"]
        if self._reason != "exit":
            if now > self._killed_at:
                _signal_group(self._process.pid, signal.SIGKILL)
            return
        if number == signal.SIGTERM or (self._directory / "stop").exists():
            self._reason = "stop"
        elif limit is not None and now - self._began > limit:
            self._reason = "timeout"
        else:
            return
        self._killed_at = now + self._spec["stop_timeout"]
        _signal_group(self._process.pid, signal.SIGTERM)

    def _end_group(self, group: int) -> None:
        """Give what the command has started the rest of the time, then kill it."""
        while _signal_group(group, 0):
            if time.monotonic() > self._killed_at:
                _signal_group(group, signal.SIGKILL)
                return
            time.sleep(0.02)

    def _end(self, code: int, message: str | None = None) -> None:
        log = self._directory / "log.txt"
        record = {
            "code": code,
            "reason": self._reason,
            "message": message,
            "at": datetime.now(UTC).isoformat(),
            "output": log.stat().st_size if log.exists() else 0,
        }
        write_atomic(self._directory / "exit.json", json.dumps(record))


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; return whether it exists."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # a process of it runs as another user
    return True


def _detach() -> None:
    """Close the pipes to the launching process, which waits for that."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)


def main(directory: Path) -> None:
    """Supervise in a process of its own, which the launching process need not wait for."""
    if os.fork():
        os._exit(0)
    with suppress(BlockingIOError), hold_lock(directory / "lock"):
        Supervisor(directory).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
