"""Waiting for what another task, thread or process does, instead of for mere time."""

import time
from collections.abc import Awaitable, Callable
from itertools import chain, repeat
from typing import Any, Final, TypeVar, overload

import anyio

__all__ = ["until", "wait_until"]

T = TypeVar("T")

_PATIENCE: Final = 60.0
"""Seconds; machines are busy at times, and only a test that fails waits for so long."""
_PAUSES: Final = (0.005, 0.01, 0.02, 0.04)
"""Between two looks, the last one over and over: what is looked at needs the processor too."""


@overload
async def until(look: Callable[[], Awaitable[T]], reached: Callable[[T], object] = bool) -> T: ...
@overload
async def until(look: Callable[[], T], reached: Callable[[T], object] = bool) -> T: ...
async def until(look: Callable[[], Any], reached: Callable[[Any], object] = bool) -> Any:
    """Look until what is seen is as wanted, and return it.

    Args:
        look: May be asynchronous.
        reached: Judges what is seen; by default it need only be true.

    Raises:
        AssertionError: It never was; the message says what was seen last.
    """
    seen: Any = None
    pauses = chain(_PAUSES, repeat(_PAUSES[-1]))
    with anyio.move_on_after(_PATIENCE):
        while True:
            found = look()
            seen = await found if isinstance(found, Awaitable) else found
            if reached(seen):
                return seen
            await anyio.sleep(next(pauses))
    raise _in_vain(seen)


def wait_until(
    look: Callable[..., T], reached: Callable[[T], object] = bool, *, patience: float = _PATIENCE
) -> T:
    """Do what `until` does, and block meanwhile."""
    deadline = time.monotonic() + patience
    pauses = chain(_PAUSES, repeat(_PAUSES[-1]))
    while not reached(seen := look()):
        if time.monotonic() > deadline:
            raise _in_vain(seen, patience)
        time.sleep(next(pauses))
    return seen


def _in_vain(seen: object, patience: float = _PATIENCE) -> AssertionError:
    return AssertionError(f"waited {patience:g} s in vain; seen last: {seen!r}")
