"""Leases: exclusive locks on work that several processes share, released when a process dies."""

import fcntl
import os
import socket
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final
from uuid import uuid4

import anyio
from anyio import to_thread

from training_backends.core.backoff import Backoff
from training_backends.core.errors import StoreError
from training_backends.core.files import is_locked, make_private_directory
from training_backends.core.logging import get_logger
from training_backends.store.leases import Lease, LeaseTable

__all__ = ["Leases"]

log = get_logger()

_TTL: Final = timedelta(seconds=60)
"""A lease held on another machine expires if it is not renewed for this long."""
_RENEW_INTERVAL: Final = _TTL.total_seconds() / 4
_LOCK_FILE_AGE: Final = 86_400.0
"""Seconds after which the lock file of a dead process is removed."""
_FIRST_POLL, _LONGEST_POLL = 0.05, 0.5


class Leases:
    """The leases that this process holds in a shared store.

    Each process keeps a locked file. The kernel releases the lock when the process dies, so on
    one machine a killed process blocks no other, and a suspended or slow process keeps its
    leases. Across machines leases expire; a thread renews those that are held.

    Args:
        directory: Directory of the lock files, shared by all processes on this machine.
    """

    def __init__(self, store: LeaseTable, directory: Path) -> None:
        self._store = store
        self._directory = directory
        # The host name only helps people who inspect the store.
        self._owner = f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid4().hex[:12]}"
        self._lock_file: int | None = None
        self._held: dict[str, Lease] = {}
        self._guard = threading.Lock()
        self._ending = threading.Event()
        self._renewer: threading.Thread | None = None

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[Lease, None]:
        """Hold a lease, waiting until it is free."""
        polls = Backoff(_FIRST_POLL, _LONGEST_POLL, factor=1.5)
        while (lease := await to_thread.run_sync(self._take, name)) is None:
            await anyio.sleep(polls.next())
            # Waiting only reads, however many wait.
            while await to_thread.run_sync(self.is_held, name):  # noqa: ASYNC110  # a row's end
                await anyio.sleep(polls.next())
        async with self._releasing(lease):
            yield lease

    @asynccontextmanager
    async def try_hold(self, name: str) -> AsyncGenerator[Lease | None, None]:
        """Hold a lease if it is free; otherwise yield None."""
        lease = await to_thread.run_sync(self._take, name)
        if lease is None:
            yield None
            return
        async with self._releasing(lease):
            yield lease

    def is_held(self, name: str) -> bool:
        """Return whether a task or process that is not known to be dead holds a lease."""
        with self._guard:
            return self._store.holder(name, is_gone=partial(self._is_gone, name)) is not None

    def close(self) -> None:
        """Release all leases."""
        self._ending.set()
        if self._renewer is not None:
            self._renewer.join()
        for lease in list(self._held.values()):
            self._release(lease)
        if self._lock_file is not None:
            with suppress(FileNotFoundError):
                self._path(self._owner).unlink()
            os.close(self._lock_file)
            self._lock_file = None

    @asynccontextmanager
    async def _releasing(self, lease: Lease) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._release, lease)

    def _take(self, name: str) -> Lease | None:
        with self._guard:
            if name in self._held:
                return None  # held by another task of this process
            self._start_renewing()
            lease = self._store.take(name, self._owner, _TTL, is_gone=partial(self._is_gone, name))
            if lease is not None:
                self._held[name] = lease
            return lease

    def _release(self, lease: Lease) -> None:
        with self._guard:
            self._held.pop(lease.name, None)
        try:
            self._store.release(lease)
        except StoreError as error:
            # Others take it over once this process has exited or the lease has expired.
            log.warning("lease cannot be released", lease=lease.name, reason=error.message)

    def _start_renewing(self) -> None:
        """Lock this process's file and start the renewing thread, once."""
        if self._lock_file is not None:
            return
        make_private_directory(self._directory)
        self._clear()
        path = self._path(self._owner)
        self._lock_file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._renewer.start()

    def _renew(self) -> None:
        while not self._ending.wait(_RENEW_INTERVAL):
            for lease in list(self._held.values()):
                try:
                    if not self._store.renew(lease, _TTL):
                        log.warning("lease was taken over", lease=lease.name)
                except StoreError as error:
                    log.warning("lease cannot be renewed", lease=lease.name, reason=error.message)

    def _is_gone(self, name: str, owner: str) -> bool | None:
        """Return whether the owner of a lease is dead; None if it runs on another machine."""
        if owner == self._owner:
            # The store may still list a lease whose release failed.
            return name not in self._held
        path = self._path(owner)
        if not path.exists():
            return None
        return not is_locked(path)

    def _clear(self) -> None:
        """Remove old lock files of processes that were killed."""
        for path in self._directory.glob("*.alive"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LOCK_FILE_AGE and not is_locked(path):
                    path.unlink()

    def _path(self, owner: str) -> Path:
        return self._directory / f"{owner}.alive"
