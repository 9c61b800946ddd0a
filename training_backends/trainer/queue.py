"""Who may train on this machine, and when: a queue that lives in locked files alone.

In `slots_dir` each place to train is a lock file, and `tickets/` has a file for each process
that waits, named so that names sort as the queue does. Its process holds a lock on it, so
that a ticket whose process has died is known. A run's turn is told by its priority and by the
time at which it first asked, which its own directory keeps: a process that is started again
for it, after a restart of the machine even, stands where the one before stood.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote

from training_backends.core.files import hold_lock, is_locked
from training_backends.trainer.control import Stopped

__all__ = ["Place", "Turn", "hold_places", "places_for"]

_LOOK_EVERY: Final = 0.1
"""Seconds between two looks of the first in the queue, for each that stands before another."""
_LOOK_AT_LEAST_EVERY: Final = 5.0
_OBEY_WITHIN: Final = 1.0
"""Seconds between two looks for a request to stop, at most."""
_TICKETS: Final = "tickets"
_TOP_PRIORITY: Final = 1000


class Place(NamedTuple):
    """Where one process can train.

    Attributes:
        lock: Name of its lock file.
        device: The GPU that belongs to it, as `CUDA_VISIBLE_DEVICES` names it.
    """

    lock: str
    device: str | None = None


class Turn(NamedTuple):
    """When a run's turn is: before those of lower priority, and those that came later.

    Attributes:
        since: When it first asked for a place.
    """

    run_id: str
    priority: int
    since: datetime

    def ticket(self, kind: str) -> str:
        """Return the name of its ticket; those of one kind sort by turn."""
        rank = _TOP_PRIORITY - self.priority
        micros = round(self.since.timestamp() * 1e6)
        return f"{kind}~{rank:04d}~{micros:018d}~{quote(self.run_id, safe='')}"


def places_for(devices: Sequence[str], most: int | None, gpus: int = 1) -> list[Place]:
    """Return the places of a machine, shared out among its GPUs.

    Args:
        most: How many runs may train at once; None: one a GPU, or one where there is none.
        gpus: How many of the GPUs a single run takes.
    """
    if not devices:
        return [Place(f"{number}.lock") for number in range(most or 1)]
    wanted = most * gpus if most else len(devices)
    rounds = [divmod(number, len(devices)) for number in range(wanted)]
    return [
        Place(f"gpu-{quote(devices[index], safe='')}.{again}.lock", devices[index])
        for again, index in rounds
    ]


@contextmanager
def hold_places(
    directory: Path | None,
    turn: Turn,
    places: Sequence[Place],
    *,
    gpus: int = 1,
    on_wait: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Place, ...]]:
    """Hold one of the places for the block, waiting for it as long as it takes.

    Args:
        directory: Where processes agree on it; None means no limit, and no place.
        gpus: Hold as many, each on another GPU; all at once, so that two runs which lack one
            each do not wait for each other.
        on_wait: Told the position in the queue, from 1, when it waits and as that changes.
        should_stop: Asked while waiting.

    Raises:
        Stopped: `should_stop` said so while there was no free place.
    """
    if directory is None:
        yield ()
        return
    kind = "cpu" if places[0].device is None else "gpu"
    tickets = directory / _TICKETS
    tickets.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _ticket(tickets, turn.ticket(kind)) as ticket:
            position = 0
            while True:
                before = ticket.position()
                if before == 1 and (found := _take(held, directory, places, gpus)):
                    break
                if before != position:
                    on_wait(before)
                    position = before
                _pause(min(_LOOK_EVERY * position, _LOOK_AT_LEAST_EVERY), should_stop)
        yield found


def _pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not should_stop():
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, _OBEY_WITHIN))
    raise Stopped


def _take(
    held: ExitStack, directory: Path, places: Sequence[Place], number: int
) -> tuple[Place, ...]:
    """Take so many places on different GPUs, or none."""
    found: list[Place] = []
    with ExitStack() as taken:
        for place in places:
            if found and place.device in {each.device for each in found}:
                continue
            with suppress(BlockingIOError):
                taken.enter_context(hold_lock(directory / place.lock, patience=0))
                found.append(place)
            if len(found) == number:
                held.push(taken.pop_all())
                return tuple(found)
    return ()


class _Ticket:
    """A name in the queue, locked for as long as its process lives."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._descriptor: int | None = None

    def draw(self) -> None:
        """Take it; it has its name only once it is locked, so that nobody sees it free."""
        self.drop()
        # Not named by the process id, which another container may have as well.
        made = self._directory / f".{os.urandom(8).hex()}"
        self._descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        made.rename(self._directory / self._name)

    def drop(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            (self._directory / self._name).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def position(self) -> int:
        """Return the place in the queue, from 1; the tickets of the dead are thrown away."""
        kind = self._name.partition("~")[0]
        names = {path.name for path in self._directory.iterdir()}
        if self._name not in names:
            self.draw()  # somebody has tidied up
        before = [name for name in names if name.startswith(f"{kind}~") and name < self._name]
        return 1 + sum(self._is_alive(name) for name in before)

    def _is_alive(self, name: str) -> bool:
        path = self._directory / name
        if is_locked(path):
            return True
        path.unlink(missing_ok=True)
        return False


@contextmanager
def _ticket(directory: Path, name: str) -> Iterator[_Ticket]:
    ticket = _Ticket(directory, name)
    ticket.draw()
    try:
        yield ticket
    finally:
        ticket.drop()
