"""Files that several processes share: appended lines, whole-or-nothing writes, locks.

Standard library only, POSIX only (`flock`). Each function touches just the path it is given.
"""

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

__all__ = [
    "append_line",
    "hold_lock",
    "is_locked",
    "make_private_directory",
    "read_lines",
    "signal_holder",
    "sync_directory",
    "write_atomic",
    "write_private",
]

_MODE: Final = 0o600


def write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read; a reader, or a crash, finds the old or the new."""
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


LOCK_PATIENCE: Final = 2.0
"""Seconds to wait for a lock that a reader, or a process just killed, still holds."""


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the complete lines behind byte `offset`, each with the offset behind it.

    A last line without its end is still being written, or torn: it is left alone.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line, offset
    except FileNotFoundError:
        return


def append_line(path: Path, line: str) -> None:
    """Append one line in one write; a torn line of an earlier process is closed first."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line.encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, finds the old or the new content."""
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def make_private_directory(path: Path) -> None:
    """Make a directory, and those missing above it, for the owner only.

    One that is there already keeps the rights that somebody gave it.
    """
    for place in (*reversed(path.parents), path):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Tell whether some process holds the lock; takes nothing away from its holder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def hold_lock(path: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Hold the lock for the block; the system lets go of it when the process dies.

    Raises:
        BlockingIOError: Another process still holds it after `patience` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + patience
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            time.sleep(0.02)
        record = f"{_identity()}\n".encode()
        # One write, and only then the rest of a longer record is cut off, so that a reader of
        # the first line never sees half of one.
        os.pwrite(descriptor, record, 0)
        os.ftruncate(descriptor, len(record))
        yield
    finally:
        os.close(descriptor)


def signal_holder(path: Path, number: int) -> bool:
    """Send a signal to the process that holds a lock; False if that process is not certain.

    A process id alone means another process in another container, on another host or after a
    restart. So the lock's record must name this boot of this machine, this process's pid
    namespace and the start time of the process that has the id now. A record of an earlier
    version, which has the id only, is never acted upon, nor is one on a system without `/proc`
    and pidfd (Linux 5.3).
    """
    if not is_locked(path):
        return False
    try:
        record = path.read_text(encoding="ascii").partition("\n")[0]
        pid = int(record.partition(" ")[0])
        # Opened before it is identified: the id cannot pass to another process in between.
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError, ValueError):
        return False
    try:
        if " " not in record or record != _identity(pid):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False  # it ended meanwhile
    finally:
        os.close(descriptor)
    return True


def _identity(pid: int | None = None) -> str:
    """Return "PID BOOT NAMESPACE STARTED" of a process in this pid namespace.

    Just "PID" where the system does not say the rest.

    Args:
        pid: None for this process.
    """
    number = os.getpid() if pid is None else pid
    proc = Path("/proc")
    try:
        if str((proc / "self").readlink()) != str(os.getpid()):
            return str(number)  # the /proc of another pid namespace
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (proc / "self/ns/pid").stat().st_ino
        # proc_pid_stat(5): the command in parentheses may hold anything; field 22 is the start.
        stat = (proc / str(number) / "stat").read_bytes().rpartition(b")")[2].split()
        return f"{number} {boot} {namespace} {int(stat[19])}"
    except (OSError, ValueError, IndexError):
        return str(number)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
