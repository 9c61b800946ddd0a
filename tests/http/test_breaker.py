"""When a server that does not answer is left alone, and when it is asked again."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http.conftest import Clock
from training_backends.http.limits import Breaker, CircuitOpen

LONGEST = 30.0


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    """Make one whose pauses are as long as they may be."""
    return Breaker(clock=clock, jitter=lambda _, high: high)


def fail(breaker: Breaker, times: int = 1) -> None:
    """Let calls through and let them fail."""
    for _ in range(times):
        trying = breaker.enter()
        assert not isinstance(trying, CircuitOpen)
        breaker.leave(trying=trying, answered=False, what="no connection")


def refusal(breaker: Breaker) -> CircuitOpen:
    """Return why a call is refused."""
    refused = breaker.enter()
    assert isinstance(refused, CircuitOpen)
    return refused


def test_several_failures_in_a_row_end_it(breaker: Breaker) -> None:
    """After five failed calls the next is refused, with since when and for how long."""
    fail(breaker, times=5)
    refused = refusal(breaker)
    assert (refused.failures, refused.seconds, refused.last) == (5, 1.0, "no connection")
    assert datetime.now(UTC) - refused.since < timedelta(seconds=60)


def test_an_answer_in_between_counts_anew(breaker: Breaker) -> None:
    """Only failures without an answer between them count."""
    fail(breaker, times=4)
    breaker.leave(trying=False, answered=True)
    fail(breaker, times=4)
    assert breaker.enter() is False


def test_calls_that_say_nothing_do_not_count(breaker: Breaker) -> None:
    """A call that was cancelled is neither a failure nor an answer."""
    fail(breaker, times=4)
    for _ in range(9):
        breaker.leave(trying=False, answered=None)
    assert breaker.enter() is False
    fail(breaker)
    refusal(breaker)


def test_one_call_tries_and_opens_the_way(breaker: Breaker, clock: Clock) -> None:
    """After the pause one call goes; the others wait for it; its answer lets all through."""
    fail(breaker, times=5)
    clock.now += 1.0
    assert breaker.enter() is True
    refusal(breaker)
    breaker.leave(trying=True, answered=True)
    assert [breaker.enter() for _ in range(9)] == [False] * 9
    fail(breaker, times=4)
    assert breaker.enter() is False


def test_pauses_grow_up_to_a_bound(breaker: Breaker, clock: Clock) -> None:
    """Each try that fails doubles the pause, up to half a minute."""
    fail(breaker, times=5)
    pauses = []
    for _ in range(8):
        pauses.append(refusal(breaker).seconds)
        clock.now += pauses[-1]
        fail(breaker)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_pauses_are_drawn_at_random(clock: Clock) -> None:
    """Many clients of one server do not come back at the same moment."""
    pauses = set()
    for _ in range(20):
        breaker = Breaker(clock=clock)
        fail(breaker, times=5)
        pauses.add(refusal(breaker).seconds)
    assert len(pauses) > 10
    assert all(0.5 <= pause <= 1.0 for pause in pauses)


def test_cancelled_try_leaves_it_to_the_next(breaker: Breaker, clock: Clock) -> None:
    """When the call that tries is cancelled, the next one tries."""
    fail(breaker, times=5)
    clock.now += 1.0
    assert breaker.enter() is True
    breaker.leave(trying=True, answered=None)
    assert breaker.enter() is True


def test_try_that_does_not_come_back_is_not_waited_for(breaker: Breaker, clock: Clock) -> None:
    """When the call that tries takes very long, for it is an upload, another one tries."""
    fail(breaker, times=5)
    clock.now += 1.0
    assert breaker.enter() is True
    clock.now += 120.0
    assert breaker.enter() is True


def test_calls_under_way_do_not_lengthen_the_pause(breaker: Breaker, clock: Clock) -> None:
    """What was sent before and fails later says nothing new; what is answered does."""
    fail(breaker, times=5)
    for _ in range(9):
        breaker.leave(trying=False, answered=False, what="late")
    assert refusal(breaker).seconds == 1.0
    breaker.leave(trying=False, answered=True)
    assert breaker.enter() is False


def test_one_of_many_threads_tries(breaker: Breaker, clock: Clock) -> None:
    """However many threads ask at the same moment, one call goes."""
    fail(breaker, times=5)
    clock.now += 1.0
    together = threading.Barrier(16)
    said: list[bool | CircuitOpen] = []

    def ask() -> None:
        together.wait()
        said.append(breaker.enter())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.count(True) == 1
    assert sum(isinstance(each, CircuitOpen) for each in said) == 15


@given(st.lists(st.sampled_from([True, False, None]), max_size=60))
def test_the_way_is_never_barred_for_ever(ends: list[bool | None]) -> None:
    """However calls end, the next one goes within half a minute."""
    clock = Clock()
    breaker = Breaker(clock=clock)
    for end in ends:
        trying = breaker.enter()
        if isinstance(trying, CircuitOpen):
            assert trying.seconds <= LONGEST
            clock.now += trying.seconds
            trying = breaker.enter()
        assert not isinstance(trying, CircuitOpen)
        breaker.leave(trying=trying, answered=end)
