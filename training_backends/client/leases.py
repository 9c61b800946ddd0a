"""Leases on work that several processes could take up: one has it, until it ends or dies."""

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

from training_backends.core.errors import StoreError
from training_backends.core.files import is_locked, make_private_directory
from training_backends.core.logging import get_logger
from training_backends.store import Lease, RunStore

__all__ = ["Leases"]

log = get_logger()

_TTL: Final = timedelta(seconds=60)
"""After so long without a sign of life a lease held on another machine may be taken over."""
_SIGN_OF_LIFE: Final = _TTL.total_seconds() / 4
_LONG_AGO: Final = 86_400.0
"""Seconds after which nobody asks any more whether a holder that died still lives."""
_FIRST_POLL, _LONGEST_POLL = 0.05, 0.5


class Leases:
    """What this process holds in a store that others share.

    Each holder keeps a locked file while it lives. The kernel lets go of it when the holder
    dies, so on one machine a killed process blocks nobody, and one that is merely stopped or
    slow loses nothing. Across machines only time tells: a thread renews what is held.

    Args:
        directory: Where the locked files lie, the same for all processes of this machine.
    """

    def __init__(self, store: RunStore, directory: Path) -> None:
        self._store = store
        self._directory = directory
        # The machine's name is for people who look into the store.
        self._owner = f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid4().hex[:12]}"
        self._alive: int | None = None
        self._held: dict[str, Lease] = {}
        self._guard = threading.Lock()
        self._ending = threading.Event()
        self._renewer: threading.Thread | None = None

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[Lease, None]:
        """Hold a lease; wait while another task or process does."""
        pause = _FIRST_POLL
        while (lease := await to_thread.run_sync(self._take, name)) is None:
            await anyio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_POLL)
        async with self._releasing(lease):
            yield lease

    @asynccontextmanager
    async def try_hold(self, name: str) -> AsyncGenerator[Lease | None, None]:
        """Hold a lease if nobody else does; None if somebody does."""
        lease = await to_thread.run_sync(self._take, name)
        if lease is None:
            yield None
            return
        async with self._releasing(lease):
            yield lease

    def is_held(self, name: str) -> bool:
        """Tell whether some task or process, alive as far as can be told, holds a lease."""
        with self._guard:
            return self._store.holder(name, is_gone=partial(self._is_gone, name)) is not None

    def close(self) -> None:
        """Let go of everything."""
        self._ending.set()
        if self._renewer is not None:
            self._renewer.join()
        for lease in list(self._held.values()):
            self._release(lease)
        if self._alive is not None:
            with suppress(FileNotFoundError):
                self._path(self._owner).unlink()
            os.close(self._alive)
            self._alive = None

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
                return None  # by another task of ours
            self._show_life()
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
            # Whoever waits sees that we are gone, or that the time is over.
            log.warning("lease cannot be released", lease=lease.name, reason=error.message)

    def _show_life(self) -> None:
        """Lock our file and begin to renew, once."""
        if self._alive is not None:
            return
        make_private_directory(self._directory)
        self._clear()
        path = self._path(self._owner)
        self._alive = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._renewer = threading.Thread(target=self._renew, name="leases", daemon=True)
        self._renewer.start()

    def _renew(self) -> None:
        while not self._ending.wait(_SIGN_OF_LIFE):
            for lease in list(self._held.values()):
                try:
                    if not self._store.renew(lease, _TTL):
                        log.warning("lease was taken over", lease=lease.name)
                except StoreError as error:
                    log.warning("lease cannot be renewed", lease=lease.name, reason=error.message)

    def _is_gone(self, name: str, owner: str) -> bool | None:
        """Tell whether nobody holds a lease any more; None: its owner is not of this machine."""
        if owner == self._owner:
            # A store that could not be reached may have kept what we do not know of, or let go of.
            return name not in self._held
        path = self._path(owner)
        if not path.exists():
            return None
        return not is_locked(path)

    def _clear(self) -> None:
        """Remove what processes left that were killed long ago and hold nothing any more."""
        for path in self._directory.glob("*.alive"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _LONG_AGO and not is_locked(path):
                    path.unlink()

    def _path(self, owner: str) -> Path:
        return self._directory / f"{owner}.alive"
