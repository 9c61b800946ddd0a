"""Files shared by several processes: atomic writes, appended lines and locks.

Standard library and POSIX only (`flock`).
"""

import errno
import fcntl
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

__all__ = [
    "Digest",
    "Stamp",
    "append_line",
    "digest_of",
    "disk_usage",
    "hold_lock",
    "is_locked",
    "keep_digest",
    "make_private_directory",
    "read_lines",
    "settled_stamp",
    "signal_holder",
    "stamp_of",
    "sync_directory",
    "write_atomic",
]

Stamp = tuple[int, ...]
"""Device, inode, size, and the times of the last write and status change in nanoseconds."""

_TICK_NS: Final = 20 * 10**6
"""More than the resolution of the kernel's clock for file times, 10 ms at most."""
_COARSE_TICK_NS: Final = 2 * 10**9
"""The same on file systems that keep whole seconds, such as FAT."""


def stamp_of(file: Path | int) -> Stamp:
    """Return the stamp of a path or an open file; it changes with every later write.

    Raises:
        OSError: There is no such file.
    """
    found = os.stat(file)  # noqa: PTH116  # also of an open file
    # Programs can set the time of the last write, but not that of the last status change.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settled_stamp(file: Path | int, *, wait: bool = False) -> Stamp | None:
    """Return the stamp; None if the file is so young that a write could leave the stamp as it is.

    Take it before reading: the content is known by the stamp only if it is the same afterwards.

    Args:
        wait: Wait for a file just written, up to 20 ms. Blocks.

    Raises:
        OSError: There is no such file.
    """
    now = time.time_ns()
    stamp = stamp_of(file)
    tick = _TICK_NS if stamp[-1] % 10**9 else _COARSE_TICK_NS
    left = tick - (now - stamp[-1])
    if left < 0:
        return stamp
    if not wait or left > _TICK_NS:
        return None
    time.sleep((left + 1) / 10**9)
    return settled_stamp(file)


class Digest(NamedTuple):
    """The SHA-256 digest of a file.

    Attributes:
        sha256: Hex digest.
        size: Bytes that were hashed.
    """

    sha256: str
    size: int


_MOST_DIGESTS: Final = 4096
_digests: dict[Stamp, str] = {}
"""Digests that this process knows, by stamp."""


def digest_of(path: Path) -> Digest:
    """Return the digest of a file, without reading it if it is unchanged since it was known.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        stamp = settled_stamp(file.fileno())
        if stamp is not None and (known := _digests.get(stamp)):
            return Digest(known, stamp[2])
        found = Digest(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
        if stamp is not None and stamp_of(file.fileno()) == stamp:
            keep_digest(stamp, found.sha256)
    return found


def keep_digest(stamp: Stamp, sha256: str) -> None:
    """Keep the digest of a file in this process, for `digest_of`."""
    if len(_digests) >= _MOST_DIGESTS:
        _digests.clear()
    _digests[stamp] = sha256


LOCK_PATIENCE: Final = 2.0
"""Seconds to wait for a lock that a reader or a process just killed still holds."""


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield the complete lines after byte `offset`, each with the offset of its end.

    Ignores a last line without a newline: it is still being written, or truncated.
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
    """Append one line in a single write, after terminating a truncated last line, if any."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if torn else b"") + line.encode() + b"\n"
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def write_atomic(
    path: Path, content: str | bytes, *, private: bool = False, replace: bool = True
) -> None:
    """Write a file atomically: readers see the old or the new content, even after a crash.

    Args:
        private: Only the owner may read the file.
        replace: Replace an existing file; otherwise it stays as it is, even on network storage
            that does not show it yet.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.unlink(missing_ok=True)
    mode = 0o600 if private else 0o666
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def make_private_directory(path: Path) -> None:
    """Create a directory and its missing parents, accessible only by the owner.

    Existing directories keep their permissions.
    """
    for place in (*reversed(path.parents), path):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def sync_directory(path: Path) -> None:
    """Flush a directory to disk, so that new and renamed entries are durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_usage(directory: Path) -> int:
    """Return the bytes on disk below a directory; files with several names count once."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                found = Path(parent, name).lstat()
            except OSError:
                continue
            sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock, without interfering with it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # A shared lock, so that concurrent checks do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def hold_lock(path: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Hold the lock during the block; the kernel releases it if the process dies.

    Raises:
        BlockingIOError: Another process still holds it after `patience` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + patience
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            time.sleep(0.02)
        record = f"{_identity()}\n".encode()
        # Write first and truncate a longer old record afterwards, so that a reader of the first
        # line never sees a partial record.
        os.pwrite(descriptor, record, 0)
        os.ftruncate(descriptor, len(record))
        yield
    finally:
        os.close(descriptor)


def signal_holder(path: Path, number: int) -> bool:
    """Send a signal to the process that holds a lock; False if it cannot be identified.

    A process id is ambiguous across containers, hosts and reboots. The lock's record must
    therefore match this boot, this pid namespace and the start time of the process with that id.
    Records of earlier versions, which contain only the id, are ignored, and so are all records on
    a system without `/proc` and pidfd (Linux 5.3).
    """
    if not is_locked(path):
        return False
    try:
        record = path.read_text(encoding="ascii").partition("\n")[0]
        pid = int(record.partition(" ")[0])
        # Open it before identifying it, so that the id cannot be reused in between.
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError, ValueError):
        return False
    try:
        if " " not in record or record != _identity(pid):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False  # it has exited in the meantime
    finally:
        os.close(descriptor)
    return True


def _identity(pid: int | None = None) -> str:
    """Return "PID BOOT NAMESPACE STARTED" of a process in this pid namespace.

    Returns just "PID" if the system does not provide the rest.

    Args:
        pid: None for this process.
    """
    number = os.getpid() if pid is None else pid
    proc = Path("/proc")
    try:
        if str((proc / "self").readlink()) != str(os.getpid()):
            return str(number)  # /proc belongs to another pid namespace
        boot = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = (proc / "self/ns/pid").stat().st_ino
        # proc_pid_stat(5): the command in parentheses may contain anything; field 22: start time.
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
