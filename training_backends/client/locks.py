"""One launch of a run at a time on this machine."""

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio import to_thread

from training_backends.core.files import is_locked, make_private_directory

__all__ = ["is_launching", "launch_lock"]

_POLL = 0.05


@asynccontextmanager
async def launch_lock(directory: Path, run_id: str) -> AsyncIterator[None]:
    """Hold the launch of `run_id`; wait while another task or process holds it.

    The kernel releases the lock when its holder dies, so a killed launch never blocks
    the next one.
    """
    handle = await to_thread.run_sync(_open, _path(directory, run_id))
    try:
        while not _try(handle):  # noqa: ASYNC110  # a kernel lock sets no event
            await anyio.sleep(_POLL)
        yield
    finally:
        os.close(handle)


def is_launching(directory: Path, run_id: str) -> bool:
    """Tell whether some task or process launches `run_id` now; blocks for a moment."""
    return is_locked(_path(directory, run_id))


def _path(directory: Path, run_id: str) -> Path:
    return directory / f"{run_id}.lock"


def _open(path: Path) -> int:
    make_private_directory(path.parent)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
