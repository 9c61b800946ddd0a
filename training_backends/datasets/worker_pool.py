"""Spread work on files over processes, whatever program the caller is.

The pools of the standard library and those built on it run the caller's `__main__` again in
each worker unless it is guarded, fork a process that may have threads, or refuse daemonic
callers. A worker here is a program of its own.
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
"""Whether a call returned, and what it returned or raised."""

_AHEAD: Final = 4
"""Arguments taken before the first of them is answered, for each process."""

_IN_HAND: Final = 2
"""Arguments that a worker has: one it works on, one so that it need not wait."""

_PROGRAM: Final = ("-P", "-m", "training_backends.datasets.worker_main")
_SECRET: Final = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE
)


def cpu_count() -> int:
    """Return how many processors this process may use: by its affinity and its cgroup."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(allowed, _cgroup_quota() or allowed))


def _cgroup_quota() -> int | None:
    """Return how many processors' time a container gets, rounded up; None for all of it."""
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
    """Import the function that "package.module:function" names."""
    module, _, name = task.partition(":")
    function: Callable[[Any], Any] = getattr(import_module(module), name)
    return function


def attempt(function: Callable[[Any], Any], argument: object) -> Outcome:
    """Call a function and keep what it raises."""
    try:
        return True, function(argument)
    except Exception as error:
        return False, error


def run_parallel(
    task: str, arguments: Iterable[object], *, processes: int
) -> Generator[Any, None, None]:
    """Call a function for each argument and yield what it returns, in their order.

    This process does its share, the first argument at once, and `processes` counts it; with 1
    no other is started. Few arguments are taken ahead of the answers. The workers end when the
    iterator is closed, dropped or raises, and when this process dies, however it dies. They
    share neither standard input nor output with it, and no secret of its environment.

    Args:
        task: "package.module:function" with one argument, imported by each process. What goes
            in and comes out, errors too, is pickled.
        arguments: Best of equal weight, and each worth a few hundredths of a second.
        processes: How many at most; see `cpu_count`.

    Raises:
        Exception: What the function raised, as itself, where its result would stand.
        TrainingBackendError: A worker was killed.
    """
    function = load_task(task)
    if processes <= 1 or not sys.executable or getattr(sys, "frozen", False):
        yield from map(function, arguments)
        return
    with ExitStack() as stack:
        yield from _Crew(task, function, iter(arguments), processes, stack).results()


class _Crew:
    """This process and its workers, busy with one series of arguments."""

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
        self._most_open = processes * _AHEAD
        self._stack = stack
        self._workers: list[_Worker] = []
        self._taken = 0
        self._wanted = 0
        self._done: dict[int, Outcome] = {}

    def results(self) -> Iterator[Any]:
        own: tuple[int, object] | None = None
        while True:
            own = own or self._take()
            self._hand_out()
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
                self._collect(patiently=True)
            else:
                return
            self._collect(patiently=False)

    def _take(self) -> tuple[int, object] | None:
        if self._taken - self._wanted >= self._most_open:
            return None
        for argument in self._arguments:
            self._taken += 1
            return self._taken - 1, argument
        return None

    def _hand_out(self) -> None:
        while (worker := self._free()) and (taken := self._take()):
            worker.give(*taken)

    def _free(self) -> "_Worker | None":
        if self._to_start:
            self._to_start -= 1
            # Where no more processes may be started, those that there are do the work.
            with suppress(OSError):
                self._workers.append(_Worker(self._task, self._stack))
        least = min(self._workers, key=lambda worker: worker.in_hand, default=None)
        return least if least and least.in_hand < _IN_HAND else None

    def _collect(self, *, patiently: bool) -> None:
        from multiprocessing.connection import wait  # noqa: PLC0415

        busy = [worker for worker in self._workers if worker.in_hand]
        ready = wait([worker.connection for worker in busy], None if patiently else 0)
        for worker in busy:
            if worker.connection in ready:
                number, outcome = worker.answer()
                self._done[number] = outcome


class _Worker:
    """One process that waits for arguments.

    Attributes:
        in_hand: Arguments that it has not answered yet.
    """

    def __init__(self, task: str, stack: ExitStack) -> None:
        from multiprocessing import Pipe  # noqa: PLC0415

        self.in_hand = 0
        self.connection, theirs = Pipe()
        stack.enter_context(self.connection)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, *_PROGRAM, task],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
                # A Ctrl-C is for the caller, who then ends this process.
                start_new_session=True,
            )
        stack.callback(self._end)

    def give(self, number: int, argument: object) -> None:
        try:
            self.connection.send((number, argument))
        except ConnectionError:
            raise self._lost() from None
        self.in_hand += 1

    def answer(self) -> tuple[int, Outcome]:
        try:
            number, outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost() from None
        self.in_hand -= 1
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
    """Return our environment with the modules that we find, without what is secret."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET.search(name) and not ("://" in value and "@" in value)
    }
    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    # Looking for plugins of pydantic takes a tenth of the time in which a worker starts.
    return {"PYDANTIC_DISABLE_PLUGINS": "__all__"} | kept | {"PYTHONPATH": path}
