"""Interactive prompts on the terminal."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import typer

from training_backends.core.escape import escape_controls

__all__ = ["ask", "interruptible", "no_consent"]

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


def ask(question: str) -> bool:
    """Ask a yes-or-no question on the terminal."""
    # `input` would write the last character of the prompt to standard output.
    with interruptible(), redirect_stdout(sys.stderr):
        return typer.confirm(escape_controls(question), err=True)


def no_consent(reason: str, hint: str) -> Exception:
    """Return the error for a question that cannot be asked without a terminal."""
    from training_backends.cli.exit_codes import UsageError

    return UsageError(f"{reason}, and there is no terminal for confirmation.", hint=hint)
