"""Start the processes that train beside this one, and notice at once when one has died."""

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import Final

from pydantic import ValidationError

from training_backends.core.run import Failure
from training_backends.rundir.directory import Event, ExitCode, MetricsRow, RunDir
from training_backends.tokens.encoders import TokenizerError
from training_backends.trainer.control import STOP_SIGNALS, StopRequest
from training_backends.trainer.environment import (
    VISIBLE,
    environment_without_token,
    prepare_imports,
    prepare_threads,
)
from training_backends.trainer.errors import Stopped, TeamLost, TrainerError, failure_of

__all__ = ["Followers", "follow", "followed"]


def follow(path: Path, rank: int, size: int) -> ExitCode:
    """Train as number `rank` of `size`; the leader starts this, and nobody else.

    It begins once the leader writes to standard input where to meet, and ends when that is
    closed. Why it failed it says in a line on standard output.
    """
    # Who asks the whole group to end asks the leader, which needs its followers to save.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    run = _Quiet(path)
    try:
        spec = run.read_spec()
        prepare_threads()
        prepare_imports(spec.model)
        from training_backends.trainer.distributed import Team  # noqa: PLC0415
        from training_backends.trainer.run import Work  # noqa: PLC0415

        if not (port := sys.stdin.readline()):
            return ExitCode.STOPPED
        threading.Thread(target=_end_with_leader, name="leader", daemon=True).start()
        # Not sooner: where nobody leads any more, it would be looked for patiently.
        team = Team(rank, size, int(port))
        Work(run, spec, _Deaf(run.stop), team).run()
    except Exception as error:
        traceback.print_exception(error)
        print(failure_of(error).model_dump_json(), flush=True)  # noqa: T201  # the leader reads it
        return ExitCode.CRASHED
    return ExitCode.DONE


def _end_with_leader() -> None:
    """End this process at once when the leader has ended: it may wait for it forever."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(ExitCode.STOPPED)


class _Quiet(RunDir):
    """A run of which somebody else tells; what only this process has seen goes to the log."""

    def add_event(self, event: Event) -> None:
        if event.level == "warning":
            print(event.message, file=sys.stderr)  # noqa: T201

    def add_metrics(self, row: MetricsRow) -> None:
        pass


class _Deaf(StopRequest):
    """The leader hears requests to stop, and tells of them between two steps."""

    @property
    def requested(self) -> bool:
        return False


_PROGRAM: Final = (sys.executable, "-P", "-m", "training_backends.trainer", "follow")
_GRACE: Final = 10.0
"""Seconds for this process to notice by itself, as it does unless it waits for a GPU."""
_PATIENCE: Final = 5.0
"""Seconds in which one that fails says why."""


class Followers:
    """The processes that follow this one.

    Args:
        on_lost: Ends this process; called from a thread where a follower has failed and
            this process's own work, which may wait for it forever, has not ended.
    """

    def __init__(
        self, on_lost: Callable[[TrainerError], object], program: Sequence[str] = _PROGRAM
    ) -> None:
        self._on_lost = on_lost
        self._program = program
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failure: Failure | None = None
        self._lock = Lock()
        self._failed = threading.Event()
        self._over = threading.Event()

    def start(self, run: Path, devices: Sequence[str | None]) -> None:
        """Start one for each device; they wait for `go`."""
        size = len(devices) + 1
        for rank, device in enumerate(devices, 1):
            command = [str(run), f"--rank={rank}", f"--size={size}"]
            with _signals_held_back():
                process = subprocess.Popen(  # noqa: S603  # our own program
                    [*self._program, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=_environment(device),
                )
            self._processes.append(process)
            name = f"follower-{rank}"
            Thread(target=self._attend, args=(process, rank, size), name=name, daemon=True).start()

    def go(self, port: int) -> None:
        """Let them load the model, now that its files are here, and say where to meet."""
        for process in self._processes:
            with suppress(BrokenPipeError):  # noticed elsewhere
                if process.stdin:
                    process.stdin.write(b"%d\n" % port)
                    process.stdin.flush()

    def _attend(self, process: "subprocess.Popen[bytes]", rank: int, size: int) -> None:
        # The first word counts that is not of another's failure: where one has failed, the others
        # fail for it.
        told: Failure | None = None
        for line in process.stdout or ():
            with suppress(ValidationError):
                told = Failure.model_validate_json(line)
                if told.kind != "lost":
                    self._fail(told)
        if (code := process.wait()) == 0 or self._over.is_set():
            return
        if told:
            self._failed.wait(_GRACE)
        failure = self._fail(told or _lost(code, rank, size))
        if not self._over.wait(_GRACE):
            self._on_lost(_error_of(failure))

    def _fail(self, failure: Failure) -> Failure:
        """Return why it fails, which is `failure` unless something else came first."""
        with self._lock:
            self._failure = self._failure or failure
            self._failed.set()
            return self._failure

    def explain(self, error: Exception) -> TrainerError | None:
        """Return why this process could not go on, if that is because a follower has failed."""
        # By itself this process may fail as well, and they then for it.
        patience = _PATIENCE if isinstance(error, TeamLost) else 0
        if self._processes and self._failed.wait(patience) and self._failure:
            return _error_of(self._failure)
        return None

    def end(self) -> None:
        """End those that are left, whatever becomes of them; safe to repeat."""
        self._over.set()
        for process in self._processes:
            with suppress(BrokenPipeError):
                if process.stdin:
                    process.stdin.close()  # which they take for the end
        for process in self._processes:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def followed(
    on_lost: Callable[[TrainerError], object], program: Sequence[str] = _PROGRAM
) -> Iterator[Followers]:
    """Keep followers for the block; an error in it that was a follower's is told as such."""
    followers = Followers(on_lost, program)
    try:
        yield followers
    except (TrainerError, TokenizerError, Stopped):
        raise
    except Exception as error:
        if cause := followers.explain(error):
            raise cause from error
        raise
    finally:
        followers.end()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Have a process that is started here hear no request to stop before it can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(device: str | None) -> dict[str, str]:
    # The model is on this machine by then.
    given = environment_without_token() | {"HF_HUB_OFFLINE": "1"}
    return given if device is None else given | {VISIBLE: device}


def _lost(code: int, rank: int, size: int) -> Failure:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    message = (
        f"Process {rank + 1} of the {size} that train together ended without a word ({how}): "
        "killed, or out of memory. log.txt has its last output."
    )
    return Failure(kind="lost", message=message, retryable=True)


def _error_of(failure: Failure) -> TrainerError:
    return TrainerError(failure.message, kind=failure.kind, retryable=failure.retryable)
