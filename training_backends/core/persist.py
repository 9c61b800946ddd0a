"""Repeat calls after temporary errors: the loop above the attempts of an HTTP client."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import anyio

from training_backends.core.backoff import Backoff
from training_backends.core.errors import (
    BackendUnavailable,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
    WaitTimeout,
)

__all__ = ["TRIES", "asked_pause", "ensure", "may_pass", "persist", "poll", "settle"]

TRIES: Final = 5
"""Maximum attempts, and unreadable responses in a row while polling."""

_SHORTEST: Final = 0.5
_LONGEST: Final = 20.0

_T = TypeVar("_T")


def may_pass(error: TrainingBackendError) -> bool:
    """Return whether the same call may succeed later.

    A malformed response is usually an error page of a proxy, or truncated.
    """
    passing = isinstance(error, BackendUnavailable | RateLimited) and error.retryable
    return passing or isinstance(error, ProtocolError)


def asked_pause(error: TrainingBackendError) -> float:
    """Return the pause that a server requested, in seconds."""
    return error.retry_after or 0.0 if isinstance(error, RateLimited) else 0.0


async def persist(
    act: Callable[[], Awaitable[_T]],
    *,
    tries: int = TRIES,
    within: float = 120.0,
    pauses: Backoff | None = None,
) -> _T:
    """Repeat an operation after temporary errors; it must be safe to repeat.

    Args:
        tries: Maximum attempts.
        within: Seconds after which no further attempt is started.

    Raises:
        TrainingBackendError: The last temporary error, or a permanent one.
    """
    latest = time.monotonic() + within
    growing = pauses or Backoff(_SHORTEST, _LONGEST)
    for left in reversed(range(tries)):
        try:
            return await act()
        except TrainingBackendError as error:
            pause = max(growing.next(), asked_pause(error))
            if not left or time.monotonic() + pause > latest or not may_pass(error):
                raise
            await anyio.sleep(pause)
    raise ValueError("at least one try is needed")


async def poll(
    fetch: Callable[[], Awaitable[_T]],
    ready: Callable[[_T], bool],
    *,
    within: float,
    what: str = "the result",
    pauses: Backoff | None = None,
) -> _T:
    """Fetch until the value is ready, through outages of the server.

    Args:
        within: Seconds until giving up.
        what: What is not ready in time, for the message.

    Raises:
        WaitTimeout: It was not ready in time.
        TrainingBackendError: A permanent error, or unreadable responses in a row.
    """
    growing = pauses or Backoff(_SHORTEST, _LONGEST)
    unreadable = 0
    trouble: TrainingBackendError | None = None
    with anyio.move_on_after(within):
        while True:
            asked = 0.0
            try:
                value = await fetch()
            except TrainingBackendError as error:
                unreadable = unreadable + 1 if isinstance(error, ProtocolError) else 0
                if not may_pass(error) or unreadable == TRIES:
                    raise
                asked, trouble = asked_pause(error), error
            else:
                unreadable, trouble = 0, None
                if ready(value):
                    return value
            await anyio.sleep(max(growing.next(), asked))
    last = f" (last error: {trouble.message})" if trouble else ""
    raise WaitTimeout(f"Timed out: the provider did not finish {what} within {within:g} s{last}.")


async def settle(
    look: Callable[[], Awaitable[_T | None]], *, within: float, pauses: Backoff | None = None
) -> _T | None:
    """Look for the effect of a request without a response, until it would have appeared.

    For the `find` of a journal step. Looks at least twice: lists may lag behind, and a proxy may
    deliver a request late.

    Args:
        look: Returns what it has found, or None.
        within: Seconds to wait between looks in total; then the request no longer takes effect.
    """
    growing = pauses or Backoff(_SHORTEST, _LONGEST)
    left, looked = within, False
    while (found := await look()) is None:
        if looked and left <= 0:
            return None
        looked = True
        pause = min(growing.next(), left) if left > 0 else growing.next()
        await anyio.sleep(pause)
        left -= pause  # not the time that slow requests take
    return found


async def ensure(
    reached: Callable[[], Awaitable[bool]], act: Callable[[], Awaitable[object]]
) -> None:
    """Act unless the result is reached; safe to repeat. For `stop`, `pause` and `unpause`.

    An error of `act` is ignored if the result is reached all the same: the response was lost, or
    the provider rejects a change that has just happened by itself.
    """
    if await reached():
        return
    try:
        await act()
    except TrainingBackendError:
        with suppress(TrainingBackendError):
            if await reached():
                return
        raise
