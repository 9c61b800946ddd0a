"""Concurrent work with plain exceptions instead of exception groups."""

from collections.abc import Awaitable, Callable, Iterable

import anyio

__all__ = ["run_all"]


async def run_all(
    work: Iterable[Callable[[], Awaitable[object]]], *, at_once: int | None = None
) -> None:
    """Run all of `work` concurrently, at most `at_once` at a time; None: no limit.

    The first error cancels the rest and is raised itself, not in a group.
    """
    pieces = list(work)
    pending = iter(pieces)
    failed: list[Exception] = []

    async with anyio.create_task_group() as tasks:

        async def take() -> None:
            for piece in pending:
                try:
                    await piece()
                except Exception as error:  # raised below
                    failed.append(error)
                    tasks.cancel_scope.cancel()
                    return

        for _ in range(min(at_once or len(pieces), len(pieces))):
            tasks.start_soon(take)
    if failed:
        raise failed[0]
