"""Questions to the person at the terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heard_at_once"]

_LOOK_EVERY = 0.2
"""Seconds."""


@contextmanager
def heard_at_once() -> Iterator[None]:
    """Have a Ctrl-C end a question on the terminal at once.

    The event loop stands still meanwhile. In a thread the question would stay open after a
    Ctrl-C, and its own handler of that signal would wait for the answer. One that comes between
    the question and the wait for its answer would wait for that, too; so an alarm interrupts
    the wait now and again.
    """
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, _LOOK_EVERY, _LOOK_EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, handler)
