"""A process that trains beside the one that leads, and ends with it."""

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from training_backends.rundir.directory import Event, ExitCode, MetricsRow, RunDir
from training_backends.trainer.control import STOP_SIGNALS, StopRequest
from training_backends.trainer.errors import EngineError, failure_of
from training_backends.trainer.imports import prepare_imports
from training_backends.trainer.threads import prepare_threads

__all__ = ["follow"]


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
        failure = error.failure if isinstance(error, EngineError) else failure_of(error)
        print(failure.model_dump_json(), flush=True)  # noqa: T201  # the leader reads it
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
