"""Calls are repeated after temporary errors, and only after those."""

from collections.abc import Awaitable, Callable, Iterator
from itertools import chain, repeat

import pytest

from training_backends import (
    BackendUnavailable,
    ConfigError,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
    WaitTimeout,
)
from training_backends.core.backoff import Backoff
from training_backends.core.persist import ensure, persist, poll, settle

pytestmark = pytest.mark.anyio

Outcome = TrainingBackendError | str


class Script:
    """A call with scripted outcomes; the last one repeats."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._left: Iterator[Outcome] = chain(outcomes, repeat(outcomes[-1]))
        self.called = 0

    async def __call__(self) -> str:
        """Return or raise the next outcome."""
        self.called += 1
        outcome = next(self._left)
        if isinstance(outcome, str):
            return outcome
        raise outcome


def quick() -> Backoff:
    """Return short pauses."""
    return Backoff(0.001, 0.002)


@pytest.mark.parametrize(
    "error", [BackendUnavailable("x"), RateLimited("x", retry_after=0.001), ProtocolError("x")]
)
async def test_temporary_errors_are_waited_out(error: TrainingBackendError) -> None:
    """A run of troubles shorter than the tries ends with the result."""
    call = Script(error, error, "done")
    assert await persist(call, pauses=quick()) == "done"
    assert call.called == 3
    endless = Script(error)
    with pytest.raises(type(error)):
        await persist(endless, tries=4, pauses=quick())
    assert endless.called == 4


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("x"),
        BackendUnavailable("x", retryable=False),
        RateLimited("x", retryable=False),
        RateLimited("x", retry_after=1000.0),
    ],
)
@pytest.mark.parametrize("way", [persist, lambda call: poll(call, bool, within=0.1)])
async def test_permanent_errors_are_raised(
    error: TrainingBackendError, way: Callable[[Script], Awaitable[str]]
) -> None:
    """What will not pass in time is not tried again."""
    call = Script(error)
    with pytest.raises((type(error), WaitTimeout)):
        await way(call)
    assert call.called == 1


async def test_poll_waits_until_ready_through_outages() -> None:
    """Values that are not ready and temporary errors are waited out."""
    call = Script("no", BackendUnavailable("x"), *[ProtocolError("x")] * 4, "no", "yes")
    assert await poll(call, "yes".__eq__, within=30, pauses=quick()) == "yes"
    assert call.called == 8


async def test_poll_ends() -> None:
    """Unreadable responses in a row are an error, and so is time running out."""
    with pytest.raises(ProtocolError):
        await poll(Script(ProtocolError("x")), bool, within=30, pauses=quick())
    call = Script(BackendUnavailable("busy"))
    with pytest.raises(WaitTimeout, match=r"file f1 within 0.05 s \(last error: busy\)"):
        await poll(call, bool, within=0.05, what="file f1", pauses=quick())


async def test_settle_looks_until_a_late_effect_appears() -> None:
    """Looking continues until the effect is found, at least twice, and ends in time."""
    seen = iter([None, None, "job"])

    async def late() -> str | None:
        return next(seen)

    assert await settle(late, within=30, pauses=quick()) == "job"
    looks = 0

    async def never() -> str | None:
        nonlocal looks
        looks += 1
        return None

    assert await settle(never, within=-1, pauses=quick()) is None
    assert looks == 2


@pytest.mark.parametrize(
    ("reached", "outcome", "acts"),
    [
        ([True], "done", 0),
        ([False], "done", 1),
        ([False, True], BackendUnavailable("lost"), 1),
        ([False, True], ConfigError("has already ended"), 1),
    ],
)
async def test_ensure_acts_once_unless_the_result_is_reached(
    reached: list[bool], outcome: Outcome, acts: int
) -> None:
    """Nothing is sent for a result that is there, and an error is ignored if it is there then."""
    act, looks = Script(outcome), iter(reached)

    async def look() -> bool:
        return next(looks)

    await ensure(look, act)
    assert act.called == acts
    assert not list(looks)


@pytest.mark.parametrize("then", [Script("no"), Script(BackendUnavailable("down"))])
async def test_ensure_raises_the_error_of_the_action(then: Script) -> None:
    """It is raised if the result is not reached, and if that cannot be found out."""
    looks = iter([Script("no"), then])

    async def look() -> bool:
        return await next(looks)() == "yes"

    with pytest.raises(ConfigError, match="rejected"):
        await ensure(look, Script(ConfigError("rejected")))
