"""Questions to the person at the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGINT, default_int_handler, signal

__all__ = ["heard_at_once"]


@contextmanager
def heard_at_once() -> Iterator[None]:
    """Have a Ctrl-C end a question on the terminal at once.

    The event loop stands still meanwhile. In a thread the question would stay open after a
    Ctrl-C, and its own handler of that signal would wait for the answer.
    """
    handler = signal(SIGINT, default_int_handler)
    try:
        yield
    finally:
        signal(SIGINT, handler)
