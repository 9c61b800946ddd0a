"""Entry point of a worker process (see `worker_pool`); its argument is the task name."""

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
    """Process arguments until the parent closes the connection or exits."""
    connection: Connection[Any, Any] = Connection(os.dup(0))
    devnull = os.open(os.devnull, os.O_RDWR)
    os.dup2(devnull, 0)
    os.close(devnull)
    inbox: _Inbox = SimpleQueue()
    Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    function = load_task(sys.argv[1])
    # The parent is gone: there is no one left to report to.
    with suppress(ConnectionError):
        while True:
            number, argument = pickle.loads(inbox.get())  # noqa: S301  # from our own parent
            connection.send_bytes(_pickled(number, attempt(function, argument)))


def _listen(connection: "Connection[Any, Any]", inbox: _Inbox) -> None:
    """Receive arguments in the background; exit when the parent does."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv_bytes())
    os._exit(0)


def _pickled(number: int, outcome: Outcome) -> bytes:
    """Pickle an outcome; if that fails, return a `TypeError` that says why."""
    returned, value = outcome
    try:
        data = pickle.dumps((number, outcome))
        if not returned:
            pickle.loads(data)  # noqa: S301  # some errors pickle but do not unpickle
    except Exception as error:
        kind = "result" if returned else f"error {type(value).__name__}: {value}"
        return pickle.dumps((number, (False, TypeError(f"cannot pickle the {kind} ({error})"))))
    return data


if __name__ == "__main__":
    main()
