"""When a call may go, by what the server said in its answers."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.http.conftest import Clock
from training_backends.http.limits import Limiter

NEVER = math.inf


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return Limiter(clock)


def left(limit: object, remaining: object) -> dict[str, str]:
    """Return the headers that tell a limit."""
    return {
        "X-RateLimit-Limit-Req-Minute": str(limit),
        "X-RateLimit-Remaining-Req-Minute": str(remaining),
        "x-ratelimit-limit-tokens-minute": "500000",
        "x-ratelimit-remaining-tokens-minute": "0",
    }


def test_nothing_is_limited_at_first(limiter: Limiter, clock: Clock) -> None:
    """Before the server has said anything, every call goes at once."""
    assert [limiter.turn(NEVER) for _ in range(100)] == [clock.now] * 100


@pytest.mark.parametrize("status", [429, 503])
def test_pause_holds_for_every_call(status: int, limiter: Limiter, clock: Clock) -> None:
    """What one answer asked for, all calls wait; then they go on."""
    limiter.told(status, {"Retry-After": "7"}, longest=60)
    assert {limiter.turn(NEVER) for _ in range(3)} == {1007.0}
    assert limiter.is_failing is (status == 503)
    clock.now = 1007.5
    assert limiter.turn(NEVER) == 1007.5
    assert limiter.is_failing is False


@pytest.mark.parametrize("status", [200, 301, 404, 500])
def test_other_answers_ask_for_no_pause(status: int, limiter: Limiter, clock: Clock) -> None:
    """Retry-After means something else there, or concerns that one call only."""
    limiter.told(status, {"retry-after": "7"}, longest=60)
    assert limiter.turn(NEVER) == clock.now


def test_longest_pause_counts(limiter: Limiter) -> None:
    """A shorter pause told by another call does not end a longer one."""
    for seconds in ("5", "9", "2"):
        limiter.told(429, {"retry-after": seconds}, longest=60)
    assert limiter.turn(NEVER) == 1009.0


def test_no_server_silences_us_for_a_year(limiter: Limiter, clock: Clock) -> None:
    """A pause that nobody would wait for is told as it is, and asked about again."""
    limiter.told(429, {"retry-after": "31536000"}, longest=60)
    assert limiter.turn(NEVER) == 31_537_000.0
    clock.now = 1060.0
    assert limiter.turn(NEVER) == 1060.0


def test_plenty_left_holds_nobody_up(limiter: Limiter, clock: Clock) -> None:
    """While many calls of the minute are left, none waits."""
    limiter.told(200, left(60, 40), longest=60)
    assert limiter.turn(NEVER) == clock.now


def test_little_left_is_spread_over_the_minute(limiter: Limiter, clock: Clock) -> None:
    """When few are left, they are spaced evenly over what is left of the minute."""
    limiter.told(200, left(60, 40), longest=60)
    clock.now = 1020.0
    limiter.told(200, left(60, 4), longest=60)
    assert [limiter.turn(NEVER) for _ in range(4)] == [1020.0, 1030.0, 1040.0, 1050.0]


def test_none_left_waits_for_the_next_minute(limiter: Limiter) -> None:
    """When none is left, calls wait for the next minute and do not all begin with it."""
    limiter.told(200, left(60, 0), longest=60)
    assert [limiter.turn(NEVER) for _ in range(3)] == [1060.0, 1061.0, 1062.0]


def test_told_pause_is_better_known_than_the_minute(limiter: Limiter) -> None:
    """Where a refusal says when to come again, that counts; still not all come at once."""
    limiter.told(200, left(60, 1), longest=60)
    limiter.told(429, {"retry-after": "5", **left(60, 0)}, longest=60)
    assert [limiter.turn(NEVER) for _ in range(3)] == [1005.0, 1006.0, 1007.0]


def test_call_that_will_not_wait_takes_no_turn(limiter: Limiter) -> None:
    """A call that gives up because its turn is too late leaves the turn to the others."""
    limiter.told(200, left(60, 0), longest=60)
    assert [limiter.turn(1030.0) for _ in range(3)] == [1060.0] * 3


def test_more_left_than_before_is_a_new_minute(limiter: Limiter, clock: Clock) -> None:
    """When the server counts anew, nobody waits any longer."""
    limiter.told(200, left(60, 0), longest=60)
    clock.now = 1010.0
    limiter.told(200, left(60, 59), longest=60)
    assert limiter.turn(NEVER) == 1010.0


def test_limit_is_forgotten_after_its_minute(limiter: Limiter, clock: Clock) -> None:
    """What was left in a minute says nothing of the next."""
    limiter.told(200, left(60, 0), longest=60)
    clock.now = 1060.0
    assert [limiter.turn(NEVER) for _ in range(3)] == [1060.0] * 3


def test_calls_under_way_are_counted(limiter: Limiter, clock: Clock) -> None:
    """An answer that does not know yet of calls on their way does not give them back."""
    limiter.told(200, left(2, 2), longest=60)
    assert [limiter.turn(NEVER) for _ in range(2)] == [clock.now] * 2
    limiter.told(200, left(2, 1), longest=60)
    assert limiter.turn(NEVER) == 1060.0


@example(1, [0.0, 0.0, 0.0])
@given(
    st.integers(min_value=1, max_value=40),
    st.lists(st.floats(min_value=0, max_value=5), min_size=1, max_size=150),
)
def test_a_limit_is_never_run_into(limit: int, thinking: list[float]) -> None:
    """Against a server that counts by the minute, calls in a row are never refused."""
    clock = Clock()
    limiter = Limiter(clock)
    began, used = clock.now, 0
    for seconds in thinking:
        clock.now = limiter.turn(NEVER)
        if clock.now >= began + 60:
            began, used = clock.now, 0
        used += 1
        assert used <= limit
        limiter.told(200, left(limit, limit - used), longest=60)
        clock.now += seconds


@pytest.mark.parametrize("text", ["", "-5", "1.5", "²", "٣", "9" * 5000, "many"])
def test_what_is_no_number_of_calls_is_ignored(text: str, limiter: Limiter, clock: Clock) -> None:
    """A limit that cannot be read is none, and breaks nothing."""
    for limit, remaining in ((text, 0), (60, text)):
        limiter.told(200, left(limit, remaining), longest=60)
    assert limiter.turn(NEVER) == clock.now


anything = st.text(max_size=30) | st.integers().map(str) | st.floats().map(str)


@given(st.sampled_from([200, 429, 503]), anything, anything, anything)
def test_any_header_is_survived(status: int, retry: str, limit: str, remaining: str) -> None:
    """Whatever a server writes there, calls are told a time and go again a minute later."""
    clock = Clock()
    limiter = Limiter(clock)
    limiter.told(status, {"retry-after": retry, **left(limit, remaining)}, longest=60)
    assert clock.now <= limiter.turn(NEVER) < math.inf
    clock.now += 60
    assert limiter.turn(NEVER) == clock.now
