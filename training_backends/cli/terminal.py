"""Interactive prompts on the terminal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interruptible"]

_ALARM_INTERVAL = 0.2
"""Seconds."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C end a terminal prompt immediately.

    Blocks the event loop while the prompt is open. If the prompt ran in a thread, it would stay
    open after Ctrl-C, because the event loop's signal handler waits for the thread. The alarm
    interrupts the blocking read periodically, so that a Ctrl-C that arrives just before the read
    starts is handled as well.
    """
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    alarm = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, _ALARM_INTERVAL, _ALARM_INTERVAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, handler)
