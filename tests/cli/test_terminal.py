"""Questions on a terminal end with a Ctrl-C, whenever it comes."""

import signal
import subprocess
import sys

from training_backends.cli.terminal import interruptible

ASKING = """
import signal, threading
from training_backends.cli.terminal import interruptible

def interrupt():
    # Told to this thread, a signal does not end the wait of the main one.
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

with interruptible():
    threading.Timer(0.2, interrupt).start()
    input()
"""


def test_a_ctrl_c_that_does_not_end_the_wait_is_heard_all_the_same() -> None:
    """So is one that comes between the question and the wait for its answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
        _, said = process.communicate()
    assert "KeyboardInterrupt" in said


def test_signals_and_alarms_are_as_before() -> None:
    """Whoever else uses them goes on to."""
    numbers = (signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    timer = signal.getitimer(signal.ITIMER_REAL)
    with interruptible():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [signal.getsignal(number) for number in numbers] == before
    after = signal.getitimer(signal.ITIMER_REAL)
    assert (after[0] > 0, after[1]) == (timer[0] > 0, timer[1])
