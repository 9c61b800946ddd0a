"""Several pieces of work side by side, with errors that come out as themselves."""

from collections.abc import Awaitable, Callable, Iterable

import anyio

__all__ = ["run_all"]


async def run_all(
    work: Iterable[Callable[[], Awaitable[object]]], *, at_once: int | None = None
) -> None:
    """Do all of `work`, at most `at_once` pieces at the same time; None: all of it.

    The first error ends what is under way and is raised as itself, not in a group.
    """
    pieces = list(work)
    pending = iter(pieces)
    failed: list[Exception] = []

    async with anyio.create_task_group() as tasks:

        async def take() -> None:
            for piece in pending:
                try:
                    await piece()
                except Exception as error:  # whatever it is, the caller gets it
                    failed.append(error)
                    tasks.cancel_scope.cancel()
                    return

        for _ in range(min(at_once or len(pieces), len(pieces))):
            tasks.start_soon(take)
    if failed:
        raise failed[0]
