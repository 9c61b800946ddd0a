"""Background tasks beside a block of code."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

__all__ = ["beside"]


@asynccontextmanager
async def beside() -> AsyncIterator[TaskGroup]:
    """Run tasks beside a block; an error of the block itself leaves it as it is.

    A plain task group would wrap it, and whoever expects a `ConfigError` would miss it.
    """
    failure: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                yield tasks
            except BaseException as error:
                failure = error
                raise
    except BaseExceptionGroup:
        if failure is not None:
            raise failure from None
        raise
