"""Count what a database reads, in numbers that do not depend on how busy the machine is."""

from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa

from training_backends.store.database import Database

__all__ = ["cost"]

_PAGES: Final = """
SELECT coalesce(sum(pg_stat_get_xact_blocks_fetched(oid)), 0)::bigint
FROM pg_class WHERE relnamespace = current_schema()::regnamespace
"""
"""Pages of tables and indexes that the session has used since its statistics were collected."""

_SETTINGS: Final = (
    "max_parallel_workers_per_gather = 0",  # other processes have statistics of their own
    "enable_seqscan = off",  # chosen for small tables, and not with more rows
)


async def cost(stores: Collection[Database], work: Callable[[], Awaitable[Any]]) -> int:
    """Return what `work` costs: instructions of SQLite, or pages that PostgreSQL uses."""
    engines = [engine for store in stores for engine in (store._reader, store._writer)]
    counting = _instructions if engines[0].dialect.name == "sqlite" else _pages
    with counting(engines) as counted:
        await work()
    return sum(counted)


@contextmanager
def _instructions(engines: Collection[sa.Engine]) -> Iterator[list[int]]:
    done: list[int] = []
    watched = []

    def watch(connection: Any, _record: Any, _proxy: Any) -> None:
        connection.set_progress_handler(lambda: done.append(1), 1)
        watched.append(connection)

    pools = {engine.pool for engine in engines}
    with _listening([(pool, "checkout", watch) for pool in pools]):
        yield done
    for connection in watched:
        connection.set_progress_handler(None, 1)


@contextmanager
def _pages(engines: Collection[sa.Engine]) -> Iterator[list[int]]:
    pages: list[int] = []
    before: dict[sa.Connection, int] = {}

    def begin(connection: sa.Connection) -> None:
        for setting in _SETTINGS:
            connection.exec_driver_sql(f"SET LOCAL {setting}")
        before[connection] = connection.exec_driver_sql(_PAGES).scalar_one()

    def end(connection: sa.Connection) -> None:
        pages.append(connection.exec_driver_sql(_PAGES).scalar_one() - before.pop(connection))

    with _listening(
        [
            (engine, event, note)
            for engine in engines
            for event, note in (("begin", begin), ("commit", end), ("rollback", end))
        ]
    ):
        yield pages


@contextmanager
def _listening(listeners: Collection[tuple[Any, str, Callable[..., None]]]) -> Iterator[None]:
    for listener in listeners:
        sa.event.listen(*listener)
    try:
        yield
    finally:
        for listener in listeners:
            sa.event.remove(*listener)
