"""Pieces of work side by side."""

from functools import partial

import anyio
import pytest

from training_backends.core.concurrency import run_all

pytestmark = pytest.mark.anyio


async def test_no_more_pieces_than_asked_for_at_once() -> None:
    """The bound holds, and everything is done."""
    working = most = done = 0

    async def piece() -> None:
        nonlocal working, most, done
        working += 1
        most = max(most, working)
        await anyio.lowlevel.checkpoint()
        working -= 1
        done += 1

    await run_all([piece] * 10, at_once=3)
    assert (most, done) == (3, 10)


async def test_the_first_error_comes_out_as_itself() -> None:
    """Not in a group, and what is under way ends."""
    ended: list[str] = []

    async def fail() -> None:
        raise LookupError("gone")

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    with pytest.raises(LookupError, match="gone"):
        await run_all([wait, fail])
    assert ended == ["cancelled"]


async def test_nothing_to_do_is_done_at_once() -> None:
    """An empty list is no special case."""
    await run_all([])


async def test_what_is_cancelled_from_outside_ends() -> None:
    """A deadline around it is kept."""
    with anyio.move_on_after(0.01) as scope:
        await run_all([partial(anyio.sleep, 60)])
    assert scope.cancelled_caught
