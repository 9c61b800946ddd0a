"""The queue for the training slots of this machine, kept in locked files only.

Each slot in `slots_dir` is a lock file. Each waiting process has a file in `tickets/`, named so
that names sort in queue order, and holds a lock on it; an unlocked file belongs to a process that
has died. The position depends on the priority and on when the run was first queued, which its run
directory records: a process started again for the run, even after a reboot, keeps its position.

Several machines or containers may share the files: GPUs are named by their UUID, everything else by
the machine, so that no run waits for another machine's slots.
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

__all__ = ["Device", "QueueEntry", "Slot", "hold_slots", "host_key", "slots_for"]

_CHECK_EVERY: Final = 0.1
"""Seconds between two checks, multiplied by the position in the queue."""
_CHECK_AT_LEAST_EVERY: Final = 5.0
_STOP_CHECK_EVERY: Final = 1.0
"""Maximum seconds between two checks for a stop request."""
_TICKETS: Final = "tickets"
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_TOP_PRIORITY: Final = 1000


class Device(NamedTuple):
    """A GPU.

    Attributes:
        name: As in the variable that makes it visible, `CUDA_VISIBLE_DEVICES` or
            `HIP_VISIBLE_DEVICES`.
        key: Identifies it among all machines and containers that share a home.
        is_amd: Whether it needs the latter variable.
    """

    name: str
    key: str
    is_amd: bool = False


def host_key() -> str:
    """Return what identifies this machine until it reboots; the same in all of its containers."""
    try:
        return _BOOT.read_text(encoding="ascii").partition("-")[0]
    except OSError:
        return os.uname().nodename


class Slot(NamedTuple):
    """A slot for one training process.

    Attributes:
        lock: Name of its lock file.
        device: Its GPU; None for the CPU.
    """

    lock: str
    device: Device | None = None


class QueueEntry(NamedTuple):
    """A run's entry in the queue, ordered by priority, then by time.

    Attributes:
        since: When the run was first queued.
    """

    run_id: str
    priority: int
    since: datetime

    def file_name(self, kind: str) -> str:
        """Return the name of its file; those of one kind sort in queue order."""
        rank = _TOP_PRIORITY - self.priority
        micros = round(self.since.timestamp() * 1e6)
        return f"{kind}~{rank:04d}~{micros:018d}~{quote(self.run_id, safe='')}"


def slots_for(devices: Sequence[Device], most: int | None, gpus: int = 1) -> list[Slot]:
    """Return a machine's slots, distributed over its GPUs.

    Args:
        most: Concurrent runs; None: one per GPU, or one without a GPU.
        gpus: GPUs per run.
    """
    if not devices:
        return [Slot(f"cpu-{host_key()}.{number}.lock") for number in range(most or 1)]
    total = most * gpus if most else len(devices)
    rounds = [divmod(number, len(devices)) for number in range(total)]
    return [
        Slot(f"gpu-{quote(devices[index].key, safe='')}.{again}.lock", devices[index])
        for again, index in rounds
    ]


@contextmanager
def hold_slots(
    directory: Path | None,
    entry: QueueEntry,
    slots: Sequence[Slot],
    *,
    gpus: int = 1,
    on_wait: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Slot, ...]]:
    """Hold a slot for the block, waiting as long as necessary.

    Args:
        directory: Where processes coordinate; None means no limit, and no slot.
        gpus: Number of slots to hold, each on another GPU. They are taken all at once, so that two
            runs cannot each hold one and wait for the other.
        on_wait: Called with the position in the queue, from 1, at first and on every change.
        should_stop: Checked while waiting.

    Raises:
        Stopped: `should_stop` returned True while waiting.
    """
    if directory is None:
        yield ()
        return
    kind = f"{'cpu' if slots[0].device is None else 'gpu'}-{host_key()}"
    tickets = directory / _TICKETS
    tickets.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _queue_file(tickets, entry.file_name(kind)) as queue_file:
            position = 0
            while True:
                before = queue_file.position()
                if before == 1 and (found := _take(held, directory, slots, gpus)):
                    break
                if before != position:
                    on_wait(before)
                    position = before
                _pause(min(_CHECK_EVERY * position, _CHECK_AT_LEAST_EVERY), should_stop)
        yield found


def _pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not should_stop():
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, _STOP_CHECK_EVERY))
    raise Stopped


def _take(held: ExitStack, directory: Path, slots: Sequence[Slot], number: int) -> tuple[Slot, ...]:
    """Take that many slots on different GPUs, or none."""
    found: list[Slot] = []
    with ExitStack() as taken:
        for slot in slots:
            if found and slot.device in {each.device for each in found}:
                continue
            with suppress(BlockingIOError):
                taken.enter_context(hold_lock(directory / slot.lock, patience=0))
                found.append(slot)
            if len(found) == number:
                held.push(taken.pop_all())
                return tuple(found)
    return ()


class _QueueFile:
    """A file in the queue, locked for as long as its process lives."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._descriptor: int | None = None

    def create(self) -> None:
        """Create the file; it gets its name once locked, so that it is never seen unlocked."""
        self.remove()
        # Not named by process id, which is not unique across containers.
        made = self._directory / f".{os.urandom(8).hex()}"
        self._descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        made.rename(self._directory / self._name)

    def remove(self) -> None:
        """Remove the file."""
        if self._descriptor is not None:
            (self._directory / self._name).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def position(self) -> int:
        """Return the position in the queue, from 1; removes the files of dead processes."""
        kind = self._name.partition("~")[0]
        names = {path.name for path in self._directory.iterdir()}
        if self._name not in names:
            self.create()  # the file was removed from outside
        before = [name for name in names if name.startswith(f"{kind}~") and name < self._name]
        return 1 + sum(self._is_alive(name) for name in before)

    def _is_alive(self, name: str) -> bool:
        path = self._directory / name
        if is_locked(path):
            return True
        path.unlink(missing_ok=True)
        return False


@contextmanager
def _queue_file(directory: Path, name: str) -> Iterator[_QueueFile]:
    queue_file = _QueueFile(directory, name)
    queue_file.create()
    try:
        yield queue_file
    finally:
        queue_file.remove()
