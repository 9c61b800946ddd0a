"""Start the follower processes of a distributed run, and detect at once when one dies."""

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
from training_backends.rundir.directory import Event, MetricsRow, RunDir, TrainerExitCode
from training_backends.tokens.encoders import TokenizerError
from training_backends.trainer.control import STOP_SIGNALS, StopRequest
from training_backends.trainer.environment import (
    environment_without_token,
    prepare_imports,
    prepare_threads,
    show_only,
)
from training_backends.trainer.errors import ProcessLost, Stopped, TrainerError, failure_of
from training_backends.trainer.queue import Device

__all__ = ["Followers", "follow", "followed"]


def follow(path: Path, rank: int, size: int) -> TrainerExitCode:
    """Train as process `rank` of `size`; only the leader starts this.

    Waits until the leader writes its port to standard input, and exits when that is closed. On
    failure, prints a `Failure` as one JSON line to standard output.
    """
    # A signal sent to the process group is for the leader, which needs its followers to save.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    run = _FollowerRunDir(path)
    try:
        spec = run.read_spec()
        prepare_threads()
        prepare_imports(spec.model)
        from training_backends.trainer.distributed import ProcessGroup  # noqa: PLC0415
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415

        if not (port := sys.stdin.readline()):
            return TrainerExitCode.STOPPED
        threading.Thread(target=_end_with_leader, name="leader", daemon=True).start()
        # Connecting before the leader is known to be alive would wait until the timeout.
        group = ProcessGroup(rank, size, int(port))
        TrainingProcess(run, spec, _NoStopRequest(run.stop), group).run()
    except Exception as error:
        traceback.print_exception(error)
        print(failure_of(error).model_dump_json(), flush=True)  # noqa: T201  # the leader reads it
        return TrainerExitCode.CRASHED
    return TrainerExitCode.DONE


def _end_with_leader() -> None:
    """Exit as soon as the leader has exited; the main thread may wait for it forever."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(TrainerExitCode.STOPPED)


class _FollowerRunDir(RunDir):
    """A run directory that only the leader writes; warnings go to this process's log."""

    def add_event(self, event: Event) -> None:
        if event.level == "warning":
            print(event.message, file=sys.stderr)  # noqa: T201

    def add_metrics(self, row: MetricsRow) -> None:
        pass


class _NoStopRequest(StopRequest):
    """Never stops by itself: the leader broadcasts stop requests between steps."""

    @property
    def requested(self) -> bool:
        return False


_PROGRAM: Final = (sys.executable, "-P", "-m", "training_backends.trainer", "follow")
_GRACE: Final = 10.0
_PATIENCE: Final = 5.0
"""Seconds to wait for a failing follower to report its reason."""


class Followers:
    """The follower processes of this one.

    Args:
        on_lost: Ends this process. Called from a thread when a follower has failed and the main
            thread, which may wait for it forever, has not finished.
        grace: Seconds for this process to notice the failure itself, as it does unless it waits
            for a GPU.
    """

    def __init__(
        self,
        on_lost: Callable[[TrainerError], object],
        program: Sequence[str] = _PROGRAM,
        grace: float = _GRACE,
    ) -> None:
        self._on_lost = on_lost
        self._program = program
        self._grace = grace
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failure: Failure | None = None
        self._lock = Lock()
        self._failed = threading.Event()
        self._finished = threading.Event()

    def start(self, run: Path, devices: Sequence[Device | None]) -> None:
        """Start one process per device; each waits for `go`."""
        size = len(devices) + 1
        for rank, device in enumerate(devices, 1):
            command = [str(run), f"--rank={rank}", f"--size={size}"]
            with _stop_signals_blocked():
                process = subprocess.Popen(  # noqa: S603  # our own program
                    [*self._program, *command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=_environment(device),
                )
            self._processes.append(process)
            name = f"follower-{rank}"
            Thread(target=self._watch, args=(process, rank, size), name=name, daemon=True).start()

    def go(self, port: int) -> None:
        """Send the leader's port; the followers then load the model, which is local by now."""
        for process in self._processes:
            with suppress(BrokenPipeError):  # `_watch` reports it
                if process.stdin:
                    process.stdin.write(b"%d\n" % port)
                    process.stdin.flush()

    def _watch(self, process: "subprocess.Popen[bytes]", rank: int, size: int) -> None:
        # The first failure other than `lost` is the cause: when one process fails, the others
        # lose contact with it and fail too.
        reported: Failure | None = None
        for line in process.stdout or ():
            with suppress(ValidationError):
                reported = Failure.model_validate_json(line)
                if reported.kind != "lost":
                    self._fail(reported)
        if (code := process.wait()) == 0 or self._finished.is_set():
            return
        if reported:
            self._failed.wait(self._grace)
        failure = self._fail(reported or _lost(code, rank, size))
        if not self._finished.wait(self._grace):
            self._on_lost(_error_of(failure))

    def _fail(self, failure: Failure) -> Failure:
        """Record a failure unless there is one already; return the first."""
        with self._lock:
            self._failure = self._failure or failure
            self._failed.set()
            return self._failure

    def explain(self, error: Exception) -> TrainerError | None:
        """Return the follower's failure if it caused `error`, else None."""
        # If this process failed by itself, the followers fail because of it: do not wait for them.
        patience = _PATIENCE if isinstance(error, ProcessLost) else 0
        if self._processes and self._failed.wait(patience) and self._failure:
            return _error_of(self._failure)
        return None

    def end(self) -> None:
        """Terminate the remaining followers; safe to repeat."""
        self._finished.set()
        for process in self._processes:
            with suppress(BrokenPipeError):
                if process.stdin:
                    process.stdin.close()  # makes them exit
        for process in self._processes:
            try:
                process.wait(self._grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def followed(
    on_lost: Callable[[TrainerError], object],
    program: Sequence[str] = _PROGRAM,
    grace: float = _GRACE,
) -> Iterator[Followers]:
    """Manage followers for the block; an error that a follower caused is raised as such."""
    followers = Followers(on_lost, program, grace)
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
def _stop_signals_blocked() -> Iterator[None]:
    """Block stop signals until a process started here can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(device: Device | None) -> dict[str, str]:
    # The leader has downloaded the model by the time a follower loads it.
    given = environment_without_token() | {"HF_HUB_OFFLINE": "1"}
    return given if device is None else given | show_only(device)


def _lost(code: int, rank: int, size: int) -> Failure:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    message = (
        f"Training process {rank + 1} of {size} exited unexpectedly ({how}): killed, or "
        "out of memory. See log.txt for its last output."
    )
    return Failure(kind="lost", message=message, retryable=True)


def _error_of(failure: Failure) -> TrainerError:
    return TrainerError(failure.message, kind=failure.kind, retryable=failure.retryable)
