"""The program of a worker process, see `parallel`; its argument is the task's name."""

import os
import pickle
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from training_backends.datasets.worker_pool import Outcome, attempt, load_task

__all__ = ["main"]

_Inbox = SimpleQueue[bytes]


def main() -> None:
    """Answer arguments until the caller closes the connection or dies."""
    connection: Connection[Any, Any] = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    inbox: _Inbox = SimpleQueue()
    Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    function = load_task(sys.argv[1])
    # Where nobody takes an answer any more, there is nobody to tell of that either.
    with suppress(ConnectionError):
        while True:
            number, argument = pickle.loads(inbox.get())  # noqa: S301  # from our own parent
            connection.send_bytes(_pickled(number, attempt(function, argument)))


def _listen(connection: "Connection[Any, Any]", inbox: _Inbox) -> None:
    """Take arguments in while others are worked on; end the process with its parent's."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv_bytes())
    os._exit(0)


def _pickled(number: int, outcome: Outcome) -> bytes:
    """Write down an answer that the parent can read, if only an error that says why not."""
    returned, value = outcome
    try:
        data = pickle.dumps((number, outcome))
        if not returned:
            pickle.loads(data)  # noqa: S301  # some errors can be written, but not be read
    except Exception as error:
        kind = "result" if returned else f"error {type(value).__name__}: {value}"
        return pickle.dumps((number, (False, TypeError(f"cannot pickle the {kind} ({error})"))))
    return data


if __name__ == "__main__":
    main()
