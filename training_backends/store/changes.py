"""Wake tasks when a run changes in the store: PostgreSQL notifies, SQLite is polled."""

from collections.abc import AsyncGenerator, Collection
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import Any, Final

import anyio
import sqlalchemy as sa
from anyio import to_thread

from training_backends.core.errors import StoreError
from training_backends.store.database import CHANNEL, Database, is_postgres

__all__ = ["Changes", "RunChange"]

_PATIENCE: Final = 2.0
"""Seconds for the first notification; a pooler that shares sessions passes none on."""
_LONGEST: Final = 30.0
"""Seconds after which a task looks anyway, should a notification be lost."""
_RETRY_AFTER: Final = 60.0
"""Seconds of polling after the server could not be listened to."""


class RunChange:
    """Wakes one task when one of its runs has changed since it last waited."""

    def __init__(self, changes: "Changes", run_ids: Collection[str]) -> None:
        self.run_ids = run_ids
        self.event = anyio.Event()
        self._changes = changes

    @property
    def can_tell(self) -> bool:
        """Whether the store tells changes itself."""
        return self._changes.is_listening

    async def wait(self, poll: float, *, longest: float = _LONGEST) -> None:
        """Return once a run may have changed.

        Args:
            poll: Seconds to wait if the store cannot tell.
            longest: Seconds to wait if it can.
        """
        if self._changes.is_listening:
            with anyio.move_on_after(longest):
                await self._changes.until(self)
        else:
            await anyio.sleep(poll)
        self.event = anyio.Event()


class Changes:
    """The changes of one store, for the tasks of one event loop."""

    def __init__(self, database: Database, url: str) -> None:
        self._database = database
        self._url = sa.make_url(url)
        self._waiting: set[RunChange] = set()
        self._connection: Any = None
        self._opening = anyio.Lock()
        self._reading = anyio.Lock()
        self._polls_until = float("-inf")

    @property
    def is_listening(self) -> bool:
        """Whether the server tells changes; otherwise the store is polled."""
        return self._connection is not None

    @asynccontextmanager
    async def of(self, run_ids: Collection[str]) -> AsyncGenerator[RunChange, None]:
        """Collect the changes of runs from now on."""
        change = RunChange(self, run_ids)
        self._waiting.add(change)
        try:
            if is_postgres(self._url):
                await self._listen()
            yield change
        finally:
            self._waiting.discard(change)
            if not self._waiting:
                with anyio.CancelScope(shield=True):
                    await self._disconnect()

    async def until(self, change: RunChange) -> None:
        """Return once a change is reported. One of the waiting tasks reads for all."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read)
            await change.event.wait()
            tasks.cancel_scope.cancel()

    async def _listen(self) -> None:
        async with self._opening:
            if self.is_listening or anyio.current_time() < self._polls_until:
                return
            import psycopg  # noqa: PLC0415  # an extra

            # In a session of another client: behind a pooler, one's own would always be heard.
            token, connection = token_hex(8), None
            try:
                with anyio.fail_after(_PATIENCE):
                    dialect = self._url.set(drivername="postgresql+psycopg").get_dialect()()
                    _, options = dialect.create_connect_args(self._url)
                    connection = await psycopg.AsyncConnection.connect(
                        **{"connect_timeout": 10, **options},
                        autocommit=True,
                        prepare_threshold=None,
                    )
                    await connection.execute(f"LISTEN {CHANNEL}")
                    await to_thread.run_sync(self._database.announce, token)
                    async for notice in connection.notifies():
                        if notice.payload == token:
                            break
            except (psycopg.Error, StoreError, OSError, TimeoutError):
                self._polls_until = anyio.current_time() + _RETRY_AFTER
                if connection is not None:
                    await connection.close()
            else:
                self._connection = connection

    async def _read(self) -> None:
        import psycopg  # noqa: PLC0415  # an extra

        async with self._reading:
            try:
                async for notice in self._connection.notifies():
                    for change in self._waiting:
                        if notice.payload in change.run_ids:
                            change.event.set()
            except (psycopg.Error, OSError, AttributeError):
                self._polls_until = anyio.current_time() + _RETRY_AFTER
                await self._disconnect()
                for change in self._waiting:
                    change.event.set()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):  # it may be broken already
                await connection.close()
