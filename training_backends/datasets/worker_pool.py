"""Distribute work on files over processes, whatever the calling program is.

The pools of the standard library, and those built on it, run the caller's `__main__` in each
worker unless it is guarded, fork a process that may have threads, or reject daemonic callers. A
worker here is a separate program.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from training_backends.core.errors import TrainingBackendError

__all__ = ["Outcome", "attempt", "cpu_count", "load_task", "run_parallel"]

Outcome = tuple[bool, Any]
"""Whether a call succeeded, and its result or exception."""

_AHEAD: Final = 4
"""Arguments per process that are taken ahead of results."""

_PENDING: Final = 2
"""Arguments per worker: one in progress and one queued."""

_PROGRAM: Final = ("-P", "-m", "training_backends.datasets.worker_main")
_SECRET: Final = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE
)


def cpu_count() -> int:
    """Return the number of CPUs available to this process, by affinity and cgroup."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(allowed, _cgroup_quota() or allowed))


def _cgroup_quota() -> int | None:
    """Return the CPU quota of the container, rounded up; None without a quota."""
    here = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        time, period = map(int, (here / "cpu.max").read_text(encoding="ascii").split())
        return -(-time // period)
    with suppress(OSError, ValueError):
        time, period = (
            int((here / f"cpu/cpu.cfs_{name}_us").read_text(encoding="ascii"))
            for name in ("quota", "period")
        )
        return -(-time // period) if time > 0 else None
    return None


def load_task(task: str) -> Callable[[Any], Any]:
    """Import a function named "package.module:function"."""
    module, _, name = task.partition(":")
    function: Callable[[Any], Any] = getattr(import_module(module), name)
    return function


def attempt(function: Callable[[Any], Any], argument: object) -> Outcome:
    """Call a function and return its result or its exception."""
    try:
        return True, function(argument)
    except Exception as error:
        return False, error


def run_parallel(
    task: str, arguments: Iterable[object], *, processes: int
) -> Generator[Any, None, None]:
    """Call a function for each argument and yield the results in order.

    This process works too, starting with the first argument; with `processes=1` no other is
    started. Only a few arguments are taken ahead of the results. The workers end when the iterator
    is closed, garbage-collected or raises, and when this process exits for any reason. They do not
    share standard input or output with it, or secrets in its environment.

    Args:
        task: "package.module:function" with one argument, imported by each process. Arguments,
            results and exceptions are pickled.
        arguments: Ideally of similar cost, a few hundredths of a second each.
        processes: Maximum number, including this one; see `cpu_count`.

    Raises:
        Exception: Raised by the function, in place of its result.
        TrainingBackendError: A worker was killed.
    """
    function = load_task(task)
    if processes <= 1 or not sys.executable or getattr(sys, "frozen", False):
        yield from map(function, arguments)
        return
    with ExitStack() as stack:
        yield from _Pool(task, function, iter(arguments), processes, stack).results()


class _Pool:
    """This process and its workers, processing one series of arguments."""

    def __init__(
        self,
        task: str,
        function: Callable[[Any], Any],
        arguments: Iterator[object],
        processes: int,
        stack: ExitStack,
    ) -> None:
        self._task = task
        self._function = function
        self._arguments = arguments
        self._to_start = processes - 1
        self._most_pending = processes * _AHEAD
        self._stack = stack
        self._workers: list[_Worker] = []
        self._taken = 0
        self._wanted = 0
        self._done: dict[int, Outcome] = {}

    def results(self) -> Iterator[Any]:
        own: tuple[int, object] | None = None
        while True:
            own = own or self._take()
            self._dispatch()
            if self._wanted in self._done:
                returned, value = self._done.pop(self._wanted)
                self._wanted += 1
                if not returned:
                    raise value
                yield value
            elif own:
                self._done[own[0]] = attempt(self._function, own[1])
                own = None
            elif self._wanted < self._taken:
                self._collect(block=True)
            else:
                return
            self._collect(block=False)

    def _take(self) -> tuple[int, object] | None:
        if self._taken - self._wanted >= self._most_pending:
            return None
        for argument in self._arguments:
            self._taken += 1
            return self._taken - 1, argument
        return None

    def _dispatch(self) -> None:
        while (worker := self._free()) and (taken := self._take()):
            worker.give(*taken)

    def _free(self) -> "_Worker | None":
        if self._to_start:
            self._to_start -= 1
            # If no more processes can be started, the existing ones do the work.
            with suppress(OSError):
                self._workers.append(_Worker(self._task, self._stack))
        least = min(self._workers, key=lambda worker: worker.pending, default=None)
        return least if least and least.pending < _PENDING else None

    def _collect(self, *, block: bool) -> None:
        from multiprocessing.connection import wait  # noqa: PLC0415

        busy = [worker for worker in self._workers if worker.pending]
        ready = wait([worker.connection for worker in busy], None if block else 0)
        for worker in busy:
            if worker.connection in ready:
                number, outcome = worker.answer()
                self._done[number] = outcome


class _Worker:
    """A worker process.

    Attributes:
        pending: Number of arguments without a result.
    """

    def __init__(self, task: str, stack: ExitStack) -> None:
        from multiprocessing import Pipe  # noqa: PLC0415

        self.pending = 0
        self.connection, theirs = Pipe()
        stack.enter_context(self.connection)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, *_PROGRAM, task],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                # Ctrl-C is handled by the parent, which then ends this process.
                start_new_session=True,
            )
        stack.callback(self._end)

    def give(self, number: int, argument: object) -> None:
        try:
            self.connection.send((number, argument))
        except ConnectionError:
            raise self._lost() from None
        self.pending += 1

    def answer(self) -> tuple[int, Outcome]:
        try:
            number, outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost() from None
        self.pending -= 1
        return number, outcome

    def _lost(self) -> TrainingBackendError:
        self._process.kill()
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return TrainingBackendError(
            f"A worker process was terminated {how} while reading data.",
            hint="If it ran out of memory, use fewer processes.",
            retryable=True,
        )

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """Return the environment for workers: the same import path, without secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET.search(name) and not ("://" in value and "@" in value)
    }
    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    # Searching for pydantic plugins takes a tenth of a worker's startup time.
    return {"PYDANTIC_DISABLE_PLUGINS": "__all__"} | kept | {"PYTHONPATH": path}
