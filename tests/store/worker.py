"""What a process does that shares a store with others; see `start_worker` in `conftest.py`."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from training_backends.core.run import LogRecord
from training_backends.store import RunStore

LOOKS = 10
EACH = 3


def count_runs(store: RunStore) -> str:
    """Open the store."""
    return str(len(store.list()))


def look(store: RunStore) -> str:
    """Store look after look at the run `r`, each with some records, until all are stored."""
    stored = 0
    while (n := int(store.provider_cursor("r") or 0)) < LOOKS:
        records = [
            LogRecord(
                at=datetime.fromtimestamp(n * EACH + i, UTC),
                message=f"{n}.{i}",
                source="event",
                cursor="",
            )
            for i in range(EACH)
        ]
        after = str(n) if n else None
        run = store.observed("r", lambda run: run, records, after=after, cursor=str(n + 1))
        stored += run is not None
    return str(stored)


def count_up(store: RunStore, path: str) -> str:
    """Add to the number in a file, under a lease, often."""
    mine = f"{os.getpid()}"
    done = 0
    while done < 6:
        lease = store.take("file", mine, timedelta(hours=1), is_gone=lambda _: None)
        if lease is None:
            continue
        number = int(Path(path).read_text())
        Path(path).write_text(str(number + 1))
        store.release(lease)
        done += 1
    return mine


def open_store(store: RunStore) -> str:
    """Open the store and leave it open."""
    store.list()
    return "open"


DUTIES: dict[str, Callable[..., str]] = {
    "count": count_runs,
    "look": look,
    "up": count_up,
    "open": open_store,
}


def work(pipe: "Connection[str, str]", what: str, url: str, *more: str) -> None:
    """Report `ready`, wait for a message, do one of them, report the result, wait for the end."""
    store = RunStore(url)
    pipe.send("ready")
    pipe.recv()
    pipe.send(DUTIES[what](store, *more))
    pipe.recv()
