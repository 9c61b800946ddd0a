"""Pauses between attempts."""

from training_backends.core.backoff import Backoff


def test_pauses_double_up_to_the_longest() -> None:
    """Each pause is twice the one before it, up to the bound."""
    backoff = Backoff(0.5, 3.0)
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_a_reset_starts_again_with_the_first_pause() -> None:
    """After a success the next failure waits only for the first pause."""
    backoff = Backoff(1.0, 60.0)
    pauses = [backoff.next() for _ in range(4)]
    backoff.reset()
    assert [backoff.next() for _ in range(4)] == pauses


def test_the_growth_can_be_chosen() -> None:
    """A polling interval may grow more slowly than a backoff."""
    backoff = Backoff(1.0, 2.0, factor=1.5)
    assert [backoff.next() for _ in range(3)] == [1.0, 1.5, 2.0]


def test_the_longest_pause_is_never_below_the_first() -> None:
    """A bound below the first pause is raised to it."""
    backoff = Backoff(5.0, 1.0)
    assert [backoff.next() for _ in range(2)] == [5.0, 5.0]
